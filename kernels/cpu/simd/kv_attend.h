// Query rows (token x head) of one KV head against one block of its keys and values. A block gives each row that sees it a maximum, a
// sum and weighted values, which are merged into what the row holds: chains along the key's dims and along the tokens, whatever
// the other rows are and wherever the block is read from. A step of a chain is one input, or a pair of them (kv_pairs.h).
#pragma once
#include <math.h>

#include "common.h"
#include "kv.h"
#include "kv_pairs.h"
#include "panel.h"
#include "vmath.h"

namespace XK_LEVEL {

struct Row {
  int64_t position, first;  // it sees tokens first..position
  float maximum, sum;       // of the blocks of this chunk so far
  float keep, take;         // factors of what it holds and of the block at hand
  float all_maximum, all_sum;
};

template <class Kv>
struct Kept {  // a block where it lies, for few rows
  using Decode = Kv;
  using Element = typename Kv::Element;
  static constexpr bool kFetch = true, kScaled = Kv::kScaleBytes > 0, kRounded = Kv::kRounded;
  static constexpr int64_t kInputs = kRounded && kMultipliesPairs ? 2 : 1, kKeyStep = 16 * kInputs;  // of a step; elements of one
  const uint8_t *base;  // keys of the head in the block's first group
  int64_t group_bytes, key_dim, value_dim, groups_after;  // groups behind this block that will be read

  int64_t key_bytes() const { return key_dim * 16 * (int64_t)sizeof(Element); }
  const Element *key(int64_t group) const { return (const Element *)(base + group * group_bytes); }
  // What a step of each key of a group is worth, or of each value.
  f32x16 scale(int64_t group, bool value) const { return load(base + group * group_bytes - Kv::kScaleBytes + value * 64); }
  const Element *value(int64_t token, int64_t d) const { return key(token / 16) + 16 * key_dim + token % 16 * value_dim + d; }
  int64_t key_steps() const { return key_dim / kInputs; }  // whole ones
  int64_t value_step() const { return value_dim * kInputs; }
  int64_t value_panel() const { return 16; }
  template <bool Value>
  __attribute__((always_inline)) f32x16 step(const Element *at) const {
    if constexpr (kInputs == 1) return Kv::load_apart(at);
    else return Value ? pair_of(at, at + value_dim) : pair_beside(at);
  }
  // Runs of a few KB at far apart addresses are too short for the prefetchers of the hardware: with the keys of a group its values
  // are fetched, and with the values of a block, line by line, the keys of the next. Beyond the last block there may be no memory,
  // and a fetch that finds none costs a walk of the page tables each time.
  int64_t after_key() const { return key_bytes(); }
  void fetch_scales() const {
    for (int64_t g = kBlockGroups; g < kBlockGroups + min(kBlockGroups, groups_after); g++)
      for (int64_t at = 0; at < Kv::kScaleBytes; at += 64) __builtin_prefetch(base + g * group_bytes - Kv::kScaleBytes + at, 0, 2);
  }
  const uint8_t *after_value(int64_t sixteen_lines) const {
    const int64_t each = max(1, key_bytes() / 1024), group = sixteen_lines / each;
    return group < min(kBlockGroups, groups_after) ? base + (kBlockGroups + group) * group_bytes + sixteen_lines % each * 1024 : nullptr;
  }
};

template <bool Scaled, bool Rounds = false>
struct Spread {  // a block brought into float32 or pairs: keys [groups][key steps][16], values [value panels][value steps][16]
  using Decode = KvF32;
  using Element = float;
  // Scaled: the numbers are steps, as they were. Rounds: weights are to be rounded.
  static constexpr bool kFetch = false, kScaled = Scaled, kRounded = Rounds;
  static constexpr int64_t kInputs = Rounds && kMultipliesPairs ? 2 : 1, kKeyStep = 16, kValueSteps = kKeyBlock / kInputs;
  float *keys, *values;
  int64_t key_dim;
  const uint8_t *scales;
  int64_t group_bytes;
  const uint8_t *next;  // groups of the block that comes, fetched while this one is scored
  int64_t next_groups, next_bytes;

