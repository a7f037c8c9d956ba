// Products of rows rounded to bf16 (to nearest even) with bf16 weights, summed in float32. Where the machine multiplies bf16, an
// element of a row or a panel is a pair of inputs (Paired). Elsewhere the same rows are multiplied as float32, one input after the
// other. For any rows and panels together the bits are the same; levels differ from each other by the order of sums.
#pragma once
#include "float_tiles.h"
#include "panel.h"

namespace XK_LEVEL {

#if defined(__AVX512BF16__)
constexpr bool kRoundsFirst = true;  // many rows, in a stage before the product: its units need not round them again
#else
constexpr bool kRoundsFirst = false;
#endif

#if !defined(__AMX_BF16__)

constexpr int64_t kPanelsOfRounded = 32;  // most of one unit, for all of which rows are rounded once where that is not done before

#if defined(__AVX512BF16__)

constexpr int64_t kInputs = 2;  // of one element

struct PanelRounded : Paired {
  static constexpr int64_t bytes = 64;
  static constexpr bool streams = kStreams;
  XK_INLINE f32x16 load(const uint8_t *p) {
    f32x16 r;
    r.v[0] = (vf)lay_out_pair(p, 2);
    return r;
  }
};

XK_INLINE void round16(const float *x, int64_t n, float *to) {
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)load_some(x, n).v[0]));
}

#else

constexpr int64_t kInputs = 1;
typedef PanelBf16 PanelRounded;

XK_INLINE void round16(const float *x, int64_t n, float *to) {
  f32x16 value = load_some(x, n);
  XK_PARTS {
    const vu bits = (vu)value.v[i], nearest = bits + 0x7fffu + (bits >> 16 & 1);
    value.v[i] = (vf)(((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : nearest) & 0xffff0000u);
  }
  store(to, value);
}

#endif

constexpr int64_t kRoundedDepth = 256;  // elements of many rows that are rounded at once
constexpr int64_t kApart = 16;          // between them: off the powers of two that share cache sets

struct RoundedMemory {
  float sums[kPanelsOfRounded * kRowBlock * 16];
  float rows[kRowBlock * (kRoundedDepth + kApart)];
  uint8_t last[(kPanelsOfRounded + 1) * PanelRounded::bytes];  // of an odd number of inputs, for each panel
};

// Adds what `inputs` inputs of rounded rows, t.k elements and perhaps half of one, give to the sums of `panels` panels, `group` at a time.
static void add_rounded(Product t, int64_t inputs, int64_t rows, int64_t panels, int64_t group, RoundedMemory &memory) {
  const Product half = {t.x + t.k, t.x_stride, memory.last, PanelRounded::bytes, 1, t.c, t.c_row, t.c_stride, true};
  const uint8_t *odd = t.w + (inputs - 1) * PanelBf16::bytes;
  for (int64_t p = 0; p < panels; p += group, t.w += group * t.w_stride, t.c += group * t.c_stride)
    product<PanelRounded>(t, rows, min(group, panels - p));
  if (inputs == t.k * kInputs) return;
  memset(memory.last, 0, sizeof memory.last);
  for (int64_t p = 0; p < panels; p++) memcpy(memory.last + p * PanelRounded::bytes, odd + p * t.w_stride, PanelBf16::bytes);
  product<PanelRounded>(half, rows, panels);
}

// Sums of `rows` rows (at most kRowBlock), `stride` floats apart, times `panels` panels: [panel][rows][16]. They are rounded here.
static void rounded_product(const float *x, int64_t stride, int64_t rows, const uint8_t *w, int64_t k, int64_t panels,
                            RoundedMemory &memory, float *sums) {
  const bool few = rows <= kFewRows;  // these read the weights once, at best from end to end
  const int64_t apart = few ? kRowBlock * (kRoundedDepth + kApart) / rows / 16 * 16 : kRoundedDepth + kApart, depth = (apart - kApart) * kInputs;
  for (int64_t begin = 0; begin < k; begin += depth) {
    const int64_t inputs = min(depth, k - begin);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < inputs; i += 16) round16(x + r * stride + begin + i, inputs - i, memory.rows + r * apart + i / kInputs);
    add_rounded({memory.rows, apart, w + begin * PanelBf16::bytes, k * PanelBf16::bytes, inputs / kInputs,
                 sums, 16, rows * 16, begin > 0},
                inputs, rows, panels, few ? panels : kWide, memory);
  }
}

// Pairs of many rows, rounded before: [row][k inputs, up to a multiple of 32].
static inline int64_t rounded_bytes(int64_t k) { return (k + 31) / 32 * 64; }
static void round_rows(const float *x, int64_t k, uint8_t *to, Rows rows) {
  for (int64_t r = rows.begin; r < rows.end; r++)
    for (int64_t i = 0; i < k; i += 16) round16(x + r * k + i, k - i, (float *)(to + r * rounded_bytes(k) + 2 * i));
}

static void product_of_rounded(const uint8_t *x, int64_t rows, const uint8_t *w, int64_t k, int64_t panels, RoundedMemory &memory,
                               float *sums) {
  for (int64_t begin = 0, depth = kDepthBlock * kInputs; begin < k; begin += depth) {
    const int64_t inputs = min(depth, k - begin);
    add_rounded({(const float *)(x + 2 * begin), rounded_bytes(k) / 4, w + begin * PanelBf16::bytes, k * PanelBf16::bytes, inputs / kInputs,
                 sums, 16, rows * 16, begin > 0},
                inputs, rows, panels, kWide, memory);
  }
}

#endif

}  // namespace XK_LEVEL
