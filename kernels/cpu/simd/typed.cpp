// What functions compute beside floats: whole numbers and truths (u8, 0 or 1) over strides, comparisons, choices, casts, ranges, picks.
#include <math.h>
#include <string.h>

#include "strided.h"

namespace XK_LEVEL {
namespace {

// --- two operands: a, b, out; n0 n1 n2, the views of a, b and out, scaled. An operand that is none is the number beside it. ---

template <class T>
T wrapped(uint64_t x) { return (T)x; }  // sums beyond the type wrap, as everywhere
struct Add {
  template <class T>
  static T of(T a, T b) { return wrapped<T>((uint64_t)a + (uint64_t)b); }
};
struct Sub {
  template <class T>
  static T of(T a, T b) { return wrapped<T>((uint64_t)a - (uint64_t)b); }
};
struct Mul {
  template <class T>
  static T of(T a, T b) { return wrapped<T>((uint64_t)a * (uint64_t)b); }
};
struct Max {
  template <class T>
  static T of(T a, T b) { return a != a || a > b ? a : b; }
};
struct Min {
  template <class T>
  static T of(T a, T b) { return a != a || a < b ? a : b; }
};
struct Eq {
  template <class T>
  static uint8_t of(T a, T b) { return a == b; }
};
struct Ne {
  template <class T>
  static uint8_t of(T a, T b) { return a != b; }
};
struct Lt {
  template <class T>
  static uint8_t of(T a, T b) { return a < b; }
};
struct Le {
  template <class T>
  static uint8_t of(T a, T b) { return a <= b; }
};
struct Gt {
  template <class T>
  static uint8_t of(T a, T b) { return a > b; }
};
struct Ge {
  template <class T>
  static uint8_t of(T a, T b) { return a >= b; }
};
struct And {
  template <class T>
  static uint8_t of(T a, T b) { return a && b; }
};
struct Or {
  template <class T>
  static uint8_t of(T a, T b) { return a || b; }
};
struct Xor {
  template <class T>
  static uint8_t of(T a, T b) { return !a != !b; }
};

const char *check_two(const Call &c) {
  for (int operand = 0; operand < 2; operand++)
    for (int i = 0; i < 4; i++)
      if (c.args[operand].kind == XK_NONE && c.ints[3 + operand * 4 + i]) return "a number has no strides";
  return check_views(c);
}

template <class F, class T, class Out>
void run_two(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t rows = c.rows(s), *n = c.ints, scaled = c.ints[15];
  const View va = view_of(c, 3, scaled, 0, rows), vb = view_of(c, 7, scaled, 3, rows), vo = view_of(c, 11, scaled, 6, rows);
  const T numbers[2] = {(T)c.floats[0], (T)c.floats[1]};
  const T *a = c.args[0].kind != XK_NONE ? c.arg<const T>(0, s) : numbers, *b = c.args[1].kind != XK_NONE ? c.arg<const T>(1, s) : numbers + 1;
  Out *out = c.arg<Out>(2, s);
  const Rows part = lines_of(c, s, unit);
  for (int64_t line = part.begin; line < part.end; line++)
    for (int64_t j = 0; j < n[1]; j++) {
      const T *p = a + va.at(line, n[0]) + j * va.axis[1], *q = b + vb.at(line, n[0]) + j * vb.axis[1];
      Out *o = out + vo.at(line, n[0]) + j * vo.axis[1];
      for (int64_t k = 0; k < n[2]; k++) o[k * vo.axis[2]] = F::of(p[k * va.axis[2]], q[k * vb.axis[2]]);
    }
}

// --- where: seen, a, b, out; n0 n1 n2, their views, scaled ---

template <class T>
void run_where(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t rows = c.rows(s), *n = c.ints, scaled = c.ints[19];
  const View vs = view_of(c, 3, scaled, 0, rows), va = view_of(c, 7, scaled, 3, rows), vb = view_of(c, 11, scaled, 6, rows),
             vo = view_of(c, 15, scaled, 9, rows);
  const uint8_t *seen = c.arg<const uint8_t>(0, s);
  const T *a = c.arg<const T>(1, s), *b = c.arg<const T>(2, s);
  T *out = c.arg<T>(3, s);
  const Rows part = lines_of(c, s, unit);
  for (int64_t line = part.begin; line < part.end; line++)
    for (int64_t j = 0; j < n[1]; j++) {
      const uint8_t *t = seen + vs.at(line, n[0]) + j * vs.axis[1];
      const T *p = a + va.at(line, n[0]) + j * va.axis[1], *q = b + vb.at(line, n[0]) + j * vb.axis[1];
      T *o = out + vo.at(line, n[0]) + j * vo.axis[1];
      for (int64_t k = 0; k < n[2]; k++) o[k * vo.axis[2]] = t[k * vs.axis[2]] ? p[k * va.axis[2]] : q[k * vb.axis[2]];
    }
}

// --- one operand: x, out; width. Casts, and not. ---

const char *check_width(const Call &c) { return c.ints[0] < 1 ? "width must be positive" : nullptr; }
int64_t width_units(const Call &c, const Step &s) { return row_units(c.rows(s), c.ints[0]); }

struct Not {
  static uint8_t of(uint8_t x) { return !x; }
};
template <class To>
struct Cast {
  template <class T>
  static To of(T x) { return (To)x; }
  static To of(float x) {  // toward zero; what is out of range has no meaning, but must not be undefined
    const float end = sizeof(To) == 8 ? 9223372036854775808.0f : 2147483648.0f;
    return x > -end && x < end ? (To)x : (To)1 << (sizeof(To) * 8 - 1);
  }
};
template <>
struct Cast<uint8_t> {
  template <class T>
  static uint8_t of(T x) { return x != 0; }
};
template <>
struct Cast<float> {
  template <class T>
  static float of(T x) { return (float)x; }
};

template <class F, class T, class Out>
void run_one(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  const T *x = c.arg<const T>(0, s);
  Out *out = c.arg<Out>(1, s);
  for (int64_t i = rows.begin * width; i < rows.end * width; i++) out[i] = F::of(x[i]);
}

// --- range: start, start + 1, … ; fill: a number everywhere ---

const char *sound(const Call &) { return nullptr; }
int64_t one_each(const Call &c, const Step &s) { return row_units(c.rows(s), 1); }

template <class T, int64_t step>
void run_range(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const Rows rows = rows_of(unit, c.rows(s), 1);
  T *out = c.arg<T>(0, s);
  for (int64_t i = rows.begin; i < rows.end; i++) out[i] = (T)(c.ints[0] + i * step);
}
void run_fill(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const Rows rows = rows_of(unit, c.rows(s), 1);
  float *out = c.arg<float>(0, s);
  for (int64_t i = rows.begin; i < rows.end; i++) out[i] = c.floats[0];
}

// --- take: x [rows, count, width], index [picks], out [rows, picks, width]; a negative index counts from the end ---

const char *check_take(const Call &c) {
  for (int i = 0; i < 3; i++)
    if (c.ints[i] < 0 || c.ints[i] >> 40) return "count, picks and width are sizes";
  return nullptr;
}
int64_t take_units(const Call &c, const Step &s) { return c.ints[2] ? row_units(c.rows(s) * c.ints[1], c.ints[2]) : 0; }

template <class T>
T nothing() { return 0; }
template <>
float nothing() { return NAN; }

template <class T>
void run_take(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t count = c.ints[0], picks = c.ints[1], width = c.ints[2];
  const Rows lines = rows_of(unit, c.rows(s) * picks, width);
  const int64_t *index = c.arg<const int64_t>(1, s);
  for (int64_t line = lines.begin; line < lines.end; line++) {
    const int64_t said = index[line % picks], at = said < 0 ? said + count : said;
    T *out = c.arg<T>(2, s) + line * width;
    if (at >= 0 && at < count) memcpy(out, c.arg<const T>(0, s) + (line / picks * count + at) * width, (size_t)width * sizeof(T));
    else
      for (int64_t i = 0; i < width; i++) out[i] = nothing<T>();  // what is not there is not read
  }
}

// --- cumsum: x [rows, count, width], out; sums along count ---

const char *check_sum(const Call &c) {
  for (int i = 0; i < 2; i++)
    if (c.ints[i] < 0 || c.ints[i] >> 40) return "count and width are sizes";
  return nullptr;
}
int64_t sum_units(const Call &c, const Step &s) { return c.ints[0] && c.ints[1] ? row_units(c.rows(s), c.ints[0] * c.ints[1]) : 0; }

template <class T>
void run_sum(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t count = c.ints[0], width = c.ints[1];
  const Rows rows = rows_of(unit, c.rows(s), count * width);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const T *x = c.arg<const T>(0, s) + r * count * width;
    T *out = c.arg<T>(1, s) + r * count * width;
    for (int64_t i = 0; i < count * width; i++) out[i] = i < width ? x[i] : (T)(out[i - width] + x[i]);
  }
}

constexpr const char *kTwo = "n0 n1 n2 a_row a_0 a_1 a_2 b_row b_0 b_1 b_2 out_row out_0 out_1 out_2 scaled";
constexpr const char *kWhere =
    "n0 n1 n2 seen_row seen_0 seen_1 seen_2 a_row a_0 a_1 a_2 b_row b_0 b_1 b_2 out_row out_0 out_1 out_2 scaled";

#define XK_TWO(name, suffix, F, T, Out) \
  {"strided_" name "." suffix, "a? b? out", kTwo, "a_number b_number", check_two, no_scratch, line_units, run_two<F, T, Out>}
#define XK_COMPARE(suffix, T)                                                                                             \
  XK_TWO("eq", suffix, Eq, T, uint8_t), XK_TWO("ne", suffix, Ne, T, uint8_t), XK_TWO("lt", suffix, Lt, T, uint8_t),       \
      XK_TWO("le", suffix, Le, T, uint8_t), XK_TWO("gt", suffix, Gt, T, uint8_t), XK_TWO("ge", suffix, Ge, T, uint8_t)
#define XK_WHOLE(suffix, T)                                                                                \
  XK_TWO("add", suffix, Add, T, T), XK_TWO("sub", suffix, Sub, T, T), XK_TWO("mul", suffix, Mul, T, T),    \
      {"range." suffix, "out", "start", "", sound, no_scratch, one_each, run_range<T, 1>},                 \
      {"fill." suffix, "out", "number", "", sound, no_scratch, one_each, run_range<T, 0>}
#define XK_EVERY(suffix, T)                                                                                           \
  {"strided_where." suffix, "seen a b out", kWhere, "", check_views, no_scratch, line_units, run_where<T>},           \
      {"take." suffix, "x index out", "count picks width", "", check_take, no_scratch, take_units, run_take<T>}
#define XK_NUMBER(suffix, T)                                                                                          \
  XK_TWO("max", suffix, Max, T, T), XK_TWO("min", suffix, Min, T, T),                                                 \
      {"cumsum." suffix, "x out", "count width", "", check_sum, no_scratch, sum_units, run_sum<T>}
#define XK_CAST(from, T, to, Out) {"cast_" to "." from, "x out", "width", "", check_width, no_scratch, width_units, run_one<Cast<Out>, T, Out>}

}  // namespace

