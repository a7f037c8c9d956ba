// Products with quantised weights. Rows of activations are quantised first, then products of a stretch of inputs are summed as whole
// numbers, which is exact and so has no order; stretches are added in order along k as float32. So for any rows and panels together
// the bits of an output are the same.
//   int8 weights: activations are int16 under one scale a row, a stretch is a group (of at most 128 inputs).
//   int8 weights, activations too (bytes.h), and int4 weights: activations are int8 under a scale for every 32 inputs, a stretch.
//
// A panel of 16 outputs is, group after group: 16 scales as float16, then the group's inputs.
//   int8: [two inputs][16 outputs][2] bytes.
//   int4: [eight inputs][two halves of 8 outputs][8][4] bytes: low nibbles are the first four inputs, high nibbles the others, plus 8.
// Inputs past k are zero.
#pragma once
#include "panel.h"
#include "steps.h"

namespace XK_LEVEL {

constexpr int64_t kScaleBytes = 32;  // of one panel's scales
constexpr int64_t kStretch4 = 32;    // inputs of a stretch of int8 activations
constexpr int64_t kStretch8 = 128;   // most inputs of an int8 stretch: 128 * 128 * 32767 stays below 2^31

struct QuantisedRows {
  const uint8_t *base;
  int64_t stride, k;  // bytes of a row; padded inputs
  const uint8_t *row(int64_t r) const { return base + r * stride; }
};

struct IntProduct {
  QuantisedRows x;
  int64_t row;           // first row of x
  const uint8_t *w;      // first panel
  int64_t w_stride;      // bytes between panels
  int64_t group;         // inputs under one scale, 0 for all
  float *c;              // results of the first panel, [rows, 16]
  int64_t c_row, c_stride;
  const int32_t *pick = nullptr;  // the rows of x that are meant, where a product gathers; consecutive rows otherwise

  inline __attribute__((always_inline)) const uint8_t *x_row(int64_t r) const { return x.row(pick ? pick[r] : row + r); }
};

// Weights of a stretch, for P panels: inputs from `at` on, of k.
struct Stretch {
  const uint8_t *w, *scales;
  int64_t w_stride, k, at, inputs;
};

typedef int32_t Wide __attribute__((vector_size(64), aligned(4), may_alias));
template <class To>
XK_INLINE void narrow(Wide values, To *to) {
  typedef To Narrow __attribute__((vector_size(16 * sizeof(To)), aligned(sizeof(To)), may_alias));
  *(Narrow *)to = __builtin_convertvector(values, Narrow);
}

struct Int8 {
  static constexpr int64_t bits = 8;
  static constexpr bool kRowScale = true;
  static int step(const uint8_t *w, int64_t lane, int64_t i) { return (int8_t)w[i / 2 * 32 + lane * 2 + i % 2]; }
  static int64_t stretch(int64_t group) { return min(group, kStretch8); }

  // int16 values, then the scale. Planes: all low bytes, then all high ones.
  static int64_t row_bytes(int64_t padded) { return (2 * padded + 4 + 63) / 64 * 64; }
  static void quantise(const float *x, int64_t k, int64_t padded, bool planes, uint8_t *to) {
    const Span span = span_of(x, k, 32767.0f);
    for (int64_t j = 0; j < padded; j += 16) {
      int32_t whole[16];
      whole_steps(j < k && span.finite ? load_some(x + j, k - j) : zero(), span.steps, whole);
      const Wide values = *(const Wide *)whole;
      if (planes) narrow<uint8_t>(values, to + j), narrow<uint8_t>(values >> 8, to + padded + j);
      else narrow<int16_t>(values, (int16_t *)to + j);
    }
    *(float *)(to + 2 * padded) = span.step;
  }

  XK_INLINE vs weights_at(const uint8_t *p, [[maybe_unused]] int i) {
#if XK_VECTOR_BYTES == 64
    return (vs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#elif XK_VECTOR_BYTES == 32
    return (vs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p + i * 16)));
#elif defined(__aarch64__)
    return (vs)vmovl_s8(vld1_s8((const int8_t *)(p + i * 8)));
#else
    return (vs)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(p + i * 8)));
#endif
  }

  static float row_scale(const uint8_t *row, int64_t padded) { return *(const float *)(row + 2 * padded); }

  // Sums of a stretch of int16 activations. Once: the panels come from memory.
  template <bool Once, int R, int P>
  XK_INLINE void sum_pairs(const Stretch &s, const uint8_t *const *x, vi sum[R][P][kParts]) {
    const uint8_t *w = s.w, *from[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      from[r] = x[r] + 2 * s.at;
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = (vi){};
    }
    for (int64_t k = 0; k < s.inputs; k += 2, w += 32) {
      asm volatile("" ::: "memory");  // read again, rather than keep weights on the stack
      vs line[P][kParts];
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        XK_PARTS line[p][i] = weights_at(w + p * s.w_stride, i);
        if (Once && k % 4) __builtin_prefetch(w + p * s.w_stride + fetch_ahead(P * s.w_stride), 0, fetch_into(R));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const vs pair = (vs)broadcast32(from[r] + 2 * k);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = add_pairs(sum[r][p][i], pair, line[p][i]);
      }
    }
  }

  template <bool Once, int R, int P>
  XK_INLINE void add(const Stretch &s, const uint8_t *const *x, f32x16 (*c)[P]) {
    vi sum[R][P][kParts];
    sum_pairs<Once, R, P>(s, x, sum);
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      const f32x16 scale = load_f16(s.scales + p * s.w_stride);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) c[r][p] = fma(to_float(sum[r][p]), scale, c[r][p]);
    }
  }
};

