// Products of whole numbers on the matrix unit (AMX), sixteen rows at a time: the same exact sums as elsewhere, scaled in the same
// order, so the same bits. Weights are laid out anew ([four inputs][16 outputs][4] bytes), once for all rows of a unit.
#pragma once
#include "bytes.h"

namespace XK_LEVEL {

constexpr int kTileHeight = 16;

#if defined(__AMX_INT8__)

constexpr int64_t kTileLeast = 10;    // rows: of fewer, vectors are as fast, as a tile is stored and scaled for every stretch
constexpr int64_t kTileDepth = 512;   // inputs that are summed at once: a tile's rows of them stay in L1, the weights of a unit in L2

struct TilePanel {
  alignas(64) uint8_t weights[kTileDepth * 16];
  float scales[kTileDepth / 32 * 16];
};
struct TileMemory {
  TilePanel panels[kPanelGroup];
  alignas(64) int32_t sums[2][2][kTileHeight * 16];
};

// --- the instructions, for tiles whose numbers are known to the compiler ---

struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Tiles 0 to 3 are sums, 4 and 5 rows of activations of so many inputs, 6 and 7 weights.
static inline void set_tiles(int64_t rows, int64_t inputs) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 4; i++) config.rows[i] = (uint8_t)rows, config.row_bytes[i] = 64;
  for (int i = 4; i < 6; i++) config.rows[i] = (uint8_t)rows, config.row_bytes[i] = (uint16_t)inputs;
  for (int i = 6; i < 8; i++) config.rows[i] = (uint8_t)(inputs / 4), config.row_bytes[i] = 64;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
static inline void release_tiles() { asm volatile("tilerelease"); }

template <int To>
XK_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(To));
}
template <int To>
XK_INLINE void load_tile(const void *from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(To) : "memory");
}
template <int From>
XK_INLINE void store_tile(void *to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"((int64_t)64), "i"(From) : "memory");
}
#define XK_TILE_PRODUCT(name, instruction) \
  template <int To, int Rows, int Weights> \
  XK_INLINE void name() { \
    asm volatile(instruction " %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(To), "i"(Rows), "i"(Weights)); \
  }
XK_TILE_PRODUCT(add_signed, "tdpbssd")
XK_TILE_PRODUCT(add_unsigned_rows, "tdpbusd")
XK_TILE_PRODUCT(add_unsigned_weights, "tdpbsud")

// --- what a stretch is ---

// Weights as a tile has them. Returns where the next ones go.
XK_INLINE uint8_t *lay_out(Int8, const uint8_t *w, int64_t inputs, uint8_t *to) {
  for (int64_t i = 0; i < inputs; i += 4, w += 64, to += 64) _mm512_store_si512(to, lay_out_four(w));
  return to;
}
XK_INLINE uint8_t *lay_out(Int8Bytes, const uint8_t *w, int64_t inputs, uint8_t *to) { return lay_out(Int8(), w, inputs, to); }
XK_INLINE uint8_t *lay_out(Int4, const uint8_t *w, int64_t inputs, uint8_t *to) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < inputs; i += 8, w += 64, to += 128) {
    const __m512i both = _mm512_loadu_si512(w);
    _mm512_store_si512(to, _mm512_and_si512(both, low));
    _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
  }
  return to;
}

// One stretch, for the rows of a tile.
struct TileStretch {
  const uint8_t *x, *w;  // activations of the first row, and weights
  int64_t stride, high;  // bytes between rows, and from the low bytes of a row to the high ones
  const float *scales, *factors;
};

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights. Stretches take turns: tiles aren't renamed.
template <int Turn>
XK_INLINE void sum_tile(Int8, const TileStretch &s, int64_t inputs, int64_t width, TileMemory &memory) {
  zero_tile<2 * Turn>();
  zero_tile<2 * Turn + 1>();
  for (int64_t i = 0; i < inputs; i += width) {
    load_tile<6 + Turn>(s.w + i * 16, 64);
    load_tile<4>(s.x + i, s.stride);
    add_unsigned_rows<2 * Turn, 4, 6 + Turn>();
    load_tile<5>(s.x + s.high + i, s.stride);
    add_signed<2 * Turn + 1, 5, 6 + Turn>();
  }
  store_tile<2 * Turn>(memory.sums[Turn][0]);
  store_tile<2 * Turn + 1>(memory.sums[Turn][1]);
}
template <int Turn, class Type>
XK_INLINE void sum_tile(Type, const TileStretch &s, int64_t, int64_t, TileMemory &memory) {
  zero_tile<Turn>();
  load_tile<6 + Turn>(s.w, 64);
  load_tile<4 + Turn>(s.x, s.stride);
  if constexpr (Type::bits == 8) add_signed<Turn, 4 + Turn, 6 + Turn>();
  else add_unsigned_weights<Turn, 4 + Turn, 6 + Turn>();
  store_tile<Turn>(memory.sums[Turn][0]);
}

template <class Type, bool Whole, int Turn>
XK_INLINE void add_tile(const TileStretch &s, const TileMemory &memory, int count, __m512 *c) {
  const __m512 scales = _mm512_load_ps(s.scales);
#pragma GCC unroll 16
  for (int r = 0; r < kTileHeight; r++) {
    if (!Whole && r >= count) continue;
    __m512i sum = _mm512_load_si512(memory.sums[Turn][0] + r * 16);
    if constexpr (Type::kRowScale) {
      sum = _mm512_add_epi32(sum, _mm512_slli_epi32(_mm512_load_si512(memory.sums[Turn][1] + r * 16), 8));
      c[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales, c[r]);
    } else {
      const float *factors = (const float *)((const uint8_t *)s.factors + r * s.stride);
      const vi whole = (vi)sum;
      c[r] = _mm512_fmadd_ps((__m512)Type::scaled(to_float(&whole), factors).v[0], scales, c[r]);
    }
  }
}

