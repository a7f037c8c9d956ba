// Activation functions of sixteen numbers.
#pragma once
#include "vmath.h"

namespace XK_LEVEL {

struct Silu {
  XK_INLINE f32x16 of(f32x16 x) { return x / (set1(1.0f) + exp(zero() - x)); }
};
struct Gelu {
  XK_INLINE f32x16 of(f32x16 x) { return set1(0.5f) * x * (set1(1.0f) + erf(x * set1(0.707106781f))); }
};
struct GeluTanh {
  XK_INLINE f32x16 of(f32x16 x) {
    const f32x16 inner = fma(x * x * x, set1(0.044715f), x) * set1(0.797884561f);
    return set1(0.5f) * x * (set1(1.0f) + tanh(inner));
  }
};
struct Relu {
  XK_INLINE f32x16 of(f32x16 x) { return select_less(x, zero(), zero(), x); }
};
struct Relu2 {
  XK_INLINE f32x16 of(f32x16 x) {
    const f32x16 y = Relu::of(x);
    return y * y;
  }
};

}  // namespace XK_LEVEL
