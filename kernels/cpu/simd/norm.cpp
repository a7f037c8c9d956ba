// rms_norm and add_rms_norm: out = x * rsqrt(mean(x^2) + eps) * weight, as transformers computes it. A row's squares are summed in
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

}  // namespace

const Kernel norm_kernels[] = {
    {"rms_norm.f32", "x weight out", "width", "eps", check, no_scratch, units, run_norm},
    {"add_rms_norm.f32", "x residual weight out sum", "width", "eps", check, no_scratch, units, run_add_norm},
    {},
};

}  // namespace XK_LEVEL