  int64_t key_steps() const { return (key_dim + kInputs - 1) / kInputs; }
  const float *key(int64_t group) const { return keys + group * 16 * key_steps(); }
  f32x16 scale(int64_t group, bool value) const { return load(scales + group * group_bytes + value * 64); }
  const float *value(int64_t token, int64_t d) const { return values + d * kValueSteps + token / kInputs * 16; }
  int64_t value_step() const { return 16; }
  int64_t value_panel() const { return 16 * kValueSteps; }
  template <bool>
  __attribute__((always_inline)) f32x16 step(const float *at) const { return load(at); }
  void fetch(int64_t from, int64_t to, int64_t all) const {  // as much of it as some of the rows are of all
    for (int64_t g = 0; g < next_groups; g++)
      for (int64_t at = next_bytes * from / all / 64 * 64; at < next_bytes * to / all; at += 64)
        __builtin_prefetch(next + g * group_bytes + at, 0, 2);
  }
  int64_t after_key() const { return 0; }
  const uint8_t *after_value(int64_t) const { return nullptr; }
};

struct Tile {
  Row *row;
  float *query, *held, *score;              // [rows][key_stride], [rows][stride], [rows][kKeyBlock]; of pairs, two to a float
  int64_t rows, key_stride, stride;
  float softcap;
};

// acc[r][p] += x[r * x_stride] * column p; of pairs, maybe only a half.
template <bool Value, class Block, int R, int P, class Part = Both>
XK_INLINE void multiply_add(f32x16 (&acc)[R][P], const Block &block, const typename Block::Element *const (&at)[P], int64_t offset,
                            const float *x, int64_t x_stride, Part part = kBoth) {
  using Chain = Chained<Block::kInputs == 2>;
  f32x16 column[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) column[p] = only(block.template step<Value>(at[p] + offset), part);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const f32x16 b = Chain::spread(x + r * x_stride);
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) acc[r][p] = Chain::add(acc[r][p], b, column[p]);
  }
}

// Scores of R rows against P groups.
template <class Block, int R, int P>
void score_tile(const Tile &t, const Block &block, int64_t begin, int64_t group) {
  constexpr int64_t step_bytes = Block::kKeyStep * sizeof(typename Block::Element), per_line = step_bytes < 64 ? 64 / step_bytes : 1;
  f32x16 acc[R][P];
  const typename Block::Element *at[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) at[p] = block.key(group + p);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) acc[r][p] = zero();
  const float *x = t.query + begin * t.key_stride;
  const int64_t steps = block.key_steps(), x_stride = t.key_stride, ahead = block.after_key();
  int64_t i = 0;
  for (; i + per_line <= steps; i += per_line) {
    if constexpr (Block::kFetch)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++)
#pragma GCC unroll 2
        for (int64_t line = 0; line < per_line * step_bytes; line += 64)
          __builtin_prefetch((const uint8_t *)(at[p] + i * Block::kKeyStep) + ahead + line, 0, 2);
#pragma GCC unroll 2
    for (int64_t j = 0; j < per_line; j++) multiply_add<false, Block, R, P>(acc, block, at, (i + j) * Block::kKeyStep, x + i + j, x_stride);
  }
  for (; i < steps; i++) multiply_add<false, Block, R, P>(acc, block, at, i * Block::kKeyStep, x + i, x_stride);
  if constexpr (Block::kInputs == 2 && Block::kFetch)  // behind the last dim lie values
    if (block.key_dim % 2) multiply_add<false, Block, R, P>(acc, block, at, i * Block::kKeyStep, x + i, x_stride, kFirst);
  f32x16 scale[P];
  if constexpr (Block::kScaled)
    for (int p = 0; p < P; p++) scale[p] = block.scale(group + p, false);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      const f32x16 score = Block::Decode::weave(acc[r][p]);
      store(t.score + (begin + r) * kKeyBlock + (group + p) * 16, Block::kScaled ? score * scale[p] : score);
    }
}

template <class Block, int R = kTileRows>
void score_few(const Tile &t, const Block &block, int64_t begin, int rows, int64_t group, int64_t end) {
  if (rows == R) {
    constexpr int wide = tile_panels(R);
    for (; group + wide <= end; group += wide) score_tile<Block, R, wide>(t, block, begin, group);
    for (; group < end; group++) score_tile<Block, R, 1>(t, block, begin, group);
  } else if constexpr (R > 1) {
    score_few<Block, R - 1>(t, block, begin, rows, group, end);
  }
}

