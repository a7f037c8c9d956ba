// What every kernel file of a level starts from.
#pragma once
#include "../kernels.h"
#include "simd.h"

namespace XK_LEVEL {

using xk::Call;
using xk::Kernel;
using xk::Step;

XK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
XK_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int kBlockGroups = kKeyBlock / 16;
XK_INLINE int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

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

// The kernel files, in the order their tables are listed. A table is called <file>_kernels and ends with an entry without a name.
#define XK_KERNEL_FILES(X) \
  X(gather) X(linear) X(norm) X(rope) X(attention) X(elementwise) X(encode) X(sdpa) X(strided) X(typed) X(recurrent) X(experts)
#define XK_DECLARE(file) extern const Kernel file##_kernels[];
XK_KERNEL_FILES(XK_DECLARE)
#undef XK_DECLARE

}  // namespace XK_LEVEL