// --- the product ---

// Inputs begin..end-1 of one panel, as they lie in `memory`, for `count` rows from `row` on (a whole tile where Whole); of these the
// first `known` are another tile's as well. A stretch is summed while the one before is scaled.
template <class Type, bool Whole>
static void tile_rows(const IntProduct &t, int64_t row, int count, int known, int64_t begin, int64_t end, int64_t width, float *sums,
                      const TilePanel &panel, TileMemory &memory) {
  const int64_t stretch = Type::stretch(t.group ? t.group : t.x.k);
  if (Whole) count = kTileHeight;
  __m512 c[kTileHeight];
#pragma GCC unroll 16
  for (int r = 0; r < kTileHeight; r++) c[r] = begin && r < count ? _mm512_loadu_ps(sums + (row + r) * t.c_row) : _mm512_setzero_ps();
  const uint8_t *x = t.x_row(row);
  TileStretch even = {x + begin, panel.weights, t.x.stride, t.x.k, panel.scales, (const float *)(x + t.x.k) + begin / kStretch4 * 2}, odd = even;
  const auto after = [stretch](const TileStretch &s) {
    return TileStretch{s.x + stretch, s.w + stretch * 16, s.stride, s.high, s.scales + 16, s.factors + stretch / kStretch4 * 2};
  };
  sum_tile<0>(Type(), even, min(stretch, end - begin), width, memory);
  for (int64_t at = begin;;) {
    if ((at += stretch) < end) sum_tile<1>(Type(), odd = after(even), min(stretch, end - at), width, memory);
    add_tile<Type, Whole, 0>(even, memory, count, c);
    if (at >= end) break;
    if ((at += stretch) < end) sum_tile<0>(Type(), even = after(odd), min(stretch, end - at), width, memory);
    add_tile<Type, Whole, 1>(odd, memory, count, c);
    if (at >= end) break;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileHeight; r++)
    if (r >= known && r < count) _mm512_storeu_ps(sums + (row + r) * t.c_row, c[r]);
}

// Inputs begin..end-1 of a panel, which start at `w`, and scales for every stretch of them. Returns the weights that come next.
template <class Type>
static const uint8_t *lay_out_panel(const uint8_t *w, int64_t group, int64_t begin, int64_t end, TilePanel &panel) {
  const int64_t stretch = Type::stretch(group);
  uint8_t *to = panel.weights;
  float *scales_to = panel.scales;
  f32x16 scales = begin ? load(panel.scales + (kTileDepth / stretch - 1) * 16) : zero();
  for (int64_t at = begin; at < end; scales_to += 16) {
    if (at % group == 0) scales = load_f16(w), w += kScaleBytes;
    const int64_t inputs = min(stretch, end - at);
    store(scales_to, scales);
    to = lay_out(Type(), w, inputs, to);
    w += weight_bytes<Type>(inputs), at += inputs;
  }
  return w;
}

// As quantise_rows: each row by itself, int16 in planes.
template <class Type>
static void tile_quantise(const float *x, int64_t k, int64_t group, uint8_t *to, Rows rows) {
  const int64_t padded = padded_inputs(k, group), bytes = Type::row_bytes(padded);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    if constexpr (Type::kRowScale) Type::quantise_planes(x + r * k, k, padded, to + r * bytes);
    else Type::quantise(x + r * k, k, padded, group, place_of<Type>(to + r * bytes, padded, 1, 0));
  }
}

// As int_product, of rows that tile_quantise left.
template <class Type>
static void tile_product(const IntProduct &t, int64_t rows, int64_t panels, TileMemory &memory) {
  const int64_t group = t.group ? t.group : t.x.k, width = Type::stretch(group) % 64 || t.x.k % 64 ? 32 : 64;
  set_tiles(min(rows, kTileHeight), width);
  const uint8_t *w[kPanelGroup];
  for (int64_t p = 0; p < panels; p++) w[p] = t.w + p * t.w_stride;
  for (int64_t begin = 0; begin < t.x.k; begin += kTileDepth) {
    const int64_t end = min(begin + kTileDepth, t.x.k);
    for (int64_t p = 0; p < panels; p++) w[p] = lay_out_panel<Type>(w[p], group, begin, end, memory.panels[p]);
    for (int64_t row = 0; row < rows; row += kTileHeight) {
      const int64_t first = max(0, min(row, rows - kTileHeight)), known = row - first;
      for (int64_t p = 0; p < panels; p++) {
        float *sums = t.c + p * t.c_stride;
        if (rows < kTileHeight) tile_rows<Type, false>(t, 0, (int)rows, 0, begin, end, width, sums, memory.panels[p], memory);
        else tile_rows<Type, true>(t, first, 0, (int)known, begin, end, width, sums, memory.panels[p], memory);
      }
    }
  }
  release_tiles();
  if constexpr (Type::kRowScale)
    for (int64_t r = 0; r < rows; r++) {
      const f32x16 scale = set1(Type::row_scale(t.x_row(r), t.x.k));
      for (int64_t p = 0; p < panels; p++) store(t.c + r * t.c_row + p * t.c_stride, load(t.c + r * t.c_row + p * t.c_stride) * scale);
    }
}

#else

constexpr int64_t kTileLeast = INT64_MAX;
struct TileMemory {};
template <class Type>
static void tile_quantise(const float *, int64_t, int64_t, uint8_t *, Rows) {}
template <class Type>
static void tile_product(const IntProduct &, int64_t, int64_t, TileMemory &) {}

#endif

}  // namespace XK_LEVEL
