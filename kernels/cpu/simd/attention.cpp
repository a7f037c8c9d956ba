// Causal attention over contiguous KV spans, grouped queries, optional window, soft-cap and sinks. Keys are taken in blocks of
// kKeyBlock tokens at fixed absolute positions; each block gives a query row (maximum, sum, weighted values), merged into the row's
// running state in block order. What a row computes depends on its own position alone: not on the other rows of its tile, nor on
// how a prompt was cut. Values beyond a row's position or before its window are never used.
#include <math.h>

#include "common.h"
#include "kv.h"
#include "vmath.h"

namespace XK_LEVEL {
namespace {

enum { kQ, kSinks, kOut };
enum { kLayerOffset, kGroupBytes, kQHeads, kKvHeads, kHeadDim, kWindow };
enum { kScale, kSoftcap };

constexpr int kBlockGroups = kKeyBlock / 16;

template <class Kv>
const char *check(const Call &c) {
  if (!c.every_token()) return "attends for every token of the step: rows must be T";
  if (c.ints[kWindow] < 0) return "window must be 0 (none) or positive";
  if (!(c.floats[kSoftcap] >= 0)) return "softcap must be 0 (none) or positive";
  if (const char *wrong =
          check_kv(c.ints[kLayerOffset], c.ints[kGroupBytes], c.ints[kKvHeads], c.ints[kHeadDim], sizeof(typename Kv::Element)))
    return wrong;
  if (c.ints[kQHeads] < 1 || c.ints[kQHeads] % c.ints[kKvHeads]) return "q_heads must be a positive multiple of kv_heads";
  return nullptr;
}

int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

struct State {  // of one query row
  float maximum, sum;
  int64_t position, first;  // it sees tokens first..position
};

// Scratch of a thread: the rows' states, queries, running sums, block sums and scores.
int64_t scratch(const Call &c) {
  return kQueryRows * (int64_t)(sizeof(State) + sizeof(float) * (size_t)(3 * padded(c.ints[kHeadDim]) + kKeyBlock));
}

int64_t units(const Call &c, const Step &s) { return s.tiles * c.ints[kKvHeads]; }

template <class Kv>
struct Head {  // one KV head of one sequence in one layer
  const uint8_t *base;
  int64_t group_bytes, dim;
  int64_t run_bytes() const { return dim * 16 * (int64_t)sizeof(typename Kv::Element); }  // of a group's keys, or its values
  const uint8_t *keys(int64_t token) const { return base + token / 16 * group_bytes; }
  const typename Kv::Element *value(int64_t token) const {
    return (const typename Kv::Element *)keys(token) + (16 + token % 16) * dim;
  }
};

// sums[R][C*16] += sum over tokens first..end-1, in order, of weight[row][token] * value[token][d..d+C*16)
template <class Kv, int R, int C>
void add_values(const Head<Kv> &head, const float *weights, int64_t block, int64_t first, int64_t end, int64_t d, float *sums,
                int64_t stride) {
  // Meanwhile the keys of the next block are fetched, as its values are while those keys are read: runs of a few KB at far apart
  // addresses are too short for the prefetchers of the hardware.
  const int64_t ahead = kBlockGroups * head.group_bytes - head.run_bytes();
  f32x16 acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) acc[r][c] = load(sums + r * stride + d + c * 16);
  for (int64_t token = first; token < end;) {
    const int64_t stop = min(end, token / 16 * 16 + 16);
    const typename Kv::Element *value = head.value(token) + d;
    const float *weight = weights + token - block;
    for (; token < stop; token++, value += head.dim, weight++) {
      f32x16 column[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        column[c] = Kv::load(value + c * 16);
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
template <class Kv>
void add_value_tail(const Head<Kv> &head, const float *weights, int64_t block, int64_t first, int64_t end, int64_t d, float *sums) {
  for (int64_t token = first; token < end; token++) {
    float lane[16] = {0};
    for (int64_t i = d; i < head.dim; i++) lane[i - d] = Kv::decode(head.value(token)[i]);
    store(sums + d, fma(set1(weights[token - block]), load(lane), load(sums + d)));
  }
}

template <class Kv, int R>
void add_values_rows(const Head<Kv> &head, const float *weights, int64_t block, int64_t first, int64_t end, float *sums,
                     int64_t stride) {
  constexpr int wide = tile_panels(R);
  int64_t d = 0;
  for (; d + 16 * wide <= head.dim; d += 16 * wide)
    add_values<Kv, R, wide>(head, weights, block, first, end, d, sums, stride);
  for (; d + 16 <= head.dim; d += 16) add_values<Kv, R, 1>(head, weights, block, first, end, d, sums, stride);
  if (d < head.dim)
    for (int r = 0; r < R; r++) add_value_tail<Kv>(head, weights + r * kKeyBlock, block, first, end, d, sums + r * stride);
}

template <class Kv, int R = kTileRows>
void add_values_few(const Head<Kv> &head, int rows, const float *weights, int64_t block, int64_t first, int64_t end, float *sums,
                    int64_t stride) {
  if (rows == R) return add_values_rows<Kv, R>(head, weights, block, first, end, sums, stride);
  if constexpr (R > 1) add_values_few<Kv, R - 1>(head, rows, weights, block, first, end, sums, stride);
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

template <class Kv>
struct Tile {
  Head<Kv> head;
  State *state;
  float *query, *running, *partial, *score;
  int64_t rows, stride;
  float softcap;
};

// One key block for the rows begin..end-1, which all see at least one of its tokens.
template <class Kv>
void attend_rows(const Tile<Kv> &t, int64_t block, int64_t begin, int64_t end) {
  const int64_t highest = min(t.state[end - 1].position, block + kKeyBlock - 1), groups = (highest - block) / 16 + 1;
  float maximum[kTileRows], sum[kTileRows], *partial = t.partial + begin * t.stride, *score = t.score + begin * kKeyBlock;
  const int rows = (int)(end - begin);
  product_few<typename Kv::Keys>({t.query + begin * t.stride, t.stride, t.head.keys(block), t.head.group_bytes, t.head.dim, score,
                                  kKeyBlock, 16, false, t.head.run_bytes()},
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
      add_values_rows<Kv, 1>(t.head, score + r * kKeyBlock, block, from, to, partial + r * t.stride, t.stride);
  };
  const bool together = common_first < common_end;
  for (int r = 0; r < rows; r++) {
    const State &row = t.state[begin + r];
    const int64_t from = max(block, row.first), to = min(block + kKeyBlock, row.position + 1);
    alone(r, from, together ? common_first : to);
  }
  if (together) {
    add_values_few<Kv>(t.head, rows, score, block, common_first, common_end, partial, t.stride);
    for (int r = 0; r < rows; r++) alone(r, common_end, min(block + kKeyBlock, t.state[begin + r].position + 1));
  }
  for (int r = 0; r < rows; r++)
    merge(t.state + begin + r, maximum[r], sum[r], t.running + (begin + r) * t.stride, partial + r * t.stride, t.stride);
}

// Positions grow with the row, so the rows that see a block are consecutive.
template <class Kv>
void attend_block(const Tile<Kv> &t, int64_t block) {
  int64_t begin = 0, end = t.rows;
  while (begin < end && t.state[begin].position < block) begin++;
  while (end > begin && t.state[end - 1].first >= block + kKeyBlock) end--;
  const int64_t rows = end - begin, tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; i++) attend_rows(t, block, begin + rows * i / tiles, begin + rows * (i + 1) / tiles);
}

template <class Kv>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *scratch) {
  const int64_t kv_heads = c.ints[kKvHeads], q_heads = c.ints[kQHeads], dim = c.ints[kHeadDim], share = q_heads / kv_heads;
  const int64_t window = c.ints[kWindow], stride = padded(dim), head = unit % kv_heads;
  const int64_t tile = s.tiles - 1 - unit / kv_heads;  // the longest rows of a prompt first, for balance
  const float *sinks = c.arg<const float>(kSinks, s);
  const uint8_t *base = s.batch.seq_kv[s.tile_seq[tile]] + c.ints[kLayerOffset];
  Tile<Kv> t;
  t.head = {base + head * dim * 32 * (int64_t)sizeof(typename Kv::Element), c.ints[kGroupBytes], dim};
  t.state = (State *)scratch;
  t.query = (float *)(t.state + kQueryRows);
  t.running = t.query + kQueryRows * stride;
  t.partial = t.running + kQueryRows * stride;
  t.score = t.partial + kQueryRows * stride;
  t.stride = stride;
  t.softcap = c.floats[kSoftcap];
  const int64_t all = s.tile_rows[tile] * share;
  for (int64_t begin = 0; begin < all; begin += kQueryRows) {
    t.rows = min(kQueryRows, all - begin);
    const auto offset = [&](int64_t row) {  // of a query row in q and out
      return ((s.tile_row[tile] + (begin + row) / share) * q_heads + head * share + (begin + row) % share) * dim;
    };
    for (int64_t r = 0; r < t.rows; r++) {
      const int64_t position = s.batch.positions[s.tile_row[tile] + (begin + r) / share];
      const float sink = sinks ? sinks[head * share + (begin + r) % share] : -INFINITY;
      t.state[r] = {sink, sinks ? 1.0f : 0.0f, position, window > 0 ? max(0, position - window + 1) : 0};
      const float *q = c.arg<const float>(kQ, s) + offset(r);
      for (int64_t d = 0; d < dim; d += 16) {
        store(t.query + r * stride + d, load_some(q + d, dim - d) * set1(c.floats[kScale]));
        store(t.running + r * stride + d, zero());
      }
    }
    for (int64_t block = t.state[0].first / kKeyBlock * kKeyBlock; block <= t.state[t.rows - 1].position; block += kKeyBlock)
      attend_block(t, block);
    for (int64_t r = 0; r < t.rows; r++) {
      float *out = c.arg<float>(kOut, s) + offset(r);
      const f32x16 sum = set1(t.state[r].sum);
      for (int64_t d = 0; d < dim; d += 16) store_some(out + d, load(t.running + r * stride + d) / sum, dim - d);
    }
  }
}

constexpr const char *kInts = "layer_offset group_bytes q_heads kv_heads head_dim window";

}  // namespace

const Kernel attention_kernels[] = {
    {"attention.f32", "q sinks? out", kInts, "scale softcap", check<KvF32>, scratch, units, run<KvF32>},
    {"attention.bf16", "q sinks? out", kInts, "scale softcap", check<KvBf16>, scratch, units, run<KvBf16>},
    {},
};

}  // namespace XK_LEVEL
