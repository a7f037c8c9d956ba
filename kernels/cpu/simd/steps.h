// Whole numbers in vectors: products of int16 and int8 summed in pairs, float16 scales, and the rounding of floats to steps.
#pragma once
#include "common.h"

namespace XK_LEVEL {

typedef int16_t vs __attribute__((vector_size(XK_VECTOR_BYTES)));
typedef uint8_t vb __attribute__((vector_size(XK_VECTOR_BYTES)));
typedef int16_t vs_memory __attribute__((vector_size(XK_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t vi_memory __attribute__((vector_size(XK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint8_t vb_memory __attribute__((vector_size(XK_VECTOR_BYTES), aligned(4), may_alias));

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

XK_INLINE vi add_pairs(vi sum, vs a, vs b) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return sum + multiply_pairs(a, b);
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

// Sums of up to eight of them: in fours at once where the machine can, else in int16 until the end.
#if defined(__AVX512VNNI__)
typedef vi ByteSums;
XK_INLINE vi add_bytes(vi sum, vb a, vb b) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
XK_INLINE vi begin_bytes(vi before) { return before; }
XK_INLINE vi end_bytes(vi, vi sum) { return sum; }
#else
typedef vs ByteSums;
XK_INLINE vs add_bytes(vs sum, vb a, vb b) { return sum + multiply_byte_pairs(a, b); }
XK_INLINE vs begin_bytes(vi) { return (vs){}; }
XK_INLINE vi end_bytes(vi before, vs sum) { return before + multiply_pairs(sum, (vs){} + 1); }
#endif

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
  typedef int32_t Four __attribute__((vector_size(16)));
  Four lanes[4];
  memcpy(lanes, most, sizeof lanes);
  for (int i = 1; i < 4; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  int32_t greatest = 0;
  for (int i = 0; i < 4; i++) greatest = lanes[0][i] > greatest ? lanes[0][i] : greatest;
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

}  // namespace XK_LEVEL
