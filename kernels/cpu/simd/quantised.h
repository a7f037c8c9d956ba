// Products with quantised weights. Rows of activations are quantised first, then products of a stretch of inputs are summed as whole
// numbers, which is exact and so has no order; stretches are added in order along k as float32. So for any rows and panels together
// the bits of an output are the same.
//   int8 weights: activations are int16 under one scale a row, a stretch is a group (of at most 128 inputs).
//   int4 weights: activations are int8 under a scale for every 32 inputs, which are a stretch.
//
// A panel of 16 outputs is, group after group: 16 scales as float16, then the group's inputs.
//   int8: [two inputs][16 outputs][2] bytes.
//   int4: [eight inputs][two halves of 8 outputs][8][4] bytes: low nibbles are the first four inputs, high nibbles the others, plus 8.
// Inputs past k are zero.
#pragma once
#include "common.h"
#include "panel.h"

namespace XK_LEVEL {

typedef int16_t vs __attribute__((vector_size(XK_VECTOR_BYTES)));
typedef uint8_t vb __attribute__((vector_size(XK_VECTOR_BYTES)));
typedef int16_t vs_memory __attribute__((vector_size(XK_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t vi_memory __attribute__((vector_size(XK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint8_t vb_memory __attribute__((vector_size(XK_VECTOR_BYTES), aligned(4), may_alias));

constexpr int64_t kScaleBytes = 32;  // of one panel's scales
constexpr int64_t kStretch4 = 32;    // inputs of an int4 stretch
constexpr int64_t kStretch8 = 128;   // most inputs of an int8 stretch: 128 * 127 * 32767 stays below 2^31

// Lane i: a[2i] * b[2i] + a[2i + 1] * b[2i + 1].
XK_INLINE vi multiply_pairs(vs a, vs b) {
#if defined(__AVX512BW__)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  const int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  return (vi)vpaddq_s32(low, vmull_high_s16((int16x8_t)a, (int16x8_t)b));
#else
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}

// The same of bytes, the first from 0 to 15, the second signed: at most 2 * 15 * 127, so that eight fit an int16.
XK_INLINE vs multiply_byte_pairs(vb a, vb b) {
#if defined(__AVX512BW__)
  return (vs)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vs)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)a), vget_low_s8((int8x16_t)b));
  return (vs)vpaddq_s16(low, vmull_high_s8((int8x16_t)a, (int8x16_t)b));
#else
  return (vs)_mm_maddubs_epi16((__m128i)a, (__m128i)b);
#endif
}

XK_INLINE vi broadcast32(const void *p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return bits - (vi){};
}

XK_INLINE f32x16 load_f16(const uint8_t *p) {
  f32x16 r;
#if XK_VECTOR_BYTES == 64
  r.v[0] = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif XK_VECTOR_BYTES == 32
  XK_PARTS r.v[i] = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + i * 16)));
#elif defined(__aarch64__)
  XK_PARTS r.v[i] = (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p + i * 8))));
#else
  XK_PARTS {  // exponent and mantissa moved in place, then scaled by 2^112; exact for subnormals too
    const vu half = (vu)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(p + i * 8)));
    const vf magnitude = (vf)((half & 0x7fffu) << 13) * 0x1p112f;
    r.v[i] = (vf)((vu)magnitude | (half & 0x8000u) << 16);
  }
#endif
  return r;
}

XK_INLINE f32x16 to_float(const vi *sum) {
  f32x16 r;
  XK_PARTS r.v[i] = __builtin_convertvector(sum[i], vf);
  return r;
}

// The greatest magnitude among n values, as bits: magnitudes order as their bits do, NaN above all.
XK_INLINE int32_t greatest_bits(const float *x, int64_t n) {
  vi most[kParts];
  XK_PARTS most[i] = (vi){};
  for (int64_t j = 0; j < n; j += 16) {
    const f32x16 value = load_some(x + j, n - j);
    XK_PARTS {
      const vi bits = (vi)value.v[i] & 0x7fffffff;
      most[i] = bits > most[i] ? bits : most[i];
    }
  }
  int32_t lanes[16], greatest = 0;
  memcpy(lanes, most, sizeof lanes);
  for (int i = 0; i < 16; i++) greatest = lanes[i] > greatest ? lanes[i] : greatest;
  return greatest;
}

