// Attention of a few query rows against one block of keys and values that lie side by side in memory: the block is brought into
// panels once, and merged into each row's running maximum, sum and result. Blocks come in order, so a row's bits depend on it alone.
#pragma once
#include "common.h"
#include "panel.h"
#include "vmath.h"

namespace XK_LEVEL {

struct KeyTile {  // query rows of one head against one block of keys
  float *keys, *values, *query, *score, *partial;
  int64_t dim, value_dim, tokens, first;  // tokens and first: of the block, first counted from the sequence's start

  static int64_t scratch_bytes(int64_t dim, int64_t value_dim) {
    const int64_t keys = padded(dim), values = padded(value_dim);
    return (int64_t)sizeof(float) * (kKeyBlock * (keys + values) + kTileRows * (keys + kKeyBlock + values));
  }
  void place(uint8_t *scratch, int64_t key_dim, int64_t width) {
    dim = key_dim, value_dim = width;
    keys = (float *)scratch;
    values = keys + kKeyBlock * padded(dim);
    query = values + kKeyBlock * padded(value_dim);
    score = query + kTileRows * padded(dim);
    partial = score + kTileRows * kKeyBlock;
  }
};

// Keys as [D][16] per sixteen tokens and values as [tokens][16] per sixteen dims, zero where there is nothing.
static void pack_block(const KeyTile &t, const float *k, int64_t k_stride, const float *v, int64_t v_stride, float scale) {
  for (int64_t token = 0; token < kKeyBlock; token++) {
    const bool held = token < t.tokens;
    float *lane = t.keys + token / 16 * 16 * t.dim + token % 16;
    for (int64_t d = 0; d < t.dim; d++) lane[d * 16] = held ? k[token * k_stride + d] * scale : 0.0f;
    for (int64_t d = 0; d < t.value_dim; d += 16)
      store(t.values + (d * kKeyBlock + token * 16), held ? load_some(v + token * v_stride + d, t.value_dim - d) : zero());
  }
}

// out and state (maximum and sum) of the rows go from before the block to after it. soften(score, r, &maximum, &sum) makes weights
// exp(score - maximum) of the scores of row r, zero for tokens it does not see.
template <class Soften>
static void attend(const KeyTile &t, int rows, const float *const *query, float *const *out, float *const *state, const Soften &soften) {
  const int64_t dim = padded(t.dim), width = padded(t.value_dim);
  for (int r = 0; r < rows; r++)
    for (int64_t d = 0; d < t.dim; d += 16) store(t.query + r * dim + d, load_some(query[r] + d, t.dim - d));
  constexpr auto multiply = product_few<PanelF32, false, kTileRows>;
  multiply({t.query, dim, (const uint8_t *)t.keys, t.dim * 64, t.dim, t.score, kKeyBlock, 16, false, nullptr, false}, rows, kBlockGroups);
  float maximum[kTileRows], sum[kTileRows];
  for (int r = 0; r < rows; r++) soften(t.score + r * kKeyBlock, r, maximum + r, sum + r);
  multiply({t.score, kKeyBlock, (const uint8_t *)t.values, kKeyBlock * 64, kKeyBlock, t.partial, width, 16, false, nullptr, false}, rows, width / 16);
  for (int r = 0; r < rows; r++) {
    const bool grows = state[r][0] < maximum[r];
    const float factor = exp(grows ? state[r][0] - maximum[r] : maximum[r] - state[r][0]);
    const float keep = grows ? factor : 1.0f, take = grows ? 1.0f : factor;
    if (grows) state[r][0] = maximum[r];
    state[r][1] = state[r][1] * keep + sum[r] * take;
    for (int64_t d = 0; d < t.value_dim; d += 16)
      store_some(out[r] + d, fma(load(t.partial + r * width + d), set1(take), load_some(out[r] + d, t.value_dim - d) * set1(keep)),
                 t.value_dim - d);
  }
}

}  // namespace XK_LEVEL
