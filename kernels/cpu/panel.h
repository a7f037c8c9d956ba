// The inner loop of every product: R rows of x times P panels, each output one chain of FMA along k. Linear and attention scores
// share it, for any R and P the bits of an output are the same.
#pragma once
#include "simd.h"

namespace XK_LEVEL {

struct PanelF32 {
  static constexpr int64_t bytes = 64;  // of one k
  XK_INLINE f32x16 load(const uint8_t *p) { return XK_LEVEL::load(p); }
};
struct PanelBf16 {
  static constexpr int64_t bytes = 32;
  XK_INLINE f32x16 load(const uint8_t *p) { return load_bf16_panel(p); }
};
struct PlainBf16 {  // natural order: keys in the KV cache
  static constexpr int64_t bytes = 32;
  XK_INLINE f32x16 load(const uint8_t *p) { return load_bf16((const uint16_t *)p); }
};

struct Product {
  const float *x;        // [rows, ldx], k columns used
  int64_t ldx;
  const uint8_t *w;      // first panel
  int64_t panel_stride;  // bytes
  int64_t k;
  float *c;              // [rows, ldc], 16 columns per panel
  int64_t ldc;
  bool resume;           // continue the chains from c instead of zero
};

template <class Panel, int R, int P>
static void product_tile(const Product &t) {
  f32x16 acc[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) acc[r][p] = t.resume ? load(t.c + r * t.ldc + p * 16) : zero();
  const float *x = t.x;
  const uint8_t *w = t.w;
  const int64_t k = t.k, ldx = t.ldx, stride = t.panel_stride;
  for (int64_t i = 0; i < k; i++) {
    f32x16 column[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) column[p] = Panel::load(w + p * stride + i * Panel::bytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const f32x16 b = set1(x[r * ldx + i]);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) acc[r][p] = fma(b, column[p], acc[r][p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) store(t.c + r * t.ldc + p * 16, acc[r][p]);
}

constexpr int tile_panels(int rows) { return rows * 4 <= kAccumulators ? 4 : rows * 2 <= kAccumulators ? 2 : 1; }

// `rows` rows times as many panels as fit the registers at a time, for one tile height R fixed at compile time.
template <class Panel, int R>
static void product_rows(Product t, int64_t panels) {
  constexpr int wide = tile_panels(R);
  int64_t p = 0;
  const auto step = [&](int count) {
    p += count;
    t.w += count * t.panel_stride;
    t.c += count * 16;
  };
  for (; p + wide <= panels; step(wide)) product_tile<Panel, R, wide>(t);
  if (wide > 2 && p + 2 <= panels) product_tile<Panel, R, (wide > 2 ? 2 : 1)>(t), step(2);
  for (; p < panels; step(1)) product_tile<Panel, R, 1>(t);
}

template <class Panel, int R = kTileRows>
static void product_few(const Product &t, int rows, int64_t panels) {
  if (rows == R) return product_rows<Panel, R>(t, panels);
  if constexpr (R > 1) product_few<Panel, R - 1>(t, rows, panels);
}

// Any number of rows, cut into tiles of nearly equal height.
template <class Panel>
static void product(Product t, int64_t rows, int64_t panels) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
    Product tile = t;
    tile.x += begin * t.ldx;
    tile.c += begin * t.ldc;
    product_few<Panel>(tile, (int)(end - begin), panels);
  }
}

}  // namespace XK_LEVEL
