// Causal attention over contiguous KV spans, grouped queries, optional window, soft-cap and sinks; values stored beside the keys, or
// (latent_attention) the first numbers of the keys. Keys are taken in blocks of kKeyBlock tokens at fixed absolute positions; the
// blocks of a chunk of kKeyChunk tokens are merged in order, and so are the chunks. What a row computes depends on its own position
// alone: not on the other rows of its tile, nor on how a prompt was cut. Values beyond a row's position or before its window are never
// used. Where a step has few rows, chunks are units of their own, and a second stage merges them.
#include <math.h>

#include "attend_tiles.h"
#include "common.h"
#include "kv.h"
#include "kv_attend.h"

namespace XK_LEVEL {
namespace {

enum { kQ, kSinks, kOut, kPartial, kRopeQ = kSinks };
enum { kLayerOffset, kGroupBytes, kQHeads, kKvHeads, kKeyDim, kValueDim, kWindow, kPartCount };
enum { kScale, kSoftcap };

constexpr int64_t kEnoughUnits = 64;  // to keep every thread busy without units for chunks

KvPlace place_of(const Call &c, bool latent) {
  return {c.ints[kLayerOffset], c.ints[kGroupBytes], c.ints[kKvHeads], c.ints[kKeyDim], latent ? 0 : c.ints[kValueDim]};
}

template <class Kv, bool Latent>
const char *check(const Call &c) {
  if (!c.every_token()) return "attends for every token of the step: rows must be T";
  if (c.ints[kWindow] < 0) return "window must be 0 (none) or positive";
  if (c.ints[kPartCount] < 0) return "parts must not be negative";
  if (!(c.floats[kSoftcap] >= 0)) return "softcap must be 0 (none) or positive";
  if (const char *wrong = check_kv<Kv>(place_of(c, Latent))) return wrong;
  if (c.ints[kValueDim] < 1) return "value_dim must be positive";
  if (Latent && c.ints[kKvHeads] != 1) return "latent keys have one head";
  if (Latent && c.ints[kValueDim] >= c.ints[kKeyDim]) return "latent values must be shorter than their keys";
  if (c.ints[kQHeads] < 1 || c.ints[kQHeads] % c.ints[kKvHeads]) return "q_heads must be a positive multiple of kv_heads";
  return nullptr;
}

// Query rows that share one pass over keys and values. Those of latents are long: fewer of them stay in a cache.
template <bool Latent>
constexpr int64_t kRows = Latent ? kQueryRows / 2 : kQueryRows;

// Parts of a query on the matrix unit, 0 where vectors compute: a rule that knows no schedule.
template <class Kv, bool Latent>
constexpr int kOnTiles = Latent ? 0 : kAttendParts<Kv>;

// Scratch of a thread: rows, queries, sums of the chunk and of all, scores; then a block of keys and values.
template <class Kv, bool Latent>
int64_t scratch(const Call &c) {
  const int64_t key = padded(c.ints[kKeyDim]), value = padded(c.ints[kValueDim]), rows = kRows<Latent>;
  if constexpr (kOnTiles<Kv, Latent> > 0)
    return rows * (int64_t)(sizeof(Row) + 2 * value * sizeof(float)) + AttendMemory::bytes(kOnTiles<Kv, Latent>, c.ints[kKeyDim], value);
  constexpr int64_t inputs = Kept<Kv>::kInputs;
  return rows * (int64_t)sizeof(Row) + (rows * (key / inputs + 2 * value + kKeyBlock) + kKeyBlock * (key + value) / inputs) * (int64_t)sizeof(float);
}

// A unit is a tile of tokens under one KV head; of the many heads on a latent, as many as share a pass.
template <bool Latent>
int64_t units_of_tile(const Call &c, int64_t tokens) {
  return Latent ? (tokens * c.ints[kQHeads] + kRows<true> - 1) / kRows<true> : c.ints[kKvHeads];
}

struct Chunks {  // that the rows of a tile see
  int64_t first, count;
};
Chunks chunks_of(const Call &c, const Step &s, int64_t tile) {
  const int64_t row = s.tile_row[tile], low = s.batch.positions[row], high = low + s.tile_rows[tile] - 1, window = c.ints[kWindow];
  const int64_t first = window > 0 ? max(0, low - window + 1) / kKeyChunk : 0;
  return {first, high / kKeyChunk - first + 1};
}

// Chunks of all tiles if they are units of their own, else 0. That decides who computes what, never what is computed.
template <bool Latent>
int64_t parts(const Call &c, const Step &s) {
  if (s.tiles * units_of_tile<Latent>(c, 1) >= kEnoughUnits) return 0;
  int64_t all = 0;
  for (int64_t tile = 0; tile < s.tiles; tile++) {
    if (s.tile_rows[tile] != 1) return 0;
    all += chunks_of(c, s, tile).count;
  }
  return all > s.tiles && all <= c.ints[kPartCount] ? all : 0;
}

template <bool Latent>
int64_t units(const Call &c, const Step &s) {
  const int64_t all = parts<Latent>(c, s);
  return all ? all * units_of_tile<Latent>(c, 1) : s.tiles * units_of_tile<Latent>(c, xk::kQueryTile);
}

// A part: for each query head the values of a chunk, not yet divided, then its maximum and sum.
int64_t part_stride(const Call &c) { return padded(c.ints[kValueDim]) + 16; }

// all = all * keep + chunk * take
void add_chunk(float *maximum, float *sum, float *all, float chunk_maximum, float chunk_sum, const float *chunk, int64_t stride) {
  const Meeting m = meet(maximum, sum, chunk_maximum, chunk_sum, exp(fall(*maximum, chunk_maximum)));
  for (int64_t d = 0; d < stride; d += 16) store(all + d, fma(load(chunk + d), set1(m.take), load(all + d) * set1(m.keep)));
}

void finish(float *out, const float *all, float sum, int64_t value_dim) {
  for (int64_t d = 0; d < value_dim; d += 16) store_some(out + d, load(all + d) / set1(sum), value_dim - d);
}

// Steps of int8 meet their scales when they have been summed; those of latents, which are always spread, when they are spread.
template <class Kv, bool Latent>
using SpreadOf = Spread<(Kv::kScaleBytes > 0 && !Latent), Kv::kRounded>;

// The same as pairs; what a pair lacks is zero.
template <class Kv, class To>
void spread_pairs(const Kept<Kv> &from, const To &to, int64_t first, int64_t end, int64_t token, int64_t tokens) {
  for (int64_t g = first; g < end; g++) {
    float *out = to.keys + g * to.key_steps() * 16;
    const auto *key = from.key(g);
    for (int64_t i = 0; i < from.key_steps(); i++, key += 32, out += 16) store(out, pair_beside(key));
    if (from.key_dim % 2) store(out, only(pair_beside(key), kFirst));
  }
  for (int64_t i = token / 2 * 2; i < tokens; i += 2) {
    const auto *value = from.value(i, 0), *next = value + from.value_dim;
    const bool sees = i >= token, sees_next = i + 1 < tokens;
    float *out = to.values + i * 8;
    for (int64_t d = 0; d < from.value_dim; d += 16, out += to.value_panel()) {
      const int64_t some = from.value_dim - d;
      store(out, some >= 16 && sees && sees_next ? pair_of(value + d, next + d) : value_pair(value + d, next + d, sees, sees_next, some));
    }
  }
}

// Keys of groups first..end-1 and values of tokens from..to-1 of a block as float32; values of a latent are its keys, turned.
template <class Kv, bool Latent>
void spread(const Kept<Kv> &from, const SpreadOf<Kv, Latent> &to, int64_t first, int64_t end, int64_t token, int64_t tokens) {
  if constexpr (Kept<Kv>::kInputs == 2) return spread_pairs(from, to, first, end, token, tokens);
  for (int64_t g = first; g < end; g++)
    for (int64_t i = 0; i < from.key_dim; i++) {
      f32x16 lanes = Kv::load(from.key(g) + i * 16);
      if constexpr (Latent && Kv::kScaleBytes > 0) lanes = lanes * from.scale(g, i >= from.value_dim);
      store(to.keys + (g * from.key_dim + i) * 16, lanes);
    }
  for (int64_t d = 0; d < from.value_dim; d += 16) {
    const int64_t some = min(16, from.value_dim - d);
    for (int64_t i = token; i < tokens; i++) {
      float lane[16] = {0}, *out = to.values + d * kKeyBlock + i * 16;
      const float *key = to.keys + (i / 16 * from.key_dim + d) * 16 + i % 16;
      const auto *value = from.value(i, d);
      if (!Latent && some == 16) {
        store(out, Kv::load(value));
        continue;
      }
      for (int64_t j = 0; j < some; j++) lane[j] = Latent ? key[j * 16] : Kv::decode(value[j]);
      store(out, load(lane));
    }
  }
}

// One block by vectors: few rows read it where it lies.
template <class Kv, bool Latent>
void attend_by_vectors(const Tile &t, const Kept<Kv> &kept, SpreadOf<Kv, Latent> copy, int64_t at, int64_t begin, int64_t end) {
  if (!Latent && end - begin <= kTileRows && kept.value_dim % 16 == 0) return attend_block(t, kept, at, begin, end, t.stride);
  const int64_t first = max(0, t.row[begin].first - at), seen = min(kKeyBlock, t.row[end - 1].position + 1 - at);
  copy.scales = kept.base - Kv::kScaleBytes;
  copy.next = copy.scales + kBlockGroups * kept.group_bytes, copy.next_groups = min(kBlockGroups, kept.groups_after);
  copy.next_bytes = Kv::kScaleBytes + 16 * (kept.key_dim + (Latent ? 0 : kept.value_dim)) * (int64_t)sizeof(typename Kv::Element);
  spread<Kv, Latent>(kept, copy, first / 16, (seen + 15) / 16, first, seen);
  attend_block(t, copy, at, begin, end, t.stride);
}

// Blocks from..to-1 (tokens) for the rows that see them, positions growing with the row. each(kept, at, begin, end): one of them.
template <class Kv, class Each>
void attend_blocks(const Tile &t, Kept<Kv> kept, int64_t from, int64_t to, const Each &each) {
  const uint8_t *base = kept.base;
  const int64_t last_group = (min(to, t.row[t.rows - 1].position + 1) - 1) / 16;
  for (int64_t at = from; at < to; at += kKeyBlock) {
    int64_t begin = 0, end = t.rows;
    while (begin < end && t.row[begin].position < at) begin++;
    while (end > begin && t.row[end - 1].first >= at + kKeyBlock) end--;
    if (begin == end) continue;
    kept.base = base + at / 16 * kept.group_bytes;
    kept.groups_after = last_group - at / 16 - kBlockGroups + 1;
    each(kept, at, begin, end);
  }
}

// The `rows` query rows of tile `tile` from row `begin` on, under KV head `head`; all chunks, or one that becomes a part.
template <class Kv, bool Latent>
void attend(const Call &c, const Step &s, int64_t tile, int64_t head, int64_t begin, int64_t rows, int64_t chunk, float *part,
            uint8_t *memory) {
  const int64_t q_heads = c.ints[kQHeads], share = q_heads / c.ints[kKvHeads], window = c.ints[kWindow];
  const int64_t key_dim = c.ints[kKeyDim], value_dim = c.ints[kValueDim], split = Latent ? value_dim : key_dim;
  constexpr int parts = kOnTiles<Kv, Latent>;
  [[maybe_unused]] AttendMemory on_tiles;
  Tile t;
  t.key_stride = padded(key_dim) / Kept<Kv>::kInputs, t.stride = padded(value_dim);
  t.rows = rows, t.softcap = c.floats[kSoftcap];
  t.row = (Row *)memory, t.query = nullptr;
  float *all;
  SpreadOf<Kv, Latent> copy;
  if constexpr (parts > 0) {
    t.held = (float *)on_tiles.place((uint8_t *)(t.row + kRows<Latent>), parts, key_dim, value_dim);
    t.score = on_tiles.score, all = t.held + kRows<Latent> * t.stride;
    begin_tiles(rows);
  } else {
    t.query = (float *)(t.row + kRows<Latent>);
    t.held = t.query + kRows<Latent> * t.key_stride;
    all = t.held + kRows<Latent> * t.stride;
    t.score = all + kRows<Latent> * t.stride;
    copy.keys = t.score + kRows<Latent> * kKeyBlock, copy.values = copy.keys + kKeyBlock * t.key_stride;
  }
  copy.key_dim = key_dim, copy.group_bytes = c.ints[kGroupBytes];
  Kept<Kv> kept;
  kept.base = (const uint8_t *)kv_group<Kv>(s.batch.seq_kv[s.tile_seq[tile]], place_of(c, Latent), head, 0);
  kept.group_bytes = c.ints[kGroupBytes], kept.key_dim = key_dim, kept.value_dim = value_dim;
  const float *sinks = Latent ? nullptr : c.arg<const float>(kSinks, s);
  const f32x16 scale = set1(c.floats[kScale]);
  // Of a query row in q and out, in heads.
  const auto place = [&](int64_t row) {
    return (s.tile_row[tile] + (begin + row) / share) * q_heads + head * share + (begin + row) % share;
  };
  for (int64_t r = 0; r < rows; r++) {
    const int64_t position = s.batch.positions[s.tile_row[tile] + (begin + r) / share];
    const float sink = sinks ? sinks[head * share + (begin + r) % share] : -INFINITY;
    t.row[r] = {position, window > 0 ? max(0, position - window + 1) : 0, 0, 0, 0, 0, sink, sinks ? 1.0f : 0.0f};
    const float *q = c.arg<const float>(kQ, s) + place(r) * split;
    if constexpr (parts > 0) split_query<parts>(q, split, scale, on_tiles, r, rows);
    float *query = t.query + r * t.key_stride;
    for (int64_t d = 0; d < split && parts == 0; d += 16) {
      const f32x16 scaled = load_some(q + d, split - d) * scale;
      if constexpr (Kept<Kv>::kInputs == 2) store_rounded(query + d / 2, scaled);
      else store_some(query + d, Kv::kRounded ? nearest_bf16(scaled) : scaled, split - d);
    }
    if constexpr (Latent) {
      const int64_t rest = key_dim - split;
      q = c.arg<const float>(kRopeQ, s) + place(r) * rest;
      for (int64_t d = 0; d < rest; d += 16) store_some(query + split + d, load_some(q + d, rest - d) * scale, rest - d);
    }
    for (int64_t d = 0; d < t.stride; d += 16) store(all + r * t.stride + d, zero());
  }
  const int64_t lowest = t.row[0].first / kKeyBlock * kKeyBlock, highest = t.row[rows - 1].position + 1;
  for (int64_t from = part ? chunk * kKeyChunk : lowest / kKeyChunk * kKeyChunk; from < highest; from += kKeyChunk) {
    const int64_t to = min(from + kKeyChunk, highest);
    for (int64_t r = 0; r < rows; r++) {
      t.row[r].maximum = -INFINITY, t.row[r].sum = 0;
      for (int64_t d = 0; d < t.stride; d += 16) store(t.held + r * t.stride + d, zero());
    }
    attend_blocks(t, kept, max(from, lowest), to, [&](const Kept<Kv> &block, int64_t at, int64_t begin, int64_t end) {
      if constexpr (parts > 0) attend_on_tiles(t, on_tiles, block, at, begin, end);
      else attend_by_vectors<Kv, Latent>(t, block, copy, at, begin, end);
    });
    for (int64_t r = 0; r < rows; r++) {
      Row &row = t.row[r];
      const float *held = t.held + r * t.stride;
      if (part) {
        float *of = part + (head * share + begin + r) * part_stride(c);
        for (int64_t d = 0; d < t.stride; d += 16) store(of + d, load(held + d));
        of[t.stride] = row.maximum, of[t.stride + 1] = row.sum;
      } else if (row.first < to && row.position >= from) {
        add_chunk(&row.all_maximum, &row.all_sum, all + r * t.stride, row.maximum, row.sum, held, t.stride);
      }
    }
    if (part) break;
  }
  if constexpr (parts > 0) end_tiles();
  for (int64_t r = 0; r < rows && !part; r++)
    finish(c.arg<float>(kOut, s) + place(r) * value_dim, all + r * t.stride, t.row[r].all_sum, value_dim);
}

template <class Kv, bool Latent>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *scratch) {
  const bool split = parts<Latent>(c, s) > 0;
  const int64_t of_tile = units_of_tile<Latent>(c, split ? 1 : xk::kQueryTile), share = c.ints[kQHeads] / c.ints[kKvHeads];
  const int64_t head = Latent ? 0 : unit % of_tile, first = Latent ? unit % of_tile * kRows<Latent> : 0;
  int64_t tile = s.tiles - 1 - unit / of_tile;  // the longest rows of a prompt first, for balance
  int64_t chunk = 0;
  float *part = nullptr;
  if (split) {
    int64_t left = unit / of_tile;
    part = c.arg<float>(kPartial, s) + left * c.ints[kQHeads] * part_stride(c);
    for (tile = 0; left >= chunks_of(c, s, tile).count; tile++) left -= chunks_of(c, s, tile).count;
    chunk = chunks_of(c, s, tile).first + left;
  }
  const int64_t all = s.tile_rows[tile] * share;
  for (int64_t begin = first; begin < all; begin += kRows<Latent>) {
    attend<Kv, Latent>(c, s, tile, head, begin, min(kRows<Latent>, all - begin), chunk, part, scratch);
    if (Latent) break;
  }
}

// ---- the second stage: a token's chunks, if they were units ----

template <bool Latent>
int64_t merge_units(const Call &c, const Step &s) {
  return parts<Latent>(c, s) ? 1 : 0;
}
int64_t merge_scratch(const Call &c) { return padded(c.ints[kValueDim]) * (int64_t)sizeof(float); }

template <bool Latent>
void run_merge(const Call &c, const Step &s, int64_t, uint8_t *scratch) {
  const int64_t q_heads = c.ints[kQHeads], value_dim = c.ints[kValueDim], stride = padded(value_dim);
  const float *sinks = Latent ? nullptr : c.arg<const float>(kSinks, s), *part = c.arg<const float>(kPartial, s);
  float *all = (float *)scratch;
  for (int64_t tile = 0; tile < s.tiles; tile++) {
    const int64_t count = chunks_of(c, s, tile).count;
    for (int64_t head = 0; head < q_heads; head++) {
      float maximum = sinks ? sinks[head] : -INFINITY, sum = sinks ? 1.0f : 0.0f;
      for (int64_t d = 0; d < stride; d += 16) store(all + d, zero());
      for (int64_t i = 0; i < count; i++) {
        const float *of = part + (i * q_heads + head) * part_stride(c);
        add_chunk(&maximum, &sum, all, of[stride], of[stride + 1], of, stride);
      }
      finish(c.arg<float>(kOut, s) + (s.tile_row[tile] * q_heads + head) * value_dim, all, sum, value_dim);
    }
    part += count * q_heads * part_stride(c);
  }
}

constexpr const char *kInts = "layer_offset group_bytes q_heads kv_heads key_dim value_dim window parts";
constexpr const char *kArgs = "q sinks? out scratch_parts", *kLatentArgs = "q_latent q_rope out scratch_parts";
constexpr const char *kFloats = "scale softcap";

template <bool Latent>
const Kernel merge = {"", "", "", "", nullptr, merge_scratch, merge_units<Latent>, run_merge<Latent>};

template <class Kv, bool Latent>
constexpr Kernel kernel(const char *name) {
  return {name, Latent ? kLatentArgs : kArgs, kInts, kFloats, check<Kv, Latent>, scratch<Kv, Latent>, units<Latent>, run<Kv, Latent>, &merge<Latent>};
}

}  // namespace

const Kernel attention_kernels[] = {
    kernel<Rounded<KvF32>, false>("attention_rounded.f32"),
    kernel<Rounded<KvBf16>, false>("attention_rounded.bf16"),
    kernel<Rounded<KvInt8>, false>("attention_rounded.i8"),
    kernel<KvF32, false>("attention.f32"),          kernel<KvF32, true>("latent_attention.f32"),
    kernel<KvBf16, false>("attention.bf16"),        kernel<KvBf16, true>("latent_attention.bf16"),
    kernel<KvInt8, false>("attention.i8"),          kernel<KvInt8, true>("latent_attention.i8"), {},
};

}  // namespace XK_LEVEL