// Whole steps of x * steps, to nearest even; |x * steps| is below 2^22.
XK_INLINE void whole_steps(f32x16 x, float steps, int32_t *whole) {
  XK_PARTS *(vi_memory *)(whole + i * kLanes) = (vi)(x.v[i] * steps + 12582912.0f) - 0x4b400000;
}

struct Span {  // of values of a row under one scale: what a step is worth, and how many make 1
  float step, steps;
  bool finite;
};
XK_INLINE Span span_of(const float *x, int64_t n, float most) {
  const int32_t bits = greatest_bits(x, n);
  float magnitude;
  memcpy(&magnitude, &bits, 4);
  if (bits >= 0x7f800000) return {__builtin_nanf(""), 0, false};  // and so its results are NaN
  if (magnitude < 0x1p-100f) return {0, 0, true};
  return {magnitude / most, most / magnitude, true};
}

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
  float *c;              // sums of the first panel, [rows, 16]
  int64_t c_row, c_stride;
  const int32_t *pick = nullptr;  // the rows of x that are meant, where a product gathers; consecutive rows otherwise

  inline __attribute__((always_inline)) const uint8_t *x_row(int64_t r) const { return x.row(pick ? pick[r] : row + r); }
};

// Weights of a stretch, for P panels, and where their sums go.
struct Stretch {
  const uint8_t *w, *scales;
  int64_t w_stride, scale_stride, at, inputs;
  float *c;
  int64_t c_row, c_stride;
};

struct Int8 {
  static constexpr int64_t bits = 8, wide_bytes = 32;  // of one widened input
  static int64_t stretch(int64_t group) { return min(group, kStretch8); }

  // int16 values, then the scale.
  static int64_t row_bytes(int64_t padded) { return (2 * padded + 4 + 63) / 64 * 64; }
  static float row_scale(const QuantisedRows &x, int64_t r) { return *(const float *)(x.row(r) + 2 * x.k); }
  static void quantise(const float *x, int64_t k, int64_t padded, uint8_t *to) {
    const Span span = span_of(x, k, 32767.0f);
    for (int64_t j = 0; j < padded; j += 16) {
      int32_t whole[16];
      whole_steps(j < k && span.finite ? load_some(x + j, k - j) : zero(), span.steps, whole);
      for (int i = 0; i < 16; i++) ((int16_t *)to)[j + i] = (int16_t)whole[i];
    }
    *(float *)(to + 2 * padded) = span.step;
  }

  template <bool Wide>
  XK_INLINE vs weights_at(const uint8_t *p, int i) {
    if constexpr (Wide) return *(const vs_memory *)(p + i * XK_VECTOR_BYTES);
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
  static void widen(const uint8_t *w, int64_t inputs, uint8_t *to) {
    for (int64_t k = 0; k < inputs; k += 2, w += 32, to += 64) XK_PARTS *(vs_memory *)(to + i * XK_VECTOR_BYTES) = weights_at<false>(w, i);
  }

  template <bool Wide, int R, int P>
  XK_INLINE void add(const IntProduct &t, const Stretch &s, int64_t row) {
    vi sum[R][P][kParts];
    const uint8_t *x[R], *w = s.w;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      x[r] = t.x_row(row + r) + 2 * s.at;
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = (vi){};
    }
    for (int64_t k = 0; k < s.inputs; k += 2, w += Wide ? 64 : 32) {
      vs line[P][kParts];
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        XK_PARTS line[p][i] = weights_at<Wide>(w + p * s.w_stride, i);
        if constexpr (R <= 2 && !Wide) __builtin_prefetch(w + p * s.w_stride + kFetchAhead, 0, 2);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const vs pair = (vs)broadcast32(x[r] + 2 * k);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] += multiply_pairs(pair, line[p][i]);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      const f32x16 scale = load_f16(s.scales + p * s.scale_stride);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        float *to = s.c + (row + r) * s.c_row + p * s.c_stride;
        store(to, fma(to_float(sum[r][p]), scale, s.at ? load(to) : zero()));
      }
    }
  }
};

