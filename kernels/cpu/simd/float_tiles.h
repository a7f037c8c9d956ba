// Products of float32 rows with bf16 weights on the matrix unit (AMX), which multiplies bf16 and sums float32. A row is the sum of three
// bf16 parts, exactly, so that nothing of it is lost: for every 32 inputs the products of the smallest parts are added first. The unit
// sums products with even and with odd inputs apart, each from zero, then both, then adds that; few rows, which wait for the weights,
// do the same in vectors. So for any rows and panels together the bits are the same, but not those of the other levels.
// Where float32 ends, so do the parts: from 3.396e38 on they are no numbers any more, below 2^-110 the smallest are zero. What kind of
// NaN a NaN is, nobody promises. Of one part alone (Parts), the row is rounded to bf16, and all else is the same.
#pragma once
#include "tiles.h"

namespace XK_LEVEL {

#if defined(__AVX512BF16__)

// Two inputs of a bf16 panel, of which the second may be missing, as units that multiply bf16 take them: [16 outputs][2].
XK_INLINE __m512i lay_out_pair(const uint8_t *w, int64_t inputs) {
  alignas(64) static const uint16_t order[32] = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30,
                                                 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
  __m512i pair = _mm512_setzero_si512();
  if (inputs > 1) pair = _mm512_loadu_si512(w);
  else if (inputs == 1) pair = _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)w));
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), pair);
}

#endif

#if defined(__AMX_BF16__)

constexpr bool kFloatTiles = true;
constexpr int64_t kPanelsOfTiles = 64;  // most of one unit: rows are split once for all of them
constexpr int64_t kSplitDepth = 256;    // inputs split and laid out at once: two panels of them and what is multiplied stay in L1
constexpr int64_t kStep = 32;           // inputs of a tile
constexpr int64_t kSplitStride = 3 * kSplitDepth * 2 + 64;     // bytes between rows: off the powers of two that share cache sets
constexpr int64_t kLaidPanel = kSplitDepth * 32;

constexpr int64_t kFewSplit = 3;  // rows for which vectors are faster

constexpr unsigned kFlush = 0x8040;  // numbers too small for a normal exponent are zero, as in the matrix unit

struct FloatTileMemory {
  float sums[kPanelsOfTiles * kRowBlock * 16];
  alignas(64) uint8_t weights[2 * kLaidPanel];
  union {
    alignas(64) uint8_t rows[kRowBlock * kSplitStride];
    float few[kFewSplit * 3 * kSplitDepth];
  };
};

XK_TILE_PRODUCT(add_bf16, "tdpbf16ps")

static inline int64_t whole_steps_of(int64_t inputs) { return (inputs + kStep - 1) / kStep * kStep; }

// The parts of n inputs of a row, padded with zeros to whole steps: [Parts][kSplitDepth] of bf16 (or of float32, Wide), the
// smallest first. Infinity and NaN have one part.
template <int Parts, bool Wide = false>
static void split_row(const float *x, int64_t n, void *to) {
  for (int64_t i = 0; i < whole_steps_of(n); i += 16) {
    const __m512 value = i < n ? (__m512)load_some(x + i, n - i).v[0] : _mm512_setzero_ps();
    const __mmask16 finite = ~_mm512_fpclass_ps_mask(value, 0x99);  // neither NaN nor infinite
    __m512 rest = value;
    for (int part = Parts - 1; part >= 0; part--) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(rest);
      const __m512 part_value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
      if (Wide) _mm512_store_ps((float *)to + part * kSplitDepth + i, part_value);
      else _mm256_store_si256((__m256i *)((uint16_t *)to + part * kSplitDepth + i), rounded);
      rest = _mm512_maskz_sub_ps(finite, rest, part_value);
    }
  }
}

// The same of many inputs, padded with zeros to whole steps.
static inline void lay_out_bf16(const uint8_t *w, int64_t inputs, uint8_t *to) {
  int64_t i = 0;
  for (; i + 2 <= inputs; i += 2) _mm512_store_si512(to + i * 32, lay_out_pair(w + i * 32, 2));
  for (; i < whole_steps_of(inputs); i += 2) _mm512_store_si512(to + i * 32, lay_out_pair(w + i * 32, inputs - i));
}

