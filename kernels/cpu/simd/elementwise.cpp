// Activations, gated and plain, and the sum and product of two arrays.
#include "common.h"
#include "vmath.h"

namespace XK_LEVEL {
namespace {

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
struct Add {
  XK_INLINE f32x16 of(f32x16 a, f32x16 b) { return a + b; }
};
struct Mul {
  XK_INLINE f32x16 of(f32x16 a, f32x16 b) { return a * b; }
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
    {"silu.f32", "x out", "width", "", check, no_scratch, units, run_unary<Silu>},
    {"gelu.f32", "x out", "width", "", check, no_scratch, units, run_unary<Gelu>},
    {"gelu_tanh.f32", "x out", "width", "", check, no_scratch, units, run_unary<GeluTanh>},
    {"add.f32", "a b out", "width", "", check, no_scratch, units, run_binary<Add>},
    {"mul.f32", "a b out", "width", "", check, no_scratch, units, run_binary<Mul>},
    {},
};

}  // namespace XK_LEVEL
