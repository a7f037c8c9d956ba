// What every kernel file of a level starts from.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace XK_LEVEL {

using xk::Call;
using xk::Kernel;
using xk::Step;

XK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
XK_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t no_scratch(const Call &) { return 0; }

// Row-wise kernels: whole rows per unit, about this many elements, so that a unit is worth handing out.
constexpr int64_t kUnitElements = 16384;
static inline int64_t rows_per_unit(int64_t width) { return max(1, kUnitElements / width); }
static inline int64_t row_units(int64_t rows, int64_t width) {
  const int64_t each = rows_per_unit(width);
  return (rows + each - 1) / each;
}
struct Rows {
  int64_t begin, end;
};
static inline Rows rows_of(int64_t unit, int64_t rows, int64_t width) {
  const int64_t each = rows_per_unit(width);
  return {unit * each, min(rows, (unit + 1) * each)};
}

// Each table ends with an entry without a name.
extern const Kernel linear_kernels[], attention_kernels[], norm_kernels[], rope_kernels[], gather_kernels[], elementwise_kernels[];

}  // namespace XK_LEVEL
