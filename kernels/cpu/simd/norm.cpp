// layer_norm, means of rows, and rms_norm and add_rms_norm: out = x * rsqrt(mean(x^2) + eps) * weight, as transformers computes it. A row's squares are summed in
// sixteen fixed lanes and one fixed tree, whatever the other rows are.
#include <math.h>

#include "common.h"
#include "norm.h"

namespace XK_LEVEL {
namespace {

const char *check(const Call &c) { return c.ints[0] < 1 ? "width must be positive" : nullptr; }
int64_t units(const Call &c, const Step &s) { return row_units(c.rows(s), c.ints[0]); }

void run_norm(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const float *x = c.arg<const float>(0, s) + r * width;
    scale_row(x, c.arg<const float>(1, s), inverse_rms(x, width, c.floats[0]), c.arg<float>(2, s) + r * width, width);
  }
}

void run_add_norm(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const float *x = c.arg<const float>(0, s) + r * width, *residual = c.arg<const float>(1, s) + r * width;
    float *sum = c.arg<float>(4, s) + r * width;
    for (int64_t i = 0; i < width; i += 16)
      store_some(sum + i, load_some(x + i, width - i) + load_some(residual + i, width - i), width - i);
    scale_row(sum, c.arg<const float>(2, s), inverse_rms(sum, width, c.floats[0]), c.arg<float>(3, s) + r * width, width);
  }
}

// The mean of a row, of `x - center`, or of its squares: sixteen lanes and one tree, as for the squares of rms_norm.
template <bool kSquares>
XK_INLINE float row_mean(const float *x, int64_t width, float center) {
  f32x16 even = zero(), odd = zero();
  const f32x16 c = set1(center);
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) {
    const f32x16 a = load(x + i) - c, b = load(x + i + 16) - c;
    even = kSquares ? fma(a, a, even) : even + a;
    odd = kSquares ? fma(b, b, odd) : odd + b;
  }
  for (; i < width; i += 16) {
    float lane[16];
    store(lane, load_some(x + i, width - i) - c);
    for (int64_t l = width - i; l < 16; l++) lane[l] = 0.0f;  // lanes past the row would add the center
    const f32x16 a = load(lane);
    even = kSquares ? fma(a, a, even) : even + a;
  }
  return reduce_add(even + odd) / (float)width;
}

void run_layer_norm(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  const float *weight = c.arg<const float>(1, s), *bias = c.arg<const float>(2, s);
  const int64_t heads = c.ints[1];
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const float *x = c.arg<const float>(0, s) + r * width;
    float *out = c.arg<float>(3, s) + r * width;
    const float center = row_mean<false>(x, width, 0.0f);
    const f32x16 factor = set1(1.0f / sqrtf(row_mean<true>(x, width, center) + c.floats[0])), mean = set1(center);
    const int64_t at = r % heads * width;
    for (int64_t i = 0; i < width; i += 16) {
      f32x16 y = (load_some(x + i, width - i) - mean) * factor;
      if (weight) y = y * load_some(weight + at + i, width - i);
      if (bias) y = y + load_some(bias + at + i, width - i);
      store_some(out + i, y, width - i);
    }
  }
}

const char *check_layer_norm(const Call &c) { return c.ints[0] < 1 || c.ints[1] < 1 ? "width and heads must be positive" : nullptr; }

void run_mean(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  for (int64_t r = rows.begin; r < rows.end; r++)
    c.arg<float>(1, s)[r] = row_mean<false>(c.arg<const float>(0, s) + r * width, width, 0.0f);
}

}  // namespace

const Kernel norm_kernels[] = {
    {"rms_norm.f32", "x weight out", "width", "eps", check, no_scratch, units, run_norm},
    {"add_rms_norm.f32", "x residual weight out sum", "width", "eps", check, no_scratch, units, run_add_norm},
    {"layer_norm.f32", "x weight? bias? out", "width heads", "eps", check_layer_norm, no_scratch, units, run_layer_norm},
    {"mean.f32", "x out", "width", "", check, no_scratch, units, run_mean},
    {},
};

}  // namespace XK_LEVEL
