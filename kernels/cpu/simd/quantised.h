// Products with quantised weights. Rows of activations are quantised first, then products of a stretch of inputs are summed as whole
// numbers, which is exact and so has no order; stretches are added in order along k as float32. So for any rows and panels together
// the bits of an output are the same.
//   int8 weights: activations are int16 under one scale a row, a stretch is a group (of at most 128 inputs).
//   int8 weights, activations too (bytes.h), and int4 weights: activations are int8 under a scale for every 32 inputs, a stretch.
//   The same, one scale a row (bytes.h): beside int8 weights where an output has one scale, and all of a row is one stretch; beside int4
//   weights that are rounded for, and a stretch is a group.
//
// A panel of 16 outputs is, group after group: 16 scales as float16, then the group's inputs.
//   int8: [two inputs][16 outputs][2] bytes.
//   int4: [eight inputs][two halves of 8 outputs][8][4] bytes: low nibbles are the first four inputs, high nibbles the others, plus 8.
// Inputs past k are zero.
//
// Rows of a product are cut into tiles. Those of a tile lie woven: words (four bytes, so two int16 or four int8 inputs) of all its rows
// beside each other, then their factors so. That is one stream to read, and few rows are as fast as memory only with few streams: beside
// six rows apart, a core read 18 GB/s of weights, beside six woven 28. Rows of experts, which gather them, lie apart, each as a tile of
// its own; so do many rows on a matrix unit (tiles.h).
#pragma once
#include "panel.h"
#include "steps.h"

namespace XK_LEVEL {

constexpr int64_t kScaleBytes = 32;  // of one panel's scales
constexpr int64_t kStretch4 = 32;    // inputs of a stretch of int8 activations
constexpr int64_t kStretch8 = 128;   // most inputs of an int8 stretch: 128 * 128 * 32767 stays below 2^31

struct QuantisedRows {
  const uint8_t *base;
  int64_t stride, k;  // bytes of a row; padded inputs
  // A row that lies apart, or the first one of a tile.
  const uint8_t *row(int64_t r) const { return base + r * stride; }
};

struct IntProduct {
  QuantisedRows x;
  const uint8_t *w;      // first panel
  int64_t w_stride;      // bytes between panels
  int64_t group;         // inputs under one scale, 0 for all
  float *c;              // results of the first panel, [rows, 16]
  int64_t c_row, c_stride;
  const int32_t *pick = nullptr;  // the rows of x that are meant, where a product gathers; consecutive rows otherwise
  int tile = 0, tiles = 0;        // of rows that pass the same panels, one after the other