// Weighted values from..to-1 (of the block) of R rows, P panels from dim d on. Whole: all that these rows see of the block, merged into
// what they hold; otherwise a part of the chains that `sums` keep.
template <class Block, int R, int P, bool Whole>
void value_tile(const Tile &t, const Block &block, int64_t begin, int64_t d, int64_t from, int64_t to, float *sums) {
  f32x16 acc[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) acc[r][p] = Whole ? zero() : load(sums + (r * P + p) * 16);
  constexpr int64_t inputs = Block::kInputs;
  const int64_t step = block.value_step(), panel = block.value_panel();
  const float *weight = t.score + begin * kKeyBlock;
  const typename Block::Element *at[P];
  const auto place = [&](int64_t token) {
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) at[p] = block.value(token, d) + p * panel;
  };
  const bool half = inputs == 2 && to % 2 && from < to;  // of the last pair
  if constexpr (inputs == 2)
    if (from % 2 && from < to) {
      place(from - 1);
      multiply_add<true, Block, R, P>(acc, block, at, 0, weight + from / 2, kKeyBlock, kSecond);
      from++;
    }
  if (half) to--;
  for (int64_t token = from; token < to;) {
    const int64_t stop = Block::kFetch ? min(to, token / 16 * 16 + 16) : to;
    place(token);
    const uint8_t *ahead = block.after_value(d / (16 * P) * kBlockGroups + token / 16);
    for (int64_t offset = 0; token < stop; token += inputs, offset += step) {
      if (Block::kFetch && ahead)
#pragma GCC unroll 2
        for (int line = 0; line < inputs; line++) __builtin_prefetch(ahead, 0, 2), ahead += 64;
      multiply_add<true, Block, R, P>(acc, block, at, offset, weight + token / inputs, kKeyBlock);
    }
  }
  if constexpr (inputs == 2)
    if (half) {
      place(to);
      multiply_add<true, Block, R, P>(acc, block, at, 0, weight + to / 2, kKeyBlock, kFirst);
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const Row &row = t.row[begin + r];
    float *held = t.held + (begin + r) * t.stride + d;
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
      if constexpr (Whole) store(held + p * 16, fma(Block::Decode::weave(acc[r][p]), set1(row.take), load(held + p * 16) * set1(row.keep)));
      else store(sums + (r * P + p) * 16, acc[r][p]);
  }
}

// Tokens that every row of the tile sees go together, in whole steps; those that only some see, row by row, in the same order.
template <class Block, int R, int P>
void value_rows(const Tile &t, const Block &block, int64_t begin, int64_t d, const int64_t *from, const int64_t *to) {
  if (from[0] == from[R - 1] && to[R - 1] == to[0]) return value_tile<Block, R, P, true>(t, block, begin, d, from[0], to[0], nullptr);
  const int64_t first = from[R - 1] + from[R - 1] % Block::kInputs, end = to[0] - to[0] % Block::kInputs;
  float sums[R * P * 16] = {0};
  const bool together = first < end;
  for (int r = 0; r < R; r++)
    value_tile<Block, 1, P, false>(t, block, begin + r, d, from[r], together ? first : to[r], sums + r * P * 16);
  if (together) {
    value_tile<Block, R, P, false>(t, block, begin, d, first, end, sums);
    for (int r = 0; r < R; r++) value_tile<Block, 1, P, false>(t, block, begin + r, d, end, to[r], sums + r * P * 16);
  }
  for (int r = 0; r < R; r++) {
    const Row &row = t.row[begin + r];
    float *held = t.held + (begin + r) * t.stride + d;
    for (int p = 0; p < P; p++)
      store(held + p * 16, fma(Block::Decode::weave(load(sums + (r * P + p) * 16)), set1(row.take), load(held + p * 16) * set1(row.keep)));
  }
}

template <class Block, int R = kTileRows>
void value_few(const Tile &t, const Block &block, int64_t begin, int rows, int64_t d, int64_t end, const int64_t *from,
               const int64_t *to) {
  if (rows == R) {
    constexpr int wide = tile_panels(R);
    for (; d + 16 * wide <= end; d += 16 * wide) value_rows<Block, R, wide>(t, block, begin, d, from, to);
    for (; d < end; d += 16) value_rows<Block, R, 1>(t, block, begin, d, from, to);
  } else if constexpr (R > 1) {
    value_few<Block, R - 1>(t, block, begin, rows, d, end, from, to);
  }
}

// The highest score of one row in a block, whose scores are capped, and -inf outside the tokens that it sees.
XK_INLINE float settle(float *score, int64_t block, const Row &row, float softcap) {
  const bool whole = row.first <= block && row.position >= block + kKeyBlock - 1;
  f32x16 top = set1(-INFINITY);
  if (whole && !(softcap > 0)) {
#pragma GCC unroll 4
    for (int g = 0; g < kBlockGroups; g++) top = max(load(score + g * 16), top);
    return reduce_max(top);
  }
  const f32x16 lowest = set1(-INFINITY), first = set1((float)(row.first - block)), last = set1((float)(row.position - block));
  f32x16 index = lane_index();
  for (int g = 0; g < kBlockGroups; g++, index = index + set1(16.0f)) {
    f32x16 value = load(score + g * 16);
    if (softcap > 0) value = set1(softcap) * tanh(value / set1(softcap));
    value = select_less(index, first, lowest, select_less(last, index, lowest, value));
    store(score + g * 16, value);
    top = max(value, top);
  }
  return reduce_max(top);
}

