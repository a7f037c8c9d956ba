// Activations, gated and plain, elementary functions, and arithmetic on two arrays of one shape.
#include <math.h>

#include "activation.h"
#include "arithmetic.h"
#include "common.h"

namespace XK_LEVEL {
namespace {

struct Sigmoid {
  XK_INLINE f32x16 of(f32x16 x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }
};
struct Tanh {
  XK_INLINE f32x16 of(f32x16 x) { return tanh(x); }
};
struct Erf {
  XK_INLINE f32x16 of(f32x16 x) { return erf(x); }
};
struct Exp {
  XK_INLINE f32x16 of(f32x16 x) { return exp(x); }
};
struct Neg {
  XK_INLINE f32x16 of(f32x16 x) { return x * set1(-1.0f); }
};
struct Abs {
  XK_INLINE f32x16 of(f32x16 x) { return abs(x); }
};
struct Cube {
  XK_INLINE f32x16 of(f32x16 x) { return x * x * x; }
};
struct Sqrt {
  XK_INLINE f32x16 of(f32x16 x) {
    float lane[16];
    store(lane, x);
    for (float &l : lane) l = sqrtf(l);
    return load(lane);
  }
};
struct Rsqrt {
  XK_INLINE f32x16 of(f32x16 x) { return set1(1.0f) / Sqrt::of(x); }
};
// Of libm, in double: arguments are positions times frequencies, which a reduction in single precision would blur.
template <double (*f)(double)>
struct Each {
  XK_INLINE f32x16 of(f32x16 x) {
    float lane[16];
    store(lane, x);
    for (float &l : lane) l = (float)f((double)l);
    return load(lane);
  }
};

const char *check(const Call &c) { return c.ints[0] < 1 ? "width must be positive" : nullptr; }
int64_t units(const Call &c, const Step &s) { return row_units(c.rows(s), c.ints[0]); }

template <class F>
void run_gated(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const float *gate = c.arg<const float>(0, s) + r * 2 * width, *up = gate + width;
    float *out = c.arg<float>(1, s) + r * width;
    for (int64_t i = 0; i < width; i += 16)
      store_some(out + i, F::of(load_some(gate + i, width - i)) * load_some(up + i, width - i), width - i);
  }
}

template <class F>
void run_unary(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  const float *x = c.arg<const float>(0, s);
  float *out = c.arg<float>(1, s);
  for (int64_t i = rows.begin * width, end = rows.end * width; i < end; i += 16)
    store_some(out + i, F::of(load_some(x + i, end - i)), end - i);
}

// clamp: x, out; width, which bounds there are; low high. A NaN stays.
void run_clamp(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  const f32x16 low = set1(c.floats[0]), high = set1(c.floats[1]);
  const float *x = c.arg<const float>(0, s);
  float *out = c.arg<float>(1, s);
  for (int64_t i = rows.begin * width, end = rows.end * width; i < end; i += 16) {
    f32x16 y = load_some(x + i, end - i);
    if (c.ints[1]) y = max(low, y);
    if (c.ints[2]) y = min(high, y);
    store_some(out + i, y, end - i);
  }
}

template <class F>
void run_binary(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  const float *a = c.arg<const float>(0, s), *b = c.arg<const float>(1, s);
  float *out = c.arg<float>(2, s);
  for (int64_t i = rows.begin * width, end = rows.end * width; i < end; i += 16)
    store_some(out + i, F::of(load_some(a + i, end - i), load_some(b + i, end - i)), end - i);
}

}  // namespace

const Kernel elementwise_kernels[] = {
    {"gated_silu.f32", "x out", "width", "", check, no_scratch, units, run_gated<Silu>},
    {"gated_gelu.f32", "x out", "width", "", check, no_scratch, units, run_gated<Gelu>},
    {"gated_gelu_tanh.f32", "x out", "width", "", check, no_scratch, units, run_gated<GeluTanh>},
    {"gated_relu.f32", "x out", "width", "", check, no_scratch, units, run_gated<Relu>},
    {"gated_relu2.f32", "x out", "width", "", check, no_scratch, units, run_gated<Relu2>},
    {"silu.f32", "x out", "width", "", check, no_scratch, units, run_unary<Silu>},
    {"gelu.f32", "x out", "width", "", check, no_scratch, units, run_unary<Gelu>},
    {"gelu_tanh.f32", "x out", "width", "", check, no_scratch, units, run_unary<GeluTanh>},
    {"relu.f32", "x out", "width", "", check, no_scratch, units, run_unary<Relu>},
    {"relu2.f32", "x out", "width", "", check, no_scratch, units, run_unary<Relu2>},
    {"sigmoid.f32", "x out", "width", "", check, no_scratch, units, run_unary<Sigmoid>},
    {"tanh.f32", "x out", "width", "", check, no_scratch, units, run_unary<Tanh>},
    {"erf.f32", "x out", "width", "", check, no_scratch, units, run_unary<Erf>},
    {"exp.f32", "x out", "width", "", check, no_scratch, units, run_unary<Exp>},
    {"neg.f32", "x out", "width", "", check, no_scratch, units, run_unary<Neg>},
    {"abs.f32", "x out", "width", "", check, no_scratch, units, run_unary<Abs>},
    {"cube.f32", "x out", "width", "", check, no_scratch, units, run_unary<Cube>},
    {"sqrt.f32", "x out", "width", "", check, no_scratch, units, run_unary<Sqrt>},
    {"rsqrt.f32", "x out", "width", "", check, no_scratch, units, run_unary<Rsqrt>},
    {"cos.f32", "x out", "width", "", check, no_scratch, units, run_unary<Each<cos>>},
    {"sin.f32", "x out", "width", "", check, no_scratch, units, run_unary<Each<sin>>},
    {"clamp.f32", "x out", "width has_low has_high", "low high", check, no_scratch, units, run_clamp},
    {"add.f32", "a b out", "width", "", check, no_scratch, units, run_binary<Add>},
    {"sub.f32", "a b out", "width", "", check, no_scratch, units, run_binary<Sub>},
    {"mul.f32", "a b out", "width", "", check, no_scratch, units, run_binary<Mul>},
    {"div.f32", "a b out", "width", "", check, no_scratch, units, run_binary<Div>},
    {},
};

}  // namespace XK_LEVEL