// R tiles of rows times P panels: tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights. `next` are weights to be fetched meanwhile.
template <int Parts, int R, int P>
static void float_tile(const uint8_t *x, const uint8_t *w, int64_t inputs, bool resume, float *c, int64_t c_panel,
                       const uint8_t *next = nullptr, int64_t next_panel = 0) {
  constexpr int64_t tile = kTileHeight * 16, down = kTileHeight * kSplitStride;
  if (resume) {
    load_tile<0>(c, 64);
    if (P > 1) load_tile<1>(c + c_panel, 64);
    if (R > 1) load_tile<2>(c + tile, 64);
    if (R > 1 && P > 1) load_tile<3>(c + tile + c_panel, 64);
  } else {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  }
  for (int64_t i = 0; i < inputs; i += kStep) {
    load_tile<6>(w + i * 32, 64);
    if (P > 1) load_tile<7>(w + kLaidPanel + i * 32, 64);
    if (next)
      for (int64_t line = 0; line < kStep * 32; line += 64)
        for (int p = 0; p < P; p++) __builtin_prefetch(next + p * next_panel + i * 32 + line, 0, 2);
#pragma GCC unroll 3
    for (int part = 0; part < Parts; part++) {
      const uint8_t *from = x + (part * kSplitDepth + i) * 2;
      load_tile<4>(from, kSplitStride);
      add_bf16<0, 4, 6>();
      if (P > 1) add_bf16<1, 4, 7>();
      if (R > 1) load_tile<5>(from + down, kSplitStride), add_bf16<2, 5, 6>();
      if (R > 1 && P > 1) add_bf16<3, 5, 7>();
    }
  }
  store_tile<0>(c);
  if (P > 1) store_tile<1>(c + c_panel);
  if (R > 1) store_tile<2>(c + tile);
  if (R > 1 && P > 1) store_tile<3>(c + tile + c_panel);
}

// Sums of `rows` rows (at most kRowBlock), `stride` floats apart, times `panels` panels: [panel][float_rows(rows)][16].
static inline int64_t float_rows(int64_t rows) { return rows < kTileHeight ? rows : (rows + kTileHeight - 1) / kTileHeight * kTileHeight; }
template <int Parts>
static void float_tiles(const float *x, int64_t stride, int64_t rows, const uint8_t *w, int64_t k, int64_t panels, FloatTileMemory &memory) {
  const int64_t all = float_rows(rows), c_panel = all * 16;
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | kFlush);
  set_tiles(min(rows, kTileHeight), 2 * kStep);
  for (int64_t begin = 0; begin < k; begin += kSplitDepth) {
    const int64_t inputs = min(kSplitDepth, k - begin);
    for (int64_t r = 0; r < all; r++) {
      uint8_t *to = memory.rows + r * kSplitStride;
      if (r < rows) split_row<Parts>(x + r * stride + begin, inputs, to);
      else if (!begin) memset(to, 0, kSplitStride);
    }
    for (int64_t p = 0; p < panels; p += 2) {
      const bool two = p + 1 < panels;
      const uint8_t *next = rows <= kTileHeight ? w + ((p + 2) * k + begin) * 32 : nullptr;  // the last of them are another unit's
      for (int64_t j = 0; j < 1 + two; j++)
        lay_out_bf16(w + ((p + j) * k + begin) * 32, inputs, memory.weights + j * kLaidPanel);
      for (int64_t r = 0; r < all; r += 2 * kTileHeight) {
        const uint8_t *from = memory.rows + r * kSplitStride;
        float *c = memory.sums + p * c_panel + r * 16;
        const bool four = r + kTileHeight < all;
        if (four && two) float_tile<Parts, 2, 2>(from, memory.weights, inputs, begin, c, c_panel);
        else if (four) float_tile<Parts, 2, 1>(from, memory.weights, inputs, begin, c, c_panel);
        else if (two) float_tile<Parts, 1, 2>(from, memory.weights, inputs, begin, c, c_panel, next, k * 32);
        else float_tile<Parts, 1, 1>(from, memory.weights, inputs, begin, c, c_panel, next);
      }
    }
  }
  release_tiles();
  _mm_setcsr(control);
}