  inline __attribute__((always_inline)) const uint8_t *x_row(int64_t r) const { return x.row(pick ? pick[r] : r); }
};

// The rows of a tile, as a product reads them: woven, or apart.
template <class Type, int R, bool Woven>
struct RowReader {
  const uint8_t *row[Woven ? 1 : R];
  int64_t k;
  RowReader(const IntProduct &t, int64_t first) : k(t.x.k) {
    for (int r = 0; r < (Woven ? 1 : R); r++) row[r] = t.x_row(first + r);
  }
  // The word that begins with input `at`.
  inline __attribute__((always_inline)) const uint8_t *word(int r, int64_t at) const {
    const int64_t byte = at * (int64_t)sizeof(typename Type::Value);
    return Woven ? row[0] + byte * R + 4 * r : row[r] + byte;
  }
  inline __attribute__((always_inline)) const float *factors(int r, int64_t stretch) const {
    const int64_t values = k * (int64_t)sizeof(typename Type::Value);
    return Woven ? (const float *)(row[0] + values * R) + (stretch * R + r) * Type::kFactors
                 : (const float *)(row[r] + values) + stretch * Type::kFactors;
  }
};

// Where a row goes.
struct Place {
  uint8_t *words;
  int64_t apart;  // bytes between two words
  float *factors;
  int64_t next;  // floats between the factors of two stretches
};
template <class Type>
static Place place_of(uint8_t *tile, int64_t padded, int64_t height, int64_t row) {
  float *factors = (float *)(tile + height * padded * (int64_t)sizeof(typename Type::Value));
  return {tile + 4 * row, 4 * height, factors + row * Type::kFactors, height * Type::kFactors};
}

// Weights of a stretch, for P panels: inputs from `at` on.
struct Stretch {
  const uint8_t *w, *scales;
  int64_t w_stride, at, inputs;
  Ahead ahead;  // unless all of the panels that come next are fetched
};

typedef int32_t Wide __attribute__((vector_size(64), aligned(4), may_alias));
template <class To>
XK_INLINE void narrow(Wide values, To *to) {
  typedef To Narrow __attribute__((vector_size(16 * sizeof(To)), aligned(sizeof(To)), may_alias));
  *(Narrow *)to = __builtin_convertvector(values, Narrow);
}
// Sixteen inputs from `at` on.
template <class Value>
XK_INLINE void put(Wide values, const Place &to, int64_t at) {
  uint8_t *words = to.words + at * (int64_t)sizeof(Value) / 4 * to.apart;
  if (to.apart == 4) return narrow<Value>(values, (Value *)words);
  Value narrowed[16];
  narrow<Value>(values, narrowed);
  for (int i = 0; i < 4 * (int)sizeof(Value); i++) memcpy(words + i * to.apart, (const uint8_t *)narrowed + 4 * i, 4);
}

// Steps of a row under one scale, the greatest being `most`, sixteen at a time; returns what a step is worth.
template <class Put>
XK_INLINE float row_steps(const float *x, int64_t k, int64_t padded, float most, Put put16) {
  const Span span = span_of(x, k, most);
  for (int64_t j = 0; j < padded; j += 16) {
    int32_t whole[16];
    whole_steps(j < k && span.finite ? load_some(x + j, k - j) : zero(), span.steps, whole);
    put16(*(const Wide *)whole, j);
  }
  return span.step;
}

// Whole sums, times the scales of their outputs.
template <int R, int P>
XK_INLINE void add_scaled(const Stretch &s, const vi (*sum)[P][kParts], f32x16 (*c)[P]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) {
    const f32x16 scale = load_f16(s.scales + p * s.w_stride);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) c[r][p] = fma(to_float(sum[r][p]), scale, c[r][p]);
  }
}

struct Int8 {
  static constexpr int64_t bits = 8;
  static constexpr bool kRowScale = true, kWholeRows = false, kTiled = true;
  static int step(const uint8_t *w, int64_t lane, int64_t i) { return (int8_t)w[i / 2 * 32 + lane * 2 + i % 2]; }
  static int64_t stretch(int64_t group) { return min(group, kStretch8); }

  // int16 values, then the scale of the row.
  typedef int16_t Value;
  static constexpr int kFactors = 1;
  static int64_t row_bytes(int64_t padded) { return (2 * padded + 4 + 63) / 64 * 64; }
  static float row_scale(const uint8_t *row, int64_t padded) { return *(const float *)(row + 2 * padded); }
  static void quantise(const float *x, int64_t k, int64_t padded, int64_t, const Place &to) {
    *to.factors = row_steps(x, k, padded, 32767.0f, [&](Wide values, int64_t at) { put<Value>(values, to, at); });
  }
  static void quantise_planes(const float *x, int64_t k, int64_t padded, uint8_t *to) {  // all low bytes, then all high ones
    *(float *)(to + 2 * padded) = row_steps(x, k, padded, 32767.0f, [&](Wide values, int64_t at) {
      narrow<uint8_t>(values, to + at), narrow<uint8_t>(values >> 8, to + padded + at);
    });
  }
  XK_INLINE vs weights_at(const uint8_t *p, [[maybe_unused]] int i) {
#if XK_VECTOR_BYTES == 64
    return (vs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#elif XK_VECTOR_BYTES == 32
    return (vs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p + i * 16)));
#elif defined(__aarch64__)
    return (vs)vmovl_s8(vld1_s8((const int8_t *)(p + i * 8)));
#else
    return (vs)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(p + i * 8)));
