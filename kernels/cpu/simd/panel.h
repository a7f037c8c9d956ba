// The inner loop of every product: R rows of x times P panels, each output one chain of FMA along k. Linear and attention scores
// share it, for any R and P the bits of an output are the same.
#pragma once
#include "common.h"

namespace XK_LEVEL {

// Rows of a product are cut into tiles: of `rows` rows, of this height but for the last, or (0) of nearly equal height.
struct Tiles {
  int64_t rows, count, height = 0;
  int64_t row(int64_t tile) const { return height ? min(rows, tile * height) : rows * tile / count; }
  int64_t of(int64_t row) const { return height ? row / height : ((row + 1) * count - 1) / rows; }
};
static inline Tiles tiles_of(int64_t rows) { return {rows, rows <= kFewRows ? rows > 0 : (rows + kTileRows - 1) / kTileRows}; }
static inline Tiles rows_apart(int64_t rows) { return {rows, rows, 1}; }

struct Multiplied {  // an element of x with one of each output
  XK_INLINE f32x16 spread(const float *x) { return set1(*x); }
  XK_INLINE f32x16 add(f32x16 sum, f32x16 x, f32x16 w) { return fma(x, w, sum); }
};
// Or a pair of bf16 elements with one of each output, where the machine multiplies them: the second product is added first, then the
// first, each rounded as by FMA (so on Zen 4), and what is too small for a normal exponent is zero.
#if defined(__AVX512BF16__)
struct Paired {
  XK_INLINE f32x16 spread(const float *x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    f32x16 r;
    r.v[0] = (vf)_mm512_set1_epi32(pair);
    return r;
  }
  XK_INLINE f32x16 add(f32x16 sum, f32x16 x, f32x16 w) {
    sum.v[0] = (vf)_mm512_dpbf16_ps((__m512)sum.v[0], (__m512bh)x.v[0], (__m512bh)w.v[0]);
    return sum;
  }
};
#endif
struct PanelF32 : Multiplied {
  static constexpr int64_t bytes = 64;  // of one k
  static constexpr bool streams = false;  // keys too are such panels, which caches hold
  XK_INLINE f32x16 load(const uint8_t *p) { return XK_LEVEL::load(p); }
};
struct PanelBf16 : Multiplied {
  static constexpr int64_t bytes = 32;
  static constexpr bool streams = kStreams;
  XK_INLINE f32x16 load(const uint8_t *p) { return load_bf16_panel(p); }
};

struct Product {
  const float *x;     // [rows, x_stride], k columns used
  int64_t x_stride;   // floats between rows
  const uint8_t *w;   // first panel
  int64_t w_stride;   // bytes between panels
  int64_t k;
  float *c;           // result of the first panel, [rows, 16]
  int64_t c_row;      // floats between its rows
  int64_t c_stride;   // floats between panels
  bool resume;        // continue the chains from c instead of zero
  const int32_t *pick = nullptr;  // the rows of x that are meant, where a product gathers; consecutive rows otherwise
  int tile = 0, tiles = 1;  // of rows that pass the same panels, one after the other
};

template <class Panel, int R, int P, bool Gather>
static void product_tile(const Product &t) {
  f32x16 acc[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) acc[r][p] = t.resume ? load(t.c + r * t.c_row + p * t.c_stride) : zero();
  const float *x = t.x;
  const uint8_t *w = t.w;
  const int64_t k = t.k, x_stride = t.x_stride, w_stride = t.w_stride, ahead = fetch_ahead(P, w_stride);
  const bool alone = t.tiles == 1;
  const Ahead share = share_ahead(t.tile, t.tiles, P, w_stride);
  const float *row[R];
  if constexpr (Gather)
    for (int r = 0; r < R; r++) row[r] = x + t.pick[r] * x_stride;
  for (int64_t i = 0; i < k; i++) {
    f32x16 column[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      column[p] = Panel::load(w + p * w_stride + i * Panel::bytes);
      if (alone) __builtin_prefetch(w + p * w_stride + i * Panel::bytes + ahead, 0, 2);
    }
    if (!alone) share.fetch(w + i * Panel::bytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const f32x16 b = Panel::spread((Gather ? row[r] : x + r * x_stride) + i);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) acc[r][p] = Panel::add(acc[r][p], b, column[p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) store(t.c + r * t.c_row + p * t.c_stride, acc[r][p]);
}

constexpr int tile_panels(int rows) { return rows * 4 <= kAccumulators ? 4 : rows * 2 <= kAccumulators ? 2 : 1; }

// `rows` rows times as many panels as fit the registers at a time, for one tile height R fixed at compile time.
template <class Panel, int R, bool Gather>
static void product_rows(Product t, int64_t panels) {
  constexpr int most = tile_panels(R);
  const int wide = R == 1 && Panel::streams && xk::asks_ahead ? 1 : most;
  int64_t p = 0;
  const auto step = [&](int count) {
    p += count;
    t.w += count * t.w_stride;
    t.c += count * t.c_stride;
  };
  for (; wide == most && p + most <= panels; step(most)) product_tile<Panel, R, most, Gather>(t);
  if (wide > 2 && p + 2 <= panels) product_tile<Panel, R, (most > 2 ? 2 : 1), Gather>(t), step(2);
  for (; p < panels; step(1)) product_tile<Panel, R, 1, Gather>(t);
}

template <class Panel, bool Gather = false, int R = kFewRows>
static void product_few(const Product &t, int rows, int64_t panels) {
  if (rows == R) return product_rows<Panel, R, Gather>(t, panels);
  if constexpr (R > 1) product_few<Panel, Gather, R - 1>(t, rows, panels);
}

// Any number of rows: one tile of few, or tiles of nearly equal height.
template <class Panel, bool Gather = false>
static void product(Product t, int64_t rows, int64_t panels) {
  const int most = rows <= kFewRows ? kFewRows : kTileRows;
  t.tiles = ((int)rows + most - 1) / most;
  for (int left = (int)rows; left > 0; t.tile++) {
    const int tiles = t.tiles - t.tile, height = (left + tiles - 1) / tiles;
    product_few<Panel, Gather>(t, height, panels);
    if constexpr (Gather) t.pick += height;
    else t.x += height * t.x_stride;
    t.c += height * t.c_row;
    left -= height;
  }
}

constexpr int64_t kWide = tile_panels(kTileRows);  // panels of the widest tile

// Chains of `rows` rows times `panels` panels over all of k, in blocks of k where there are many rows.
template <class Panel, bool Gather = false>
static void multiply(Product t, int64_t rows, int64_t panels) {
  if (rows <= kFewRows) return product<Panel, Gather>(t, rows, panels);
  for (int64_t begin = 0; begin < t.k; begin += kDepthBlock)
    for (int64_t p = 0; p < panels; p += kWide) {
      Product block = t;
      block.x = t.x + begin;
      block.w = t.w + p * t.w_stride + begin * Panel::bytes;
      block.k = min(kDepthBlock, t.k - begin);
      block.c = t.c + p * t.c_stride;
      block.resume = begin > 0;
      product<Panel, Gather>(block, rows, min(kWide, panels - p));
    }
}

}  // namespace XK_LEVEL