// One stretch of a row as int8 (or as int16 of the same values): returns their sum. `some` inputs are left of the row.
template <class To>
static int32_t quantise_stretch(const float *x, int64_t some, To *to, float &step) {
  some = max(0, min(kStretch4, some));
  const Span span = span_of(x, some, 127.0f);
  int32_t whole[kStretch4], sum = 0;
  for (int64_t h = 0; h < kStretch4; h += 16) whole_steps(h < some && span.finite ? load_some(x + h, some - h) : zero(), span.steps, whole + h);
  for (int64_t h = 0; h < kStretch4; h += 16) narrow<To>(*(const Wide *)(whole + h), to + h);
  for (int64_t i = 0; i < kStretch4; i++) sum += whole[i];
  step = span.step;
  return sum;
}

// Sums of a stretch of int8 activations, scaled, to those of the stretches before.
template <class Type, int R, int P>
XK_INLINE void add_stretch(const Stretch &s, const uint8_t *const *x, const vi (*sum)[P][kParts], f32x16 (*c)[P]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) {
    const f32x16 scale = load_f16(s.scales + p * s.w_stride);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      c[r][p] = fma(Type::scaled(to_float(sum[r][p]), Type::factors(x[r], s.k, s.at)), scale, c[r][p]);
  }
}

struct Int4 {
  static constexpr int64_t bits = 4;
  static constexpr bool kRowScale = false;
  static int step(const uint8_t *w, int64_t lane, int64_t i) { return (w[i / 8 * 64 + lane * 4 + i % 4] >> i / 4 % 2 * 4 & 15) - 8; }
  static int64_t stretch(int64_t) { return kStretch4; }

  // int8 values, then for every stretch what a step is worth, and that times 8 and the sum of the values.
  static const float *factors(const uint8_t *row, int64_t padded, int64_t at) { return (const float *)(row + padded) + at / kStretch4 * 2; }
  XK_INLINE f32x16 scaled(f32x16 sum, const float *factors) { return fma(sum, set1(factors[0]), set1(factors[1])); }
  static int64_t row_bytes(int64_t padded) { return (padded + padded / kStretch4 * 8 + 63) / 64 * 64; }
  static void quantise(const float *x, int64_t k, int64_t padded, bool, uint8_t *to) {
    float *factors = (float *)(to + padded);
    for (int64_t j = 0; j < padded; j += kStretch4, factors += 2) {
      const int32_t sum = quantise_stretch(x + j, k - j, (int8_t *)to + j, factors[0]);
      factors[1] = -8.0f * (float)sum * factors[0];
    }
  }

  template <bool Once, int R, int P>
  XK_INLINE void add(const Stretch &s, const uint8_t *const *x, f32x16 (*c)[P]) {
    ByteSums sum[R][P][kParts];
    const uint8_t *w = s.w;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = (ByteSums){};
#pragma GCC unroll 1  // unrolled, the compiler loads all of a stretch first and keeps it on the stack
    for (int64_t k = 0; k < kStretch4; k += 8, w += 64) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {  // low nibbles, then high ones
        if (P > 2) asm volatile("" ::: "memory");  // read again, rather than keep sums on the stack
        vb line[P][kParts];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
          XK_PARTS {
            const vb both = *(const vb_memory *)(w + p * s.w_stride + i * XK_VECTOR_BYTES);
            line[p][i] = (j ? (vb)((vs)both >> 4) : both) & 15;
          }
          if (Once && !j) __builtin_prefetch(w + p * s.w_stride + fetch_ahead(P * s.w_stride), 0, fetch_into(R));
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const vb four = (vb)broadcast32(x[r] + s.at + k + 4 * j);
#pragma GCC unroll 4
          for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = add_bytes(sum[r][p][i], line[p][i], four);
        }
      }
    }
    vi steps[R][P][kParts];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS steps[r][p][i] = whole(sum[r][p][i]);
    add_stretch<Int4, R, P>(s, x, steps, c);
  }
};