#endif
  }

  // Sums of a stretch of int16 activations. Fetch: the panels that come next are fetched by hand.
  template <bool Fetch, int R, int P, class X>
  XK_INLINE void sum_pairs(const Stretch &s, const X &x, vi sum[R][P][kParts]) {
    const uint8_t *w = s.w;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = (vi){};
    for (int64_t k = 0; k < s.inputs; k += 2, w += 32) {
      asm volatile("" ::: "memory");  // read again, rather than keep weights on the stack
      vs line[P][kParts];
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        XK_PARTS line[p][i] = weights_at(w + p * s.w_stride, i);
        if (Fetch && k % 4) __builtin_prefetch(w + p * s.w_stride + fetch_ahead(P, s.w_stride), 0, fetch_into(R));
      }
      if (!Fetch) s.ahead.fetch(w);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const vs pair = (vs)broadcast32(x.word(r, s.at + k));
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = add_pairs(sum[r][p][i], pair, line[p][i]);
      }
    }
  }

  template <bool Fetch, int R, int P, class X>
  XK_INLINE void add(const Stretch &s, const X &x, f32x16 (*c)[P]) {
    vi sum[R][P][kParts];
    sum_pairs<Fetch, R, P>(s, x, sum);
    add_scaled<R, P>(s, sum, c);
  }
};

// The stretch of a row that begins at input `at`, as int8 (or as int16 of the same values); returns their sum.
template <class Value>
static int32_t quantise_stretch(const float *x, int64_t k, int64_t at, const Place &to, float &step) {
  const int64_t some = max(0, min(kStretch4, k - at));
  const Span span = span_of(x + at, some, 127.0f);
  int32_t whole[kStretch4], sum = 0;
  for (int64_t h = 0; h < kStretch4; h += 16) whole_steps(h < some && span.finite ? load_some(x + at + h, some - h) : zero(), span.steps, whole + h);
  for (int64_t h = 0; h < kStretch4; h += 16) put<Value>(*(const Wide *)(whole + h), to, at + h);
  for (int64_t i = 0; i < kStretch4; i++) sum += whole[i];
  step = span.step;
  return sum;
}

// Sums of a stretch of int8 activations, scaled, to those of the stretches before.
template <class Type, int R, int P, class X>
XK_INLINE void add_stretch(const Stretch &s, const X &x, const vi (*sum)[P][kParts], f32x16 (*c)[P]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) {
    const f32x16 scale = load_f16(s.scales + p * s.w_stride);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      c[r][p] = fma(Type::scaled(to_float(sum[r][p]), x.factors(r, s.at / kStretch4)), scale, c[r][p]);
  }
}

struct Int4 {
  static constexpr int64_t bits = 4;
  static constexpr bool kRowScale = false, kWholeRows = false, kTiled = true;
  static int step(const uint8_t *w, int64_t lane, int64_t i) { return (w[i / 8 * 64 + lane * 4 + i % 4] >> i / 4 % 2 * 4 & 15) - 8; }
  static int64_t stretch(int64_t) { return kStretch4; }

  // int8 values, then for every stretch what a step is worth, and that times 8 and the sum of the values.
  typedef int8_t Value;
  static constexpr int kFactors = 2;
  XK_INLINE f32x16 scaled(f32x16 sum, const float *factors) { return fma(sum, set1(factors[0]), set1(factors[1])); }
  static int64_t row_bytes(int64_t padded) { return (padded + padded / kStretch4 * 8 + 63) / 64 * 64; }
  static void quantise(const float *x, int64_t k, int64_t padded, int64_t, const Place &to) {
    float *factors = to.factors;
    for (int64_t j = 0; j < padded; j += kStretch4, factors += to.next) {
      const int32_t sum = quantise_stretch<Value>(x, k, j, to, factors[0]);
      factors[1] = -8.0f * (float)sum * factors[0];
    }
  }