// Settled scores become weights exp(score - maximum); their sum.
XK_INLINE float weigh(float *score, float maximum) {
  const f32x16 m = set1(maximum);
  f32x16 total = zero();
#pragma GCC unroll 4
  for (int g = 0; g < kBlockGroups; g++) {
    const f32x16 weight = exp_falling(load(score + g * 16) - m);
    store(score + g * 16, weight);
    total = total + weight;
  }
  return reduce_add(total);
}

// Of two parts, what each is multiplied by when they meet: exp(its maximum - the greater). One of the two is exp(0) = 1.
struct Meeting {
  float keep, take;
};
static inline Meeting meet(float *maximum, float *sum, float other, float other_sum, float factor) {
  const bool grows = *maximum < other;
  const Meeting m = {grows ? factor : 1.0f, grows ? 1.0f : factor};
  if (grows) *maximum = other;
  *sum = *sum * m.keep + other_sum * m.take;
  return m;
}
static inline float fall(float a, float b) { return a < b ? a - b : b - a; }

// Scores of rows begin..end-1 against a block become weights, zero outside the tokens that a row sees, and the rows learn what their
// sums so far and the block's are to be multiplied by.
template <class Block>
void weigh_rows(const Tile &t, const Block &block, int64_t at, int64_t begin, int64_t end, int64_t first_group, int64_t groups) {
  const Row *row = t.row;
  for (int64_t r = begin; r < end; r += 16) {
    float maximum[16] = {0}, sum[16], factor[16] = {0};
    const int64_t some = min(16, end - r);
    // One loop for each kind of dependence: in one loop for all, a row would wait for its maximum, then for its sum.
    for (int64_t i = 0; i < some; i++) maximum[i] = settle(t.score + (r + i) * kKeyBlock, at, row[r + i], t.softcap);
    for (int64_t i = 0; i < some; i++) sum[i] = weigh(t.score + (r + i) * kKeyBlock, maximum[i]);
    if constexpr (Block::kScaled)  // a weight meets the steps of its value times what one is worth
      for (int64_t g = first_group; g < groups; g++) {
        const f32x16 scale = block.scale(g, true), tiny = set1(0x1p-126f);  // a token that is not seen may have any scale
        for (float *weight = t.score + r * kKeyBlock + g * 16, *last = weight + some * kKeyBlock; weight < last; weight += kKeyBlock)
          store(weight, select_less(load(weight), tiny, zero(), load(weight) * scale));
      }
    for (int64_t i = 0; i < some; i++) factor[i] = fall(row[r + i].maximum, maximum[i]);
    store(factor, exp_falling(load(factor)));
    for (int64_t i = 0; i < some; i++) {
      Row &to = t.row[r + i];
      const Meeting m = meet(&to.maximum, &to.sum, maximum[i], sum[i], factor[i]);
      to.keep = m.keep, to.take = m.take;
    }
  }
}

// Weights of a row become pairs where they lie, at the front, or stay what they are, rounded.
template <bool Pairs>
XK_INLINE void round_weights(float *weight) {
  for (int64_t i = 0; i < kKeyBlock; i += 16)
    if constexpr (Pairs) store_rounded(weight + i / 2, load(weight + i));
    else store(weight + i, nearest_bf16(load(weight + i)));
}

// Rows first..first+rows-1, at most a tile: scores, weights and products with values, before the next tile.
template <class Block>
void attend_rows(const Tile &t, const Block &block, int64_t at, int64_t first, int rows, int64_t value_end) {
  const Row *row = t.row + first;
  const int64_t low = max(0, (row[0].first - at) / 16), high = min(kBlockGroups, (row[rows - 1].position - at) / 16 + 1);
  score_few(t, block, first, rows, low, high);
  weigh_rows(t, block, at, first, first + rows, low, high);
  if constexpr (Block::kRounded)
    for (int r = 0; r < rows; r++) round_weights<Block::kInputs == 2>(t.score + (first + r) * kKeyBlock);
  int64_t from[kTileRows], to[kTileRows];
  for (int r = 0; r < rows; r++) from[r] = max(0, row[r].first - at), to[r] = min(kKeyBlock, row[r].position + 1 - at);
  if constexpr (Block::kScaled && Block::kFetch) block.fetch_scales();
  value_few(t, block, first, rows, 0, value_end, from, to);
}

// Rows begin..end-1, in tiles of nearly equal height.
template <class Block>
void attend_block(const Tile &t, const Block &block, int64_t at, int64_t begin, int64_t end, int64_t value_end) {
  const int64_t rows = end - begin, tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
    if constexpr (!Block::kFetch) block.fetch(from, to, rows);
    attend_rows(t, block, at, begin + from, (int)(to - from), value_end);
  }
}

}  // namespace XK_LEVEL
