// Arithmetic on two times sixteen numbers.
#pragma once
#include "vmath.h"

namespace XK_LEVEL {

struct Add {
  XK_INLINE f32x16 of(f32x16 a, f32x16 b) { return a + b; }
};
struct Sub {
  XK_INLINE f32x16 of(f32x16 a, f32x16 b) { return a - b; }
};
struct Mul {
  XK_INLINE f32x16 of(f32x16 a, f32x16 b) { return a * b; }
};
struct Div {
  XK_INLINE f32x16 of(f32x16 a, f32x16 b) { return a / b; }
};

}  // namespace XK_LEVEL
