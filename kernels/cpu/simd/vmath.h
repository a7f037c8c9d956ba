// Elementary functions on f32x16. Worst relative error over all floats is about 1e-7 for exp and tanh, 1e-7 absolute for erf; the
// polynomials are minimax fits in the manner of Cephes and of N. Juffa's erff.
#pragma once
#include "simd.h"

namespace XK_LEVEL {

// e^r for |r| <= ln(2) / 2.
XK_INLINE f32x16 exp_near(f32x16 r) {
  f32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return fma(p, r * r, r) + set1(1.0f);
}

// e^x; 0 below -87.3 (where the result would be subnormal), infinite above 88.7; NaN stays NaN.
XK_INLINE f32x16 exp(f32x16 x) {
  const f32x16 low = set1(-87.3365447f), high = set1(88.7228317f), input = x;
  x = min(high, max(low, x));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
  const f32x16 magic = set1(12582912.0f), shifted = fma(x, set1(1.44269504f), magic), n = shifted - magic;
  f32x16 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  const f32x16 p = exp_near(r);
  // 2^n in two steps: n may be 128, which has no float of its own.
  f32x16 scaled;
  XK_PARTS {
    const vi power = (vi)shifted.v[i] - (vi)magic.v[i], half = power >> 1;
    scaled.v[i] = p.v[i] * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
  }
  return select_less(input, low, zero(), select_less(high, input, set1(__builtin_inff()), scaled));
}

// The same numbers for x <= 0, where 2^n needs one step; what lies above gives anything.
XK_INLINE f32x16 exp_falling(f32x16 x) {
  const f32x16 low = set1(-87.3365447f), input = x;
  x = max(low, x);
  const f32x16 magic = set1(12582912.0f), shifted = fma(x, set1(1.44269504f), magic), n = shifted - magic;
  f32x16 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  const f32x16 p = exp_near(r);
  f32x16 scaled;
  XK_PARTS scaled.v[i] = p.v[i] * (vf)(((vi)shifted.v[i] << 23) + 0x3f800000);
  return select_less(input, low, zero(), scaled);
}

XK_INLINE float exp(float x) {
  float lane[16];
  store(lane, exp(set1(x)));
  return lane[0];
}

XK_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 a = abs(x), s = x * x, one = set1(1.0f);
  f32x16 p = set1(-5.70498872745e-3f);
  p = fma(p, s, set1(2.06390887954e-2f));
  p = fma(p, s, set1(-5.37397155531e-2f));
  p = fma(p, s, set1(1.33314422036e-1f));
  p = fma(p, s, set1(-3.33332819422e-1f));
  const f32x16 near = fma(p * s, x, x);
  const f32x16 far = copy_sign(one - set1(2.0f) / (exp(a + a) + one), x);
  return select_less(a, set1(0.625f), near, select_less(set1(0.0f), a, far, x));
}

XK_INLINE f32x16 erf(f32x16 x) {
  const f32x16 t = abs(x), s = x * x, one = set1(1.0f);
  f32x16 far = fma(set1(-1.72853470e-5f), t, set1(3.83197126e-4f));
  far = fma(far, s, fma(set1(-3.88396438e-3f), t, set1(2.42546219e-2f)));
  far = fma(far, t, set1(-1.06777877e-1f));
  far = fma(far, t, set1(-6.34846687e-1f));
  far = fma(far, t, set1(-1.28717512e-1f));
  far = fma(far, t, zero() - t);
  far = copy_sign(one - exp(far), x);
  f32x16 near = set1(-5.96761703e-4f);
  near = fma(near, s, set1(4.99119423e-3f));
  near = fma(near, s, set1(-2.67681349e-2f));
  near = fma(near, s, set1(1.12819925e-1f));
  near = fma(near, s, set1(-3.76125336e-1f));
  near = fma(near, s, set1(1.28379166e-1f));
  near = fma(near, x, x);
  return select_less(set1(0.927734375f), t, far, near);
}

}  // namespace XK_LEVEL