  template <bool Fetch, int R, int P, class X>
  XK_INLINE void add(const Stretch &s, const X &x, f32x16 (*c)[P]) {
    vi sum[R][P][kParts];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = (vi){};
    sum_nibbles<Fetch, R, P>(s, x, 0, sum);
    add_stretch<Int4, R, P>(s, x, sum, c);
  }

  // Adds what 32 inputs from `begin` of the stretch on give.
  template <bool Fetch, int R, int P, class X>
  XK_INLINE void sum_nibbles(const Stretch &s, const X &x, int64_t begin, vi (*sum)[P][kParts]) {
    ByteSums part[R][P][kParts];
    const uint8_t *w = s.w + 8 * begin;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS part[r][p][i] = begin_bytes(sum[r][p][i]);
#pragma GCC unroll 1  // unrolled, the compiler loads all of a stretch first and keeps it on the stack
    for (int64_t k = 0; k < kStretch4; k += 8, w += 64) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {  // low nibbles, then high ones
        if (P > 2) asm volatile("" ::: "memory");  // read again, rather than keep sums on the stack
        vb line[P][kParts];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
          XK_PARTS {
            const vb both = *(const vb_memory *)(w + p * s.w_stride + i * XK_VECTOR_BYTES);
            line[p][i] = (j ? (vb)((vs)both >> 4) : both) & 15;
          }
          if (Fetch && !j) __builtin_prefetch(w + p * s.w_stride + fetch_ahead(P, s.w_stride), 0, fetch_into(R));
        }
        if (!Fetch && !j) s.ahead.fetch(w);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const vb four = (vb)broadcast32(x.word(r, s.at + begin + k + 4 * j));
#pragma GCC unroll 4
          for (int p = 0; p < P; p++) XK_PARTS part[r][p][i] = add_bytes(part[r][p][i], line[p][i], four);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = end_bytes(sum[r][p][i], part[r][p][i]);
  }
};

static inline const char *check_group(int64_t group) {
  const bool known = group == 0 || group == 32 || group == 64 || group == 128;
  return known ? nullptr : "group must be 32, 64 or 128, or 0 for one scale an output";
}
static inline int64_t padded_inputs(int64_t k, int64_t group) {
  const int64_t unit = group ? group : 32;
  return (k + unit - 1) / unit * unit;
}
template <class Type>
static int64_t weight_bytes(int64_t inputs) {  // of 16 outputs, without their scales
  return inputs * 2 * Type::bits;
}
template <class Type>
static int64_t int_panel_bytes(int64_t padded, int64_t group) {
  return padded / (group ? group : padded) * kScaleBytes + weight_bytes<Type>(padded);
}

// All inputs of the P panels at w, for rows row..row+R-1; their sums, times the scales of the rows, go to `to`.
template <class Type, bool Woven, bool Fetch, int R, int P>
static void int_rows(const IntProduct &t, const uint8_t *w, float *to, int64_t row) {
  const int64_t group = t.group ? t.group : t.x.k, stretch = Type::stretch(group);
  const RowReader<Type, R, Woven> x(t, row);
  if constexpr (!Fetch && Type::kWholeRows)  // the quickest of many rows: stores that wait for their lines would hold up the next tile
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) __builtin_prefetch(to + (row + r) * t.c_row + p * t.c_stride, 1);
  f32x16 c[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) c[r][p] = zero();
  Stretch s = {w, w, t.w_stride, 0, 0, share_ahead(t.tile, t.tiles, P, t.w_stride)};
  for (int64_t left = 0; s.at < t.x.k; left -= s.inputs) {
    if (!left) left = group, s.scales = s.w, s.w += kScaleBytes;
    s.inputs = min(stretch, left);
    Type::template add<Fetch, R, P>(s, x, c);
    s.at += s.inputs, s.w += weight_bytes<Type>(s.inputs);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      if constexpr (Type::kRowScale) c[r][p] = c[r][p] * set1(*x.factors(r, 0));
      store(to + (row + r) * t.c_row + p * t.c_stride, c[r][p]);
    }
}