// --- few rows ---

// R rows times P panels in vectors. parts: [R][Parts][kSplitDepth]; c: [P][R][16].
template <int Parts, int R, int P>
static void few_rows(const float *parts, const uint8_t *w, int64_t w_stride, int64_t inputs, bool resume, float *c) {
  const __m512i high = _mm512_set1_epi32((int)0xffff0000);
  __m512 sums[P][R];
#pragma GCC unroll 2
  for (int p = 0; p < P; p++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sums[p][r] = resume ? _mm512_loadu_ps(c + (p * R + r) * 16) : _mm512_setzero_ps();
  for (int64_t begin = 0; begin < inputs; begin += kStep) {
    __m512 even[P][R][Parts], odd[P][R][Parts];
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int part = 0; part < Parts; part++) even[p][r][part] = odd[p][r][part] = _mm512_setzero_ps();
    for (int64_t i = begin; i < begin + kStep; i += 2) {
#pragma GCC unroll 2
      for (int p = 0; p < P; p++) {
        const uint8_t *from = w + p * w_stride + i * 32;
        const __m512i pair = lay_out_pair(from, inputs - i);
        __builtin_prefetch(from + kFetchAhead, 0, kFetchInto);
        const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), second = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 3
          for (int part = 0; part < Parts; part++) {
            const float *x = parts + (r * Parts + part) * kSplitDepth + i;
            even[p][r][part] = _mm512_fmadd_ps(_mm512_set1_ps(x[0]), first, even[p][r][part]);
            odd[p][r][part] = _mm512_fmadd_ps(_mm512_set1_ps(x[1]), second, odd[p][r][part]);
          }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int part = 0; part < Parts; part++) sums[p][r] = _mm512_add_ps(sums[p][r], _mm512_add_ps(even[p][r][part], odd[p][r][part]));
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; p++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) _mm512_storeu_ps(c + (p * R + r) * 16, sums[p][r]);
}

template <int Parts, int R>
static void few_panels(const float *x, int64_t stride, const uint8_t *w, int64_t k, int64_t panels, FloatTileMemory &memory) {
  constexpr int wide = R == 1 ? 2 : 1;
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | kFlush);
  for (int64_t begin = 0; begin < k; begin += kSplitDepth) {
    const int64_t inputs = min(kSplitDepth, k - begin);
    for (int r = 0; r < R; r++) split_row<Parts, true>(x + r * stride + begin, inputs, memory.few + r * Parts * kSplitDepth);
    for (int64_t p = 0; p < panels;) {
      const uint8_t *from = w + (p * k + begin) * 32;
      float *c = memory.sums + p * R * 16;
      if (p + wide <= panels) few_rows<Parts, R, wide>(memory.few, from, k * 32, inputs, begin, c), p += wide;
      else few_rows<Parts, R, 1>(memory.few, from, k * 32, inputs, begin, c), p++;
    }
  }
  _mm_setcsr(control);
}
template <int Parts>
static void float_product(const float *x, int64_t stride, int64_t rows, const uint8_t *w, int64_t k, int64_t panels, FloatTileMemory &memory) {
  switch (rows) {
    case 1: return few_panels<Parts, 1>(x, stride, w, k, panels, memory);
    case 2: return few_panels<Parts, 2>(x, stride, w, k, panels, memory);
    case 3: return few_panels<Parts, 3>(x, stride, w, k, panels, memory);
    default: return float_tiles<Parts>(x, stride, rows, w, k, panels, memory);
  }
}

#else

constexpr bool kFloatTiles = false;
constexpr int64_t kFewSplit = kTileRows;
constexpr int64_t kPanelsOfTiles = kPanelGroup;
struct FloatTileMemory {
  float sums[1];
};
static inline int64_t float_rows(int64_t rows) { return rows; }
template <int Parts>
static inline void float_product(const float *, int64_t, int64_t, const uint8_t *, int64_t, int64_t, FloatTileMemory &) {}

#endif

}  // namespace XK_LEVEL
