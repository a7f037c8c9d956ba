// Data movement and float arithmetic over strides: copy (slices, transposes, expansions), concat, and the operations on operands that
// broadcast.
#include "strided.h"

#include "arithmetic.h"

#include <string.h>

namespace XK_LEVEL {
namespace {

XK_INLINE f32x16 load_strided(const float *p, int64_t stride, int64_t n) {
  if (stride == 1) return load_some(p, n);
  if (stride == 0) return set1(*p);
  float lane[16] = {0};
  for (int64_t i = 0; i < min(n, 16); i++) lane[i] = p[i * stride];
  return load(lane);
}
XK_INLINE void store_strided(float *p, int64_t stride, f32x16 x, int64_t n) {
  if (stride == 1) return store_some(p, x, n);
  float lane[16];
  store(lane, x);
  for (int64_t i = 0; i < min(n, 16); i++) p[i * stride] = lane[i];
}

// --- copy: x, out; n0 n1 n2, x's view, out's view, offset into x, scaled ---

template <class E>
void run_copy(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t rows = c.rows(s), *n = c.ints, scaled = c.ints[12];
  const View from = view_of(c, 3, scaled, 0, rows), to = view_of(c, 7, scaled, 3, rows);
  const E *x = c.arg<const E>(0, s) + c.ints[11];
  E *out = c.arg<E>(1, s);
  const Rows part = lines_of(c, s, unit);
  for (int64_t line = part.begin; line < part.end; line++)
    for (int64_t j = 0; j < n[1]; j++) {
      const E *p = x + from.at(line, n[0]) + j * from.axis[1];
      E *o = out + to.at(line, n[0]) + j * to.axis[1];
      if (from.axis[2] == 1 && to.axis[2] == 1) memcpy(o, p, (size_t)n[2] * sizeof(E));
      else
        for (int64_t k = 0; k < n[2]; k++) o[k * to.axis[2]] = p[k * from.axis[2]];
    }
}

// --- concat: x0 .. x7, out; their widths: rows of the parts side by side ---

enum { kParts8 = 8 };
int64_t joined(const Call &c) {
  int64_t width = 0;
  for (int i = 0; i < kParts8; i++) width += c.ints[i];
  return width;
}
const char *check_concat(const Call &c) {
  for (int i = 0; i < kParts8; i++)
    if (c.ints[i] < 0 || c.ints[i] >> 40 || (c.ints[i] > 0 && c.args[i].kind == XK_NONE)) return "every part has a width, and only parts do";
  return nullptr;
}
int64_t concat_units(const Call &c, const Step &s) { return joined(c) ? row_units(c.rows(s), joined(c)) : 0; }

template <class E>
void run_concat(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = joined(c);
  const Rows rows = rows_of(unit, c.rows(s), width);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    E *out = c.arg<E>(kParts8, s) + r * width;
    for (int i = 0; i < kParts8; out += c.ints[i++])
      if (c.ints[i]) memcpy(out, c.arg<const E>(i, s) + r * c.ints[i], (size_t)c.ints[i] * sizeof(E));
  }
}

// --- arithmetic: a, b, out; n0 n1 n2, the views of a, b and out, scaled. An operand that is none is the number beside it. ---

template <class F>
void run_strided(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t rows = c.rows(s), *n = c.ints, scaled = c.ints[15];
  const View va = view_of(c, 3, scaled, 0, rows), vb = view_of(c, 7, scaled, 3, rows), vo = view_of(c, 11, scaled, 6, rows);
  const bool has_a = c.args[0].kind != XK_NONE, has_b = c.args[1].kind != XK_NONE;
  const float *a = has_a ? c.arg<const float>(0, s) : c.floats, *b = has_b ? c.arg<const float>(1, s) : c.floats + 1;
  float *out = c.arg<float>(2, s);
  const Rows part = lines_of(c, s, unit);
  for (int64_t line = part.begin; line < part.end; line++)
    for (int64_t j = 0; j < n[1]; j++) {
      const float *p = a + va.at(line, n[0]) + j * va.axis[1], *q = b + vb.at(line, n[0]) + j * vb.axis[1];
      float *o = out + vo.at(line, n[0]) + j * vo.axis[1];
      for (int64_t k = 0; k < n[2]; k += 16)
        store_strided(o + k * vo.axis[2], vo.axis[2],
                      F::of(load_strided(p + k * va.axis[2], va.axis[2], n[2] - k), load_strided(q + k * vb.axis[2], vb.axis[2], n[2] - k)),
                      n[2] - k);
    }
}

const char *check_strided(const Call &c) {
  const bool numbers = (c.args[0].kind == XK_NONE && (c.ints[3] | c.ints[4] | c.ints[5] | c.ints[6])) ||
                       (c.args[1].kind == XK_NONE && (c.ints[7] | c.ints[8] | c.ints[9] | c.ints[10]));
  return numbers ? "a number has no strides" : check_views(c);
}

constexpr const char *kCopyInts = "n0 n1 n2 x_row x_0 x_1 x_2 out_row out_0 out_1 out_2 offset scaled";
constexpr const char *kInts = "n0 n1 n2 a_row a_0 a_1 a_2 b_row b_0 b_1 b_2 out_row out_0 out_1 out_2 scaled";
constexpr const char *kJoin = "x0 x1? x2? x3? x4? x5? x6? x7? out", *kWidths = "w0 w1 w2 w3 w4 w5 w6 w7";

#define XK_MOVES(suffix, E)                                                                      \
  {"copy." suffix, "x out", kCopyInts, "", check_views, no_scratch, line_units, run_copy<E>},    \
  {"concat." suffix, kJoin, kWidths, "", check_concat, no_scratch, concat_units, run_concat<E>}
#define XK_FLOATS(name, F) \
  {"strided_" name ".f32", "a? b? out", kInts, "a_number b_number", check_strided, no_scratch, line_units, run_strided<F>}

}  // namespace

const Kernel strided_kernels[] = {
    XK_MOVES("f32", float),
    XK_MOVES("i64", int64_t),
    XK_MOVES("i32", int32_t),
    XK_MOVES("u8", uint8_t),
    XK_FLOATS("add", Add),
    XK_FLOATS("sub", Sub),
    XK_FLOATS("mul", Mul),
    XK_FLOATS("div", Div),
    {},
};

}  // namespace XK_LEVEL