// Panels that a tile of rows takes together. Where there are many registers: those of a tile that reads them once, from memory, as
// products with float weights take; else as many as leave registers for the scaled sums, if there are any beside the whole ones.
template <class Type>
constexpr int int_panels(int rows, bool once) {
  return kAccumulators >= 24 ? (once || rows <= 4 || Type::kWholeRows ? tile_panels(rows) : 2) : rows == 1 && kAccumulators >= 4 ? 2 : 1;
}

template <class Type, bool Woven, bool Once, int R = (Once ? kFewRows : kTileRows)>
static void int_tile(const IntProduct &t, int64_t first, int64_t row, int rows, int64_t panels) {
  if (rows == R) {
    constexpr int wide = int_panels<Type>(R, Once);
    const uint8_t *w = t.w + first * t.w_stride;
    float *to = t.c + first * t.c_stride;
    const auto step = [&](int count) { w += count * t.w_stride, to += count * t.c_stride, panels -= count; };
    const bool one = Once && streams(R, t.x.stride, t.w_stride);
    if constexpr (Once && kStreams)
      for (; one && !xk::asks_ahead && panels > 0; step(1)) int_rows<Type, Woven, false, R, 1>(t, w, to, row);
    for (; !one && panels >= wide; step(wide)) int_rows<Type, Woven, Once, R, wide>(t, w, to, row);
    if (wide > 2 && !one && panels >= 2) int_rows<Type, Woven, Once, R, (wide > 2 ? 2 : 1)>(t, w, to, row), step(2);
    for (; panels > 0; step(1)) int_rows<Type, Woven, Once, R, 1>(t, w, to, row);
  } else if constexpr (R > 1) {
    int_tile<Type, Woven, Once, R - 1>(t, first, row, rows, panels);
  }
}

// Tiles begin..end-1 times `panels` panels. One tile of few rows reads every panel once, from end to end; many pass a few panels at a
// time, which stay in L2, as do the rows.
template <class Type, bool Woven>
static void int_product(IntProduct t, const Tiles &tiles, int64_t begin, int64_t end, int64_t panels) {
  const int64_t first = tiles.row(begin), rows = tiles.row(end) - first, count = end - begin;
  if (tiles.rows <= kFewRows) return int_tile<Type, Woven, true>(t, 0, 0, (int)rows, panels);
  const int64_t block = int_panels<Type>((int)((rows + count - 1) / count), false);
  t.tiles = (int)count;
  for (int64_t p = 0; p < panels; p += block)
    for (t.tile = 0; t.tile < t.tiles; t.tile++) {
      const int64_t row = tiles.row(begin + t.tile);
      int_tile<Type, Woven, false>(t, p, row - first, (int)(tiles.row(begin + t.tile + 1) - row), min(block, panels - p));
    }
}

// Rows begin..end-1 of all those of a call, in tiles.
template <class Type>
static void quantise_rows(const float *x, int64_t k, int64_t group, const Tiles &tiles, uint8_t *to, Rows rows) {
  const int64_t padded = padded_inputs(k, group), bytes = Type::row_bytes(padded);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const int64_t tile = tiles.of(r), first = tiles.row(tile);
    Type::quantise(x + r * k, k, padded, group, place_of<Type>(to + first * bytes, padded, tiles.row(tile + 1) - first, r - first));
  }
}

// One output of a packed weight, at its k inputs: `panels` are the weight's, an output is lane `row % 16` of panel `row / 16`.
template <class Type>
static void int_row(const uint8_t *panels, int64_t row, int64_t k, int64_t group, float *out) {
  const int64_t padded = padded_inputs(k, group), lane = row % 16, each = group ? group : padded;
  const uint8_t *w = panels + row / 16 * int_panel_bytes<Type>(padded, group);
  for (int64_t i = 0; i < k; i += each, w += kScaleBytes + weight_bytes<Type>(each)) {
    float scales[16];
    store(scales, load_f16(w));
    for (int64_t j = 0; j < min(each, k - i); j++) out[i + j] = scales[lane] * (float)Type::step(w + kScaleBytes, lane, j);
  }
}

}  // namespace XK_LEVEL