struct Int4 {
  static constexpr int64_t bits = 4, wide_bytes = 16;
  static int64_t stretch(int64_t) { return kStretch4; }

  // int8 values, then for every stretch what a step is worth, and that times 8 and the sum of the values.
  static int64_t row_bytes(int64_t padded) { return (padded + padded / kStretch4 * 8 + 63) / 64 * 64; }
  static float row_scale(const QuantisedRows &, int64_t) { return 1.0f; }
  static void quantise(const float *x, int64_t k, int64_t padded, uint8_t *to) {
    float *factors = (float *)(to + padded);
    for (int64_t j = 0; j < padded; j += kStretch4, factors += 2) {
      const int64_t some = max(0, min(kStretch4, k - j));
      const Span span = span_of(x + j, some, 127.0f);
      int32_t whole[kStretch4], sum = 0;
      for (int64_t h = 0; h < kStretch4; h += 16)
        whole_steps(h < some && span.finite ? load_some(x + j + h, some - h) : zero(), span.steps, whole + h);
      for (int64_t i = 0; i < kStretch4; i++) {
        to[j + i] = (uint8_t)(int8_t)whole[i];
        sum += whole[i];
      }
      factors[0] = span.step;
      factors[1] = -8.0f * (float)sum * span.step;
    }
  }

  static void widen(const uint8_t *w, int64_t inputs, uint8_t *to) {
    for (int64_t k = 0; k < inputs; k += 8, w += 64, to += 128)
      XK_PARTS {
        const vb both = *(const vb_memory *)(w + i * XK_VECTOR_BYTES);
        *(vb_memory *)(to + i * XK_VECTOR_BYTES) = both & 15;
        *(vb_memory *)(to + 64 + i * XK_VECTOR_BYTES) = (vb)((vs)both >> 4) & 15;
      }
  }

  template <bool Wide, int R, int P>
  XK_INLINE void add(const IntProduct &t, const Stretch &s, int64_t row) {
    vs sum[R][P][kParts];
    const uint8_t *x[R], *w = s.w;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      x[r] = t.x_row(row + r) + s.at;
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = (vs){};
    }
    constexpr int kFours = Wide ? 1 : 2;  // times four inputs
#pragma GCC unroll 8
    for (int64_t k = 0; k < kStretch4; k += 4 * kFours, w += 64) {
      vb line[P][kFours][kParts];
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        XK_PARTS {
          const vb both = *(const vb_memory *)(w + p * s.w_stride + i * XK_VECTOR_BYTES);
          line[p][0][i] = Wide ? both : both & 15;
          if constexpr (!Wide) line[p][1][i] = (vb)((vs)both >> 4) & 15;
        }
        if constexpr (R <= 2 && !Wide) __builtin_prefetch(w + p * s.w_stride + kFetchAhead, 0, 2);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int j = 0; j < kFours; j++) {
          const vb four = (vb)broadcast32(x[r] + k + 4 * j);
#pragma GCC unroll 4
          for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] += multiply_byte_pairs(line[p][j][i], four);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      const f32x16 scale = load_f16(s.scales + p * s.scale_stride);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const float *factors = (const float *)(t.x_row(row + r) + t.x.k) + s.at / kStretch4 * 2;
        float *to = s.c + (row + r) * s.c_row + p * s.c_stride;
        vi whole[kParts];
        XK_PARTS whole[i] = multiply_pairs(sum[r][p][i], (vs){} + 1);
        store(to, fma(fma(to_float(whole), set1(factors[0]), set1(factors[1])), scale, s.at ? load(to) : zero()));
      }
    }
  }
};

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

