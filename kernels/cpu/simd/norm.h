// One row of RMS normalisation, shared by the norm kernels and by the fused query/key kernel.
#pragma once
#include <math.h>

#include "simd.h"

namespace XK_LEVEL {

XK_INLINE float inverse_rms(const float *x, int64_t width, float eps) {
  f32x16 even = zero(), odd = zero();  // two chains, to hide the latency of FMA
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) {
    const f32x16 a = load(x + i), b = load(x + i + 16);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for (; i < width; i += 16) {
    const f32x16 a = load_some(x + i, width - i);
    even = fma(a, a, even);
  }
  return 1.0f / sqrtf(reduce_add(even + odd) / (float)width + eps);
}

// out = x * factor * weight; x and out may be the same row.
XK_INLINE void scale_row(const float *x, const float *weight, float factor, float *out, int64_t width) {
  const f32x16 f = set1(factor);
  for (int64_t i = 0; i < width; i += 16)
    store_some(out + i, load_some(x + i, width - i) * f * load_some(weight + i, width - i), width - i);
}

}  // namespace XK_LEVEL
