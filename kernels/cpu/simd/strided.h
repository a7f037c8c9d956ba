// Values seen along strides: rows times three inner axes, strides in elements. Those of axes named by a bit of `scaled` count in rows of
// the call (a heads-first value [H, T, D] has an axis whose stride is T * D). Work is cut by lines: a row's index along the first axis.
#pragma once
#include "common.h"

namespace XK_LEVEL {

struct View {  // strides of rows and of the three axes
  int64_t row, axis[3];

  int64_t at(int64_t line, int64_t n0) const { return line / n0 * row + line % n0 * axis[0]; }
};
// ints[at .. at+3] are a view; bits bit .. bit+2 of `scaled` name its axes that count in rows.
static inline View view_of(const Call &c, int at, int64_t scaled, int bit, int64_t rows) {
  View v{c.ints[at], {}};
  for (int i = 0; i < 3; i++) v.axis[i] = c.ints[at + 1 + i] * (scaled >> (bit + i) & 1 ? rows : 1);
  return v;
}

static inline int64_t line_width(const Call &c) { return c.ints[1] * c.ints[2]; }
static inline int64_t line_units(const Call &c, const Step &s) {
  const int64_t width = line_width(c);
  return width ? row_units(c.rows(s) * c.ints[0], width) : 0;
}
static inline Rows lines_of(const Call &c, const Step &s, int64_t unit) { return rows_of(unit, c.rows(s) * c.ints[0], line_width(c)); }

static inline const char *check_views(const Call &c) {
  for (int i = 0; i < XK_MAX_INTS; i++)
    if (c.ints[i] < 0) return "sizes and strides must not be negative";
  int64_t all = 0;
  if (__builtin_mul_overflow(c.ints[0], c.ints[1], &all) || __builtin_mul_overflow(all, c.ints[2], &all) || all >> 40)
    return "n0, n1 and n2 are more than a row can have";
  return nullptr;
}

}  // namespace XK_LEVEL