const Kernel typed_kernels[] = {
    XK_WHOLE("i64", int64_t),
    XK_WHOLE("i32", int32_t),
    XK_COMPARE("f32", float),
    XK_COMPARE("i64", int64_t),
    XK_COMPARE("i32", int32_t),
    XK_TWO("eq", "u8", Eq, uint8_t, uint8_t),
    XK_TWO("ne", "u8", Ne, uint8_t, uint8_t),
    XK_TWO("and", "u8", And, uint8_t, uint8_t),
    XK_TWO("or", "u8", Or, uint8_t, uint8_t),
    XK_TWO("xor", "u8", Xor, uint8_t, uint8_t),
    {"not.u8", "x out", "width", "", check_width, no_scratch, width_units, run_one<Not, uint8_t, uint8_t>},
    {"fill.f32", "out", "", "number", sound, no_scratch, one_each, run_fill},
    {"fill.u8", "out", "number", "", sound, no_scratch, one_each, run_range<uint8_t, 0>},
    XK_NUMBER("f32", float),
    XK_NUMBER("i64", int64_t),
    XK_NUMBER("i32", int32_t),
    XK_EVERY("f32", float),
    XK_EVERY("i64", int64_t),
    XK_EVERY("i32", int32_t),
    XK_EVERY("u8", uint8_t),
    XK_CAST("f32", float, "i64", int64_t),
    XK_CAST("f32", float, "i32", int32_t),
    XK_CAST("f32", float, "u8", uint8_t),
    XK_CAST("i64", int64_t, "f32", float),
    XK_CAST("i64", int64_t, "i32", int32_t),
    XK_CAST("i64", int64_t, "u8", uint8_t),
    XK_CAST("i32", int32_t, "f32", float),
    XK_CAST("i32", int32_t, "i64", int64_t),
    XK_CAST("i32", int32_t, "u8", uint8_t),
    XK_CAST("u8", uint8_t, "f32", float),
    XK_CAST("u8", uint8_t, "i64", int64_t),
    XK_CAST("u8", uint8_t, "i32", int32_t),
    {},
};

}  // namespace XK_LEVEL
