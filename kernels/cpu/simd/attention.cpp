// Causal attention over contiguous KV spans, grouped queries, optional window, soft-cap and sinks; values stored beside the keys, or
// (latent_attention) the first numbers of the keys, formed from them block by block. Keys are taken in blocks of
// kKeyBlock tokens at fixed absolute positions; each block gives a query row (maximum, sum, weighted values), merged into the row's
// running state in block order. What a row computes depends on its own position alone: not on the other rows of its tile, nor on
// how a prompt was cut. Values beyond a row's position or before its window are never used.
#include <math.h>

#include "common.h"
#include "kv.h"
#include "vmath.h"

namespace XK_LEVEL {
namespace {

enum { kQ, kSinks, kOut };               // attention
enum { kLatentQ, kRopeQ, kLatentOut };   // latent_attention
enum { kLayerOffset, kGroupBytes, kQHeads, kKvHeads, kKeyDim, kValueDim, kWindow };
enum { kScale, kSoftcap };

constexpr int kBlockGroups = kKeyBlock / 16;

KvPlace place_of(const Call &c, bool latent) {
  return {c.ints[kLayerOffset], c.ints[kGroupBytes], c.ints[kKvHeads], c.ints[kKeyDim], latent ? 0 : c.ints[kValueDim]};
}

template <class Kv, bool Latent>
const char *check(const Call &c) {
  if (!c.every_token()) return "attends for every token of the step: rows must be T";
  if (c.ints[kWindow] < 0) return "window must be 0 (none) or positive";
  if (!(c.floats[kSoftcap] >= 0)) return "softcap must be 0 (none) or positive";
  if (const char *wrong = check_kv<Kv>(place_of(c, Latent))) return wrong;
  if (c.ints[kValueDim] < 1) return "value_dim must be positive";
  if (Latent && c.ints[kKvHeads] != 1) return "latent keys have one head";
  if (Latent && c.ints[kValueDim] >= c.ints[kKeyDim]) return "latent values must be shorter than their keys";
  if (c.ints[kQHeads] < 1 || c.ints[kQHeads] % c.ints[kKvHeads]) return "q_heads must be a positive multiple of kv_heads";
  return nullptr;
}

int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

struct State {  // of one query row
  float maximum, sum;
  int64_t position, first;  // it sees tokens first..position
};

// Query rows (token x head) that share one pass over the keys. Forming values is work of its own: more rows share it.
template <bool Latent>
constexpr int64_t kRows = Latent ? 2 * kQueryRows : kQueryRows;

// Scratch of a thread: the rows' states, queries, running sums, block sums and scores; the values of a block, if formed.
template <bool Latent>
int64_t scratch(const Call &c) {
  const int64_t key = padded(c.ints[kKeyDim]), value = padded(c.ints[kValueDim]);
  const int64_t formed = Latent ? kKeyBlock * value : 0;
  return kRows<Latent> * (int64_t)sizeof(State) + (kRows<Latent> * (key + 2 * value + kKeyBlock) + formed) * (int64_t)sizeof(float);
}

// A unit is a tile of tokens under one KV head; of the many heads on a latent, as many as share a pass.
template <bool Latent>
int64_t units_of_tile(const Call &c) {
  return Latent ? (xk::kQueryTile * c.ints[kQHeads] + kRows<true> - 1) / kRows<true> : c.ints[kKvHeads];
}
template <bool Latent>
int64_t units(const Call &c, const Step &s) {
  return s.tiles * units_of_tile<Latent>(c);
}

template <class Kv>
struct Head {  // one KV head of one sequence in one layer
  using Element = typename Kv::Element;
  const uint8_t *base;
  int64_t group_bytes, key_dim;
  int64_t key_bytes() const { return key_dim * 16 * (int64_t)sizeof(Element); }  // of a group
  const uint8_t *keys(int64_t token) const { return base + token / 16 * group_bytes; }
};

template <class Kv>
struct StoredValues {
  using Element = typename Kv::Element;
  using Decode = Kv;
  static constexpr bool kFormed = false;
  Head<Kv> head;
  int64_t dim;
  // Meanwhile the keys of the next block are fetched, as its values are while those keys are read: runs of a few KB at far apart
  // addresses are too short for the prefetchers of the hardware.
  int64_t ahead() const { return kBlockGroups * head.group_bytes - head.key_bytes(); }
  int64_t stride() const { return dim; }
  const Element *at(int64_t token, int64_t) const {
    return (const Element *)head.keys(token) + 16 * head.key_dim + token % 16 * dim;
  }
};

struct FormedValues {  // of the tokens of one block
  using Element = float;
  using Decode = KvF32;
  static constexpr bool kFormed = true;
  float *first;
  int64_t dim;
  int64_t ahead() const { return 0; }
  int64_t stride() const { return padded(dim); }
  const float *at(int64_t token, int64_t block) const { return first + (token - block) * padded(dim); }
};

// The first value_dim numbers of the keys of `groups` groups from `block` on, token by token.
template <class Kv>
void form_values(const Head<Kv> &head, const FormedValues &values, int64_t block, int64_t groups) {
  float square[16][16];
  for (int64_t g = 0; g < groups; g++) {
    const typename Kv::Element *keys = (const typename Kv::Element *)head.keys(block + g * 16);
    float *to = values.first + g * 16 * values.stride();
    for (int64_t d = 0; d < values.dim; d += 16) {
      const int64_t some = min(16, values.dim - d);
      for (int64_t i = 0; i < some; i++) store(square[i], Kv::load(keys + (d + i) * 16));
      for (int64_t token = 0; token < 16; token++)
        for (int64_t i = 0; i < some; i++) to[token * values.stride() + d + i] = square[i][token];
    }
  }
}

// sums[R][C*16] += sum over tokens first..end-1, in order, of weight[row][token] * value[token][d..d+C*16)
template <class Values, int R, int C>
void add_values(const Values &values, const float *weights, int64_t block, int64_t first, int64_t end, int64_t d, float *sums,
                int64_t stride) {
  const int64_t ahead = values.ahead(), step = values.stride();
  f32x16 acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) acc[r][c] = load(sums + r * stride + d + c * 16);
  for (int64_t token = first; token < end;) {
    const int64_t stop = min(end, token / 16 * 16 + 16);
    const typename Values::Element *value = values.at(token, block) + d;
    const float *weight = weights + token - block;
    for (; token < stop; token++, value += step, weight++) {
      f32x16 column[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        column[c] = Values::Decode::load(value + c * 16);
        if constexpr (R <= kFewRows) __builtin_prefetch((const uint8_t *)(value + c * 16) + ahead, 0, 2);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const f32x16 w = set1(weight[r * kKeyBlock]);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = fma(w, column[c], acc[r][c]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) store(sums + r * stride + d + c * 16, acc[r][c]);
}

// The dims past the last whole sixteen: lane by lane, the same chain.
template <class Values>
void add_value_tail(const Values &values, const float *weights, int64_t block, int64_t first, int64_t end, int64_t d, float *sums) {
  for (int64_t token = first; token < end; token++) {
    float lane[16] = {0};
    for (int64_t i = d; i < values.dim; i++) lane[i - d] = Values::Decode::decode(values.at(token, block)[i]);
    store(sums + d, fma(set1(weights[token - block]), load(lane), load(sums + d)));
  }
}

template <class Values, int R>
void add_values_rows(const Values &values, const float *weights, int64_t block, int64_t first, int64_t end, float *sums,
                     int64_t stride) {
  constexpr int wide = tile_panels(R);
  int64_t d = 0;
  for (; d + 16 * wide <= values.dim; d += 16 * wide)
    add_values<Values, R, wide>(values, weights, block, first, end, d, sums, stride);
  for (; d + 16 <= values.dim; d += 16) add_values<Values, R, 1>(values, weights, block, first, end, d, sums, stride);
  if (d < values.dim)
    for (int r = 0; r < R; r++) add_value_tail(values, weights + r * kKeyBlock, block, first, end, d, sums + r * stride);
}

template <class Values, int R = kTileRows>
void add_values_few(const Values &values, int rows, const float *weights, int64_t block, int64_t first, int64_t end, float *sums,
                    int64_t stride) {
  if (rows == R) return add_values_rows<Values, R>(values, weights, block, first, end, sums, stride);
  if constexpr (R > 1) add_values_few<Values, R - 1>(values, rows, weights, block, first, end, sums, stride);
}

// Scores of one row become weights exp(score - block maximum), zero outside the tokens it sees; its block maximum and sum.
void soften(float *score, int64_t block, const State &row, float softcap, float *maximum, float *sum) {
  const f32x16 lowest = set1(-INFINITY), first = set1((float)(row.first - block)), last = set1((float)(row.position - block));
  const bool whole = row.first <= block && row.position >= block + kKeyBlock - 1;
  f32x16 index = lane_index(), value[kBlockGroups], top = lowest;
#pragma GCC unroll 4
  for (int g = 0; g < kBlockGroups; g++, index = index + set1(16.0f)) {
    value[g] = load(score + g * 16);
    if (softcap > 0) value[g] = set1(softcap) * tanh(value[g] / set1(softcap));
    if (!whole) value[g] = select_less(index, first, lowest, select_less(last, index, lowest, value[g]));
    top = max(value[g], top);
  }
  *maximum = reduce_max(top);
  const f32x16 m = set1(*maximum);
  f32x16 total = zero();
#pragma GCC unroll 4
  for (int g = 0; g < kBlockGroups; g++) {
    const f32x16 weight = exp(value[g] - m);
    store(score + g * 16, weight);
    total = total + weight;
  }
  *sum = reduce_add(total);
}

// running = running * exp(old - new) + block * exp(block maximum - new)
void merge(State *row, float maximum, float sum, float *running, const float *block, int64_t dim) {
  // One of the two factors is exp(0) = 1.
  const bool grows = row->maximum < maximum;
  const float factor = exp(grows ? row->maximum - maximum : maximum - row->maximum);
  const float keep = grows ? factor : 1.0f, take = grows ? 1.0f : factor;
  if (grows) row->maximum = maximum;
  row->sum = row->sum * keep + sum * take;
  for (int64_t d = 0; d < dim; d += 16) store(running + d, fma(load(block + d), set1(take), load(running + d) * set1(keep)));
}

template <class Kv, class Values>
struct Tile {
  Head<Kv> head;
  Values values;
  State *state;
  float *query, *running, *partial, *score;
  int64_t rows, key_stride, stride;  // of a query row; of its sums
  float softcap;
};

// One key block for the rows begin..end-1, which all see at least one of its tokens.
template <class Kv, class Values>
void attend_rows(const Tile<Kv, Values> &t, int64_t block, int64_t begin, int64_t end) {
  const int64_t highest = min(t.state[end - 1].position, block + kKeyBlock - 1), groups = (highest - block) / 16 + 1;
  float maximum[kTileRows], sum[kTileRows], *partial = t.partial + begin * t.stride, *score = t.score + begin * kKeyBlock;
  const int rows = (int)(end - begin);
  product_few<typename Kv::Keys>({t.query + begin * t.key_stride, t.key_stride, t.head.keys(block), t.head.group_bytes,
                                  t.head.key_dim, score, kKeyBlock, 16, false, t.head.key_bytes()},
                                 rows, groups);
  int64_t common_first = block, common_end = block + kKeyBlock;
  for (int r = 0; r < rows; r++) {
    const State &row = t.state[begin + r];
    soften(score + r * kKeyBlock, block, row, t.softcap, maximum + r, sum + r);
    common_first = max(common_first, row.first);
    common_end = min(common_end, row.position + 1);
    for (int64_t d = 0; d < t.stride; d += 16) store(partial + r * t.stride + d, zero());
  }
  // Tokens that every row sees go together; those that only some see, row by row, in the same order.
  const auto alone = [&](int r, int64_t from, int64_t to) {
    if (from < to)
      add_values_rows<Values, 1>(t.values, score + r * kKeyBlock, block, from, to, partial + r * t.stride, t.stride);
  };
  const bool together = common_first < common_end;
  for (int r = 0; r < rows; r++) {
    const State &row = t.state[begin + r];
    const int64_t from = max(block, row.first), to = min(block + kKeyBlock, row.position + 1);
    alone(r, from, together ? common_first : to);
  }
  if (together) {
    add_values_few<Values>(t.values, rows, score, block, common_first, common_end, partial, t.stride);
    for (int r = 0; r < rows; r++) alone(r, common_end, min(block + kKeyBlock, t.state[begin + r].position + 1));
  }
  for (int r = 0; r < rows; r++)
    merge(t.state + begin + r, maximum[r], sum[r], t.running + (begin + r) * t.stride, partial + r * t.stride, t.stride);
}

// Positions grow with the row, so the rows that see a block are consecutive.
template <class Kv, class Values>
void attend_block(const Tile<Kv, Values> &t, int64_t block) {
  int64_t begin = 0, end = t.rows;
  while (begin < end && t.state[begin].position < block) begin++;
  while (end > begin && t.state[end - 1].first >= block + kKeyBlock) end--;
  const int64_t rows = end - begin, tiles = (rows + kTileRows - 1) / kTileRows;
  if constexpr (Values::kFormed)
    if (rows) form_values(t.head, t.values, block, min(kBlockGroups, (t.state[end - 1].position - block) / 16 + 1));
  for (int64_t i = 0; i < tiles; i++) attend_rows(t, block, begin + rows * i / tiles, begin + rows * (i + 1) / tiles);
}

// The `rows` query rows of tile `tile` from row `begin` on, under KV head `head`.
template <class Kv, class Values>
void attend(const Call &c, const Step &s, Tile<Kv, Values> &t, int64_t tile, int64_t head, int64_t begin) {
  constexpr bool latent = Values::kFormed;
  const int64_t q_heads = c.ints[kQHeads], share = q_heads / c.ints[kKvHeads], window = c.ints[kWindow];
  const int64_t key_dim = c.ints[kKeyDim], value_dim = c.ints[kValueDim], split = latent ? value_dim : key_dim;
  const float *sinks = latent ? nullptr : c.arg<const float>(kSinks, s);
  const f32x16 scale = set1(c.floats[kScale]);
  // Of a query row in q and out, in heads.
  const auto place = [&](int64_t row) {
    return (s.tile_row[tile] + (begin + row) / share) * q_heads + head * share + (begin + row) % share;
  };
  for (int64_t r = 0; r < t.rows; r++) {
    const int64_t position = s.batch.positions[s.tile_row[tile] + (begin + r) / share];
    const float sink = sinks ? sinks[head * share + (begin + r) % share] : -INFINITY;
    t.state[r] = {sink, sinks ? 1.0f : 0.0f, position, window > 0 ? max(0, position - window + 1) : 0};
    const float *q = c.arg<const float>(latent ? kLatentQ : kQ, s) + place(r) * split;
    float *query = t.query + r * t.key_stride, *running = t.running + r * t.stride;
    for (int64_t d = 0; d < split; d += 16) store_some(query + d, load_some(q + d, split - d) * scale, split - d);
    if constexpr (latent) {
      const int64_t rest = key_dim - split;
      q = c.arg<const float>(kRopeQ, s) + place(r) * rest;
      for (int64_t d = 0; d < rest; d += 16) store_some(query + split + d, load_some(q + d, rest - d) * scale, rest - d);
    }
    for (int64_t d = 0; d < t.stride; d += 16) store(running + d, zero());
  }
  for (int64_t block = t.state[0].first / kKeyBlock * kKeyBlock; block <= t.state[t.rows - 1].position; block += kKeyBlock)
    attend_block(t, block);
  for (int64_t r = 0; r < t.rows; r++) {
    float *out = c.arg<float>(latent ? kLatentOut : kOut, s) + place(r) * value_dim;
    const f32x16 sum = set1(t.state[r].sum);
    for (int64_t d = 0; d < value_dim; d += 16) store_some(out + d, load(t.running + r * t.stride + d) / sum, value_dim - d);
  }
}

template <bool First, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

template <class Kv, bool Latent>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *scratch) {
  constexpr int64_t most = kRows<Latent>;
  const int64_t of_tile = units_of_tile<Latent>(c), part = unit % of_tile, share = c.ints[kQHeads] / c.ints[kKvHeads];
  const int64_t tile = s.tiles - 1 - unit / of_tile;  // the longest rows of a prompt first, for balance
  const int64_t head = Latent ? 0 : part;
  uint8_t *span = s.batch.seq_kv[s.tile_seq[tile]];
  const uint8_t *base = (const uint8_t *)kv_group<Kv>(span, place_of(c, Latent), head, 0);
  using Values = typename Choose<Latent, FormedValues, StoredValues<Kv>>::Type;
  Tile<Kv, Values> t;
  t.head = {base, c.ints[kGroupBytes], c.ints[kKeyDim]};
  t.key_stride = padded(c.ints[kKeyDim]);
  t.stride = padded(c.ints[kValueDim]);
  t.softcap = c.floats[kSoftcap];
  t.state = (State *)scratch;
  t.query = (float *)(t.state + most);
  t.running = t.query + most * t.key_stride;
  t.partial = t.running + most * t.stride;
  t.score = t.partial + most * t.stride;
  if constexpr (Latent) t.values = {t.score + most * kKeyBlock, c.ints[kValueDim]};
  else t.values = {t.head, c.ints[kValueDim]};
  const int64_t all = s.tile_rows[tile] * share;
  for (int64_t begin = Latent ? part * most : 0; begin < all; begin += most) {
    t.rows = min(most, all - begin);
    attend(c, s, t, tile, head, begin);
    if (Latent) break;
  }
}

constexpr const char *kInts = "layer_offset group_bytes q_heads kv_heads key_dim value_dim window";
constexpr const char *kArgs = "q sinks? out", *kLatentArgs = "q_latent q_rope out", *kFloats = "scale softcap";

template <class Kv, bool Latent>
constexpr Kernel kernel(const char *name) {
  return {name, Latent ? kLatentArgs : kArgs, kInts, kFloats, check<Kv, Latent>, scratch<Latent>, units<Latent>, run<Kv, Latent>};
}

}  // namespace

const Kernel attention_kernels[] = {
    kernel<KvF32, false>("attention.f32"),        kernel<KvBf16, false>("attention.bf16"),
    kernel<KvF32, true>("latent_attention.f32"), kernel<KvBf16, true>("latent_attention.bf16"), {},
};

}  // namespace XK_LEVEL