static inline const char *check_group(int64_t group) {
  const bool known = group == 0 || group == 32 || group == 64 || group == 128;
  return known ? nullptr : "group must be 32, 64 or 128, or 0 for one scale an output";
}
static inline int64_t padded_inputs(int64_t k, int64_t group) {
  const int64_t unit = group ? group : 32;
  return (k + unit - 1) / unit * unit;
}
template <class Type>
static int64_t weight_bytes(int64_t inputs) {  // of 16 outputs, without their scales
  return inputs * 2 * Type::bits;
}
template <class Type>
static int64_t int_panel_bytes(int64_t padded, int64_t group) {
  return padded / (group ? group : padded) * kScaleBytes + weight_bytes<Type>(padded);
}

// All inputs of the P panels at w, for rows row..row+R-1; their sums, times the scales of the rows, go to `to`.
template <class Type, bool Once, int R, int P>
static void int_rows(const IntProduct &t, const uint8_t *w, float *to, int64_t row) {
  const int64_t group = t.group ? t.group : t.x.k, stretch = Type::stretch(group);
  const uint8_t *x[R];
  f32x16 c[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    x[r] = t.x_row(row + r);
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) c[r][p] = zero();
  }
  Stretch s = {w, w, t.w_stride, t.x.k, 0, 0};
  for (int64_t left = 0; s.at < t.x.k; left -= s.inputs) {
    if (!left) left = group, s.scales = s.w, s.w += kScaleBytes;
    s.inputs = min(stretch, left);
    Type::template add<Once, R, P>(s, x, c);
    s.at += s.inputs, s.w += weight_bytes<Type>(s.inputs);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      if constexpr (Type::kRowScale) c[r][p] = c[r][p] * set1(Type::row_scale(x[r], t.x.k));
      store(to + (row + r) * t.c_row + p * t.c_stride, c[r][p]);
    }
}

// Panels that a tile of rows takes together. Where there are many registers: those of a tile that reads them once, from memory, as
// products with float weights take; else as many as leave registers for the scaled sums.
constexpr int int_panels(int rows, bool once) {
  return kAccumulators >= 24 ? (once || rows <= 4 ? tile_panels(rows) : 2) : rows == 1 && kAccumulators >= 4 ? 2 : 1;
}

template <class Type, bool Once, int R = (Once ? kFewRows : kTileRows)>
static void int_tile(const IntProduct &t, int64_t first, int64_t row, int rows, int64_t panels) {
  if (rows == R) {
    constexpr int wide = int_panels(R, Once);
    const uint8_t *w = t.w + first * t.w_stride;
    float *to = t.c + first * t.c_stride;
    const auto step = [&](int count) { w += count * t.w_stride, to += count * t.c_stride, panels -= count; };
    for (; panels >= wide; step(wide)) int_rows<Type, Once, R, wide>(t, w, to, row);
    if (wide > 2 && panels >= 2) int_rows<Type, Once, R, (wide > 2 ? 2 : 1)>(t, w, to, row), step(2);
    for (; panels > 0; step(1)) int_rows<Type, Once, R, 1>(t, w, to, row);
  } else if constexpr (R > 1) {
    int_tile<Type, Once, R - 1>(t, first, row, rows, panels);
  }
}

// `rows` rows times `panels` panels. One tile of rows reads every panel once, from end to end; many pass a few panels at a time,
// which stay in L2, as do the rows.
template <class Type>
static void int_product(const IntProduct &t, int64_t rows, int64_t panels) {
  if (rows <= kFewRows) return int_tile<Type, true>(t, 0, 0, (int)rows, panels);
  const int64_t all = (rows + kTileRows - 1) / kTileRows, block = int_panels((int)((rows + all - 1) / all), false);
  for (int64_t p = 0; p < panels; p += block)
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row, tiles = (left + kTileRows - 1) / kTileRows, height = (left + tiles - 1) / tiles;
      int_tile<Type, false>(t, p, row, (int)height, min(block, panels - p));
      row += height;
    }
}

// Of all the rows of a call, units of whole rows at a time.
template <class Type>
static void quantise_rows(const float *x, int64_t k, int64_t group, bool planes, uint8_t *to, Rows rows) {
  const int64_t padded = padded_inputs(k, group), bytes = Type::row_bytes(padded);
  for (int64_t r = rows.begin; r < rows.end; r++) Type::quantise(x + r * k, k, padded, planes, to + r * bytes);
}

// One output of a packed weight, at its k inputs: `panels` are the weight's, an output is lane `row % 16` of panel `row / 16`.
template <class Type>
static void int_row(const uint8_t *panels, int64_t row, int64_t k, int64_t group, float *out) {
  const int64_t padded = padded_inputs(k, group), lane = row % 16, each = group ? group : padded;
  const uint8_t *w = panels + row / 16 * int_panel_bytes<Type>(padded, group);
  for (int64_t i = 0; i < k; i += each, w += kScaleBytes + weight_bytes<Type>(each)) {
    float scales[16];
    store(scales, load_f16(w));
    for (int64_t j = 0; j < min(each, k - i); j++) out[i + j] = scales[lane] * (float)Type::step(w + kScaleBytes, lane, j);
  }
}

}  // namespace XK_LEVEL