// Few rows: panels as they are, read once.
template <class Type, int R, int P>
static void int_rows(const IntProduct &t) {
  const int64_t group = t.group ? t.group : t.x.k, stretch = Type::stretch(group);
  Stretch s = {t.w, t.w, t.w_stride, t.w_stride, 0, 0, t.c, t.c_row, t.c_stride};
  for (int64_t begin = 0; begin < t.x.k; begin += group) {
    s.scales = s.w;
    s.w += kScaleBytes;
    for (s.at = begin; s.at < begin + group; s.at += stretch) {
      s.inputs = min(stretch, begin + group - s.at);
      Type::template add<false, R, P>(t, s, 0);
      s.w += weight_bytes<Type>(s.inputs);
    }
  }
}

constexpr int kFewIntRows = kTileRows < 4 ? kTileRows : 4;  // beyond, widening once for all rows pays

template <class Type, int R = kFewIntRows>
static void int_few(IntProduct t, int rows, int64_t panels) {
  if (rows == R) {
    constexpr int wide = R == 1 && kAccumulators >= 4 ? 2 : 1;
    const auto step = [&](int count) { t.w += count * t.w_stride, t.c += count * t.c_stride, panels -= count; };
    for (; panels >= wide; step(wide)) int_rows<Type, R, wide>(t);
    if (wide > 1 && panels) int_rows<Type, R, 1>(t);
  } else if constexpr (R > 1) {
    int_few<Type, R - 1>(t, rows, panels);
  }
}

// Stretches at..end-1 of one panel, widened, for a tile of rows.
template <class Type, int R = kTileRows>
static void int_tile(const IntProduct &t, Stretch s, int64_t row, int rows, int64_t end, int64_t stretch, int64_t group,
                     int64_t group_bytes) {
  if (rows == R) {
    for (const int64_t begin = s.at; s.at < end; s.at += stretch, s.w += stretch * Type::wide_bytes) {
      s.inputs = min(stretch, end - s.at);
      Stretch now = s;
      now.scales += (s.at / group - begin / group) * group_bytes;
      Type::template add<true, R, 1>(t, now, row);
    }
  } else if constexpr (R > 1) {
    int_tile<Type, R - 1>(t, s, row, rows, end, stretch, group, group_bytes);
  }
}

// Sums of `rows` rows times `panels` panels over all of k. `expanded` is memory of the thread, kExpandedBytes.
template <class Type>
static void int_multiply(IntProduct t, int64_t rows, int64_t panels, uint8_t *expanded) {
  if (rows <= kFewIntRows) return int_few<Type>(t, (int)rows, panels);
  const int64_t group = t.group ? t.group : t.x.k, stretch = Type::stretch(group), group_bytes = kScaleBytes + weight_bytes<Type>(group);
  for (int64_t p = 0; p < panels; p++, t.w += t.w_stride, t.c += t.c_stride) {
    for (int64_t begin = 0; begin < t.x.k; begin += kDepthBlock) {
      const int64_t end = min(begin + kDepthBlock, t.x.k);
      for (int64_t k = begin; k < end; k += stretch) {
        const uint8_t *w = t.w + k / group * group_bytes + kScaleBytes + weight_bytes<Type>(k % group);
        Type::widen(w, min(stretch, end - k), expanded + (k - begin) * Type::wide_bytes);
      }
      const Stretch s = {expanded, t.w + begin / group * group_bytes, 0, 0, begin, 0, t.c, t.c_row, 0};
      for (int64_t row = 0; row < rows;) {
        const int64_t left = rows - row, tiles = (left + kTileRows - 1) / kTileRows, height = (left + tiles - 1) / tiles;
        int_tile<Type>(t, s, row, (int)height, end, stretch, group, group_bytes);
        row += height;
      }
    }
  }
}

}  // namespace XK_LEVEL
