// Query rows (token x head) of one KV head against one block of its keys and values on the matrix unit (AMX), as kv_attend.h does it
// with vectors. Keys and values are bf16, or steps of int8, which bf16 holds; queries and weights are the sum of three bf16 parts, or
// rounded to one. Exact attention over int8 stays with vectors: three parts would double the time of its decoding. Sums are in the
// unit's order (float_tiles.h), for 32 dims or tokens at a time, whatever the other rows are and however few. Keys or values that are infinite make NaN of the rows that see them.
#pragma once
#include "float_tiles.h"
#include "kv_attend.h"

namespace XK_LEVEL {

#if defined(__AMX_BF16__)

template <class Kv>
constexpr int kAttendParts = Kv::kRounded ? 1 : sizeof(typename Kv::Element) == 2 ? 3 : 0;  // 0: vectors compute

constexpr int64_t kFewAttend = 4;  // rows for which vectors are faster: they wait for memory
constexpr int64_t kTileSlots = kQueryRows + kTileHeight;  // rows of a whole tile may lie beyond the last: what they hold is not read
constexpr int64_t kWeightBytes = kKeyBlock * 2, kLaidValues = kKeyBlock * 32;  // of a row; of sixteen dims

static inline int64_t whole_steps_of(int64_t inputs) { return steps_of(inputs) * kStep; }

struct AttendMemory {
  uint8_t *query, *weights, *keys, *values;  // [parts][rows][dims], [parts][rows][tokens]; a block laid out
  float *score, *partial;                    // of all rows; of two tiles of them
  int64_t query_bytes, key_steps;            // of a row and part; of 32 dims

  static int64_t bytes(int parts, int64_t key_dim, int64_t value_dim) {
    const int64_t key = whole_steps_of(key_dim), value = padded(value_dim);
    return kTileSlots * (parts * (key * 2 + kWeightBytes) + kKeyBlock * 4) + kKeyBlock * 2 * (key + value) + 2 * kTileHeight * value * 4;
  }
  uint8_t *place(uint8_t *memory, int parts, int64_t key_dim, int64_t value_dim) {
    const int64_t key = whole_steps_of(key_dim), value = padded(value_dim);
    query_bytes = key * 2, key_steps = key / kStep;
    query = memory;
    weights = query + parts * kTileSlots * query_bytes;
    keys = weights + parts * kTileSlots * kWeightBytes;
    values = keys + kKeyBlock * key * 2;
    score = (float *)(values + kKeyBlock * value * 2);
    partial = score + kTileSlots * kKeyBlock;
    return (uint8_t *)(partial + 2 * kTileHeight * value);
  }
};

// Sixteen numbers as the sum of bf16 parts, the smallest first: as bf16, or as float32 (Wide).
template <int Parts, bool Wide>
XK_INLINE void split16(f32x16 x, uint8_t *to, int64_t part_bytes) {
  __m512 rest = (__m512)x.v[0];
#pragma GCC unroll 3
  for (int part = Parts - 1; part >= 0; part--) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(rest);
    const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
    if (Wide) _mm512_storeu_ps((float *)(to + part * part_bytes), value);
    else _mm256_storeu_si256((__m256i *)(to + part * part_bytes), rounded);
    if (part) rest = _mm512_sub_ps(rest, value);
  }
}

// --- a block laid out: pairs of dims of sixteen keys, pairs of values of sixteen dims ---

XK_INLINE void store_pairs(uint8_t *to, __m256i a, __m256i b) { store(to, interleave(a, b)); }

// What lies as far into the next block as this does into the one at hand is fetched meanwhile: keys and values of a group lie side by
// side, and runs of a few KB at far apart addresses are too short for the prefetchers of the hardware.
template <class Kv>
static void lay_out_keys(const Kept<Kv> &from, int64_t first, int64_t end, const AttendMemory &m) {
  const int64_t dim = from.key_dim;
  for (int64_t g = first; g < end; g++) {
    const auto *key = from.key(g);
    const int64_t ahead = g < from.groups_after ? kBlockGroups * from.group_bytes : 0;
    uint8_t *to = m.keys + g * m.key_steps * kTileBytes;
    int64_t i = 0;
    for (; i + 2 <= dim; i += 2, key += 32, to += 64) {
      for (int64_t line = 0; line < 32 * (int64_t)sizeof *key; line += 64) __builtin_prefetch((const uint8_t *)key + ahead + line, 0, 2);
      store_pairs(to, as_bf16(key, 0xffff), as_bf16(key + 16, 0xffff));
    }
    for (; i < m.key_steps * kStep; i += 2, to += 64) store_pairs(to, as_bf16(key, first_lanes(i < dim ? 16 : 0)), _mm256_setzero_si256());
  }
}

// Tokens first..end-1; those beside them in steps of 32 become zeros.
template <class Kv>
static void lay_out_values(const Kept<Kv> &from, int64_t first, int64_t end, const AttendMemory &m) {
  const auto seen = [&](int64_t token) { return token >= first && token < end; };
  for (int64_t token = first / kStep * kStep; token < whole_steps_of(end); token += 2) {
    const int64_t ahead = token / 16 < from.groups_after ? kBlockGroups * from.group_bytes : 0;
    const auto *a = from.value(max(first, min(token, end - 1)), 0), *b = from.value(max(first, min(token + 1, end - 1)), 0);
    uint8_t *to = m.values + token * 32;
    const __mmask16 see_a = seen(token) ? 0xffff : 0, see_b = seen(token + 1) ? 0xffff : 0;
    for (int64_t d = 0; d < from.value_dim; d += 16, to += kLaidValues) {
      const __mmask16 some = first_lanes(from.value_dim - d);
      __builtin_prefetch((const uint8_t *)(a + d) + ahead, 0, 2);
      __builtin_prefetch((const uint8_t *)(b + d) + ahead, 0, 2);
      store_pairs(to, as_bf16(a + d, some & see_a), as_bf16(b + d, some & see_b));
    }
  }
}

// Whether zero times any value of tokens first..end-1 is zero.
template <class Kv>
static bool finite_values(const Kept<Kv> &from, int64_t first, int64_t end) {
  const __m256i exponent = _mm256_set1_epi16(0x7f80);
  __mmask16 wrong = 0;
  if (Kv::kScaleBytes > 0) return true;
  for (int64_t token = first; token < end; token++)
    for (int64_t d = 0; d < from.value_dim; d += 16)
      wrong |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(as_bf16(from.value(token, d), first_lanes(from.value_dim - d)), exponent), exponent);
  return !wrong;
}

// --- the products ---

template <int From>
XK_INLINE void store_tile_apart(float *to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * 4), "i"(From) : "memory");
}

struct AttendProduct {
  const uint8_t *x;           // rows in parts
  int64_t x_stride, x_part;   // bytes
  const uint8_t *w;           // panels laid out
  int64_t w_panel, steps;     // bytes from one to the next, of 32 inputs
  float *c;
  int64_t c_stride;           // floats between rows; panels lie side by side
};

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 panels: two tiles of rows times up to two panels, or one times up to four.
template <int Parts, int R, int P>
static void attend_tile(const AttendProduct &t) {
  const int64_t down = kTileHeight * t.x_stride;
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (int64_t s = 0; s < t.steps; s++) {
    const uint8_t *x = t.x + s * kStep * 2, *w = t.w + s * kTileBytes;
    load_tile<6>(w, 64);
    if (P > 1) load_tile<7>(w + t.w_panel, 64);
#pragma GCC unroll 3
    for (int part = 0; part < Parts; part++) {
      load_tile<4>(x + part * t.x_part, t.x_stride), add_bf16<0, 4, 6>();
      if (P > 1) add_bf16<1, 4, 7>();
      if (R > 1) load_tile<5>(x + part * t.x_part + down, t.x_stride), add_bf16<2, 5, 6>();
      if (R > 1 && P > 1) add_bf16<3, 5, 7>();
    }
    if (P < 4) continue;
    load_tile<6>(w + 2 * t.w_panel, 64), load_tile<7>(w + 3 * t.w_panel, 64);
#pragma GCC unroll 3
    for (int part = 0; part < Parts; part++)
      load_tile<5>(x + part * t.x_part, t.x_stride), add_bf16<2, 5, 6>(), add_bf16<3, 5, 7>();
  }
  float *below = R > 1 ? t.c + kTileHeight * t.c_stride : t.c + 32;
  store_tile_apart<0>(t.c, t.c_stride);
  if (P > 1) store_tile_apart<1>(t.c + 16, t.c_stride);
  if (R > 1 || P > 2) store_tile_apart<2>(below, t.c_stride);
  if ((R > 1 && P > 1) || P > 3) store_tile_apart<3>(below + 16, t.c_stride);
}

// Up to two tiles of rows times any panels.
template <int Parts>
static void attend_product(AttendProduct t, int64_t rows, int64_t panels) {
  const auto step = [&](int64_t count) { t.w += count * t.w_panel, t.c += count * 16, panels -= count; };
  if (rows > kTileHeight) {
    for (; panels > 1; step(2)) attend_tile<Parts, 2, 2>(t);
    if (panels) attend_tile<Parts, 2, 1>(t);
  } else {
    for (; panels > 3; step(4)) attend_tile<Parts, 1, 4>(t);
    for (; panels > 1; step(2)) attend_tile<Parts, 1, 2>(t);
    if (panels) attend_tile<Parts, 1, 1>(t);
  }
}

static inline void begin_tiles(int64_t rows) { set_tiles(min(rows, kTileHeight), 2 * kStep); }
static inline void end_tiles() { release_tiles(); }

// n dims of the query of row r, one of `rows`, times `scale`.
template <int Parts>
static void split_query(const float *q, int64_t n, f32x16 scale, const AttendMemory &m, int64_t r, int64_t rows) {
  const int64_t dims = m.key_steps * kStep;
  for (int64_t d = 0; d < dims; d += 16) {
    const f32x16 some = d < n ? load_some(q + d, n - d) * scale : zero();
    if (rows <= kFewAttend) split16<Parts, true>(some, m.query + (r * Parts * dims + d) * 4, dims * 4);
    else split16<Parts, false>(some, m.query + r * m.query_bytes + d * 2, kTileSlots * m.query_bytes);
  }
}

// --- few rows: the same sums by vectors, which read the block where it lies ---

XK_INLINE __m512 as_float(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
template <class E>
XK_INLINE __m512 as_floats(const E *p, __mmask16 some) { return as_float(as_bf16(p, some)); }
XK_INLINE __m512 as_floats(const int8_t *p, __mmask16 some) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, p))); }

template <int Parts, int R, int P>
struct FewSums {  // of one step of 32: products with even and with odd inputs apart
  __m512 even[R][P][Parts], odd[R][P][Parts];
  XK_INLINE void clear(FewSums &s) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++)
#pragma GCC unroll 3
        for (int part = 0; part < Parts; part++) s.even[r][p][part] = s.odd[r][p][part] = _mm512_setzero_ps();
  }
  // x: [R][Parts], `row` and `part_stride` floats apart
  XK_INLINE void add(__m512 (&sum)[R][P][Parts], const float *x, int64_t row, int64_t part_stride, const __m512 (&w)[P]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int part = 0; part < Parts; part++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) sum[r][p][part] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * row + part * part_stride]), w[p], sum[r][p][part]);
  }
  XK_INLINE void fold(const FewSums &s, __m512 (&sums)[R][P]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++)
#pragma GCC unroll 3
        for (int part = 0; part < Parts; part++) sums[r][p] = _mm512_add_ps(sums[r][p], _mm512_add_ps(s.even[r][p][part], s.odd[r][p][part]));
  }
};

template <class Kv, int R, int P>
static void few_scores(const Tile &t, const AttendMemory &m, const Kept<Kv> &block, int64_t begin, int64_t group) {
  constexpr int parts = kAttendParts<Kv>;
  const int64_t dim = block.key_dim, dims = m.key_steps * kStep;
  const float *x = (const float *)m.query + begin * parts * dims;
  const typename Kv::Element *key[P];
  __m512 sums[R][P] = {}, w[P];
  for (int p = 0; p < P; p++) key[p] = block.key(group + p);
  for (int64_t step = 0; step < dim; step += kStep) {
    FewSums<parts, R, P> s;
    s.clear(s);
    for (int64_t i = step; i < min(step + kStep, dim); i += 2) {
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        for (int64_t line = 0; line < 32 * (int64_t)sizeof *key[p]; line += 64)
          __builtin_prefetch((const uint8_t *)(key[p] + i * 16) + block.after_key() + line, 0, 2);
        w[p] = as_floats(key[p] + i * 16, 0xffff);
      }
      s.add(s.even, x + i, parts * dims, dims, w);
      if (i + 1 == dim) break;
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) w[p] = as_floats(key[p] + i * 16 + 16, 0xffff);
      s.add(s.odd, x + i + 1, parts * dims, dims, w);
    }
    s.fold(s, sums);
  }
  for (int p = 0; p < P; p++) {
    f32x16 scale = set1(1.0f);
    if constexpr (Kept<Kv>::kScaled) scale = block.scale(group + p, false);
    for (int r = 0; r < R; r++) _mm512_storeu_ps(t.score + (begin + r) * kKeyBlock + (group + p) * 16, _mm512_mul_ps(sums[r][p], (__m512)scale.v[0]));
  }
}

// Tokens first..end-1, P panels from dim d on; to [rows][stride].
template <class Kv, int R, int P>
static void few_values(const Tile &t, const AttendMemory &m, const Kept<Kv> &block, int64_t begin, int64_t d, int64_t first, int64_t end) {
  constexpr int parts = kAttendParts<Kv>;
  const float *x = (const float *)m.weights + begin * parts * kKeyBlock;
  __m512 sums[R][P] = {}, w[P];
  __mmask16 some[P];
  for (int p = 0; p < P; p++) some[p] = first_lanes(block.value_dim - d - 16 * p);
  for (int64_t token = first; token < end;) {
    FewSums<parts, R, P> s;
    s.clear(s);
    for (const int64_t stop = min(end, token / kStep * kStep + kStep); token < stop;) {
      const uint8_t *ahead = block.after_value(d / (16 * P) * kBlockGroups + token / 16);
      if (ahead) ahead += token % 16 * 64;
      const auto *value = block.value(token, d);
      for (const int64_t last = min(stop, token / 16 * 16 + 16); token < last; token++, value += block.value_step()) {
        if (ahead) __builtin_prefetch(ahead, 0, 2), ahead += 64;
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) w[p] = as_floats(value + p * 16, some[p]);
        if (token % 2) s.add(s.odd, x + token, parts * kKeyBlock, kKeyBlock, w);
        else s.add(s.even, x + token, parts * kKeyBlock, kKeyBlock, w);
      }
    }
    s.fold(s, sums);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) _mm512_storeu_ps(m.partial + r * t.stride + d + p * 16, sums[r][p]);
}

XK_INLINE void merge_rows(const Tile &t, const AttendMemory &m, int64_t begin, int64_t rows) {
  for (int64_t i = 0; i < rows; i++) {
    const f32x16 keep = set1(t.row[begin + i].keep), take = set1(t.row[begin + i].take);
    float *held = t.held + (begin + i) * t.stride, *partial = m.partial + i * t.stride;
    for (int64_t d = 0; d < t.stride; d += 16) store(held + d, fma(load(partial + d), take, load(held + d) * keep));
  }
}

// R rows, whose tokens of the block lie from `first` to `seen`.
template <class Kv, int R>
static void attend_few(const Tile &t, const AttendMemory &m, const Kept<Kv> &block, int64_t at, int64_t begin, int64_t first, int64_t seen) {
  constexpr int parts = kAttendParts<Kv>, wide = R * parts > 4 ? 1 : R * parts > 2 ? 2 : 4;
  const int64_t group = first / 16, groups = (seen + 15) / 16;
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | kFlush);
  int64_t g = group;
  for (; g + wide <= groups; g += wide) few_scores<Kv, R, wide>(t, m, block, begin, g);
  for (; g < groups; g++) few_scores<Kv, R, 1>(t, m, block, begin, g);
  _mm_setcsr(control);
  weigh_rows(t, block, at, begin, begin + R, group, groups);
  for (int64_t r = begin; r < begin + R; r++)
    for (g = group; g < groups; g++)
      split16<parts, true>(load(m.score + r * kKeyBlock + g * 16), m.weights + (r * parts * kKeyBlock + g * 16) * 4, kKeyBlock * 4);
  if constexpr (Kept<Kv>::kScaled) block.fetch_scales();
  _mm_setcsr(control | kFlush);
  int64_t d = 0;
  for (; d + 16 * wide <= t.stride; d += 16 * wide) few_values<Kv, R, wide>(t, m, block, begin, d, first, seen);
  for (; d < t.stride; d += 16) few_values<Kv, R, 1>(t, m, block, begin, d, first, seen);
  _mm_setcsr(control);
  merge_rows(t, m, begin, R);
}

template <class Kv>
static void attend_on_tiles(const Tile &t, const AttendMemory &m, const Kept<Kv> &block, int64_t at, int64_t begin, int64_t end) {
  constexpr int parts = kAttendParts<Kv>;
  constexpr int64_t weight_part = kTileSlots * kWeightBytes, both = 2 * kTileHeight;
  const auto low = [&](int64_t r) { return max(0, t.row[r].first - at); };
  const auto high = [&](int64_t r) { return min(kKeyBlock, t.row[r].position + 1 - at); };
  const int64_t first = low(begin), seen = high(end - 1);
  // A token that only some of the rows see has weight zero for the others, which does not hide a value that is not finite.
  if (end - begin > 1 && !(finite_values(block, first, low(end - 1)) && finite_values(block, high(begin), seen))) {
    for (int64_t r = begin; r < end; r++) attend_on_tiles(t, m, block, at, r, r + 1);
    return;
  }
  if (t.rows <= kFewAttend) switch (end - begin) {
      case 1: return attend_few<Kv, 1>(t, m, block, at, begin, first, seen);
      case 2: return attend_few<Kv, 2>(t, m, block, at, begin, first, seen);
      case 3: return attend_few<Kv, 3>(t, m, block, at, begin, first, seen);
      default: return attend_few<Kv, 4>(t, m, block, at, begin, first, seen);
    }
  lay_out_keys(block, first / 16, (seen + 15) / 16, m);
  for (int64_t r = begin; r < end; r += both) {
    const int64_t rows = min(both, end - r), group = low(r) / 16, groups = (high(r + rows - 1) + 15) / 16 - group;
    attend_product<parts>({m.query + r * m.query_bytes, m.query_bytes, kTileSlots * m.query_bytes, m.keys + group * m.key_steps * kTileBytes,
                           m.key_steps * kTileBytes, m.key_steps, m.score + r * kKeyBlock + group * 16, kKeyBlock}, rows, groups);
    if constexpr (Kept<Kv>::kScaled)
      for (int64_t g = group; g < group + groups; g++) {
        const f32x16 scale = block.scale(g, false);
        for (float *score = m.score + r * kKeyBlock + g * 16, *last = score + rows * kKeyBlock; score < last; score += kKeyBlock)
          store(score, load(score) * scale);
      }
  }
  lay_out_values(block, first, seen, m);
  weigh_rows(t, block, at, begin, end, first / 16, (seen + 15) / 16);
  for (int64_t r = begin; r < end; r++)
    for (int64_t g = first / kStep * 2; g < whole_steps_of(seen) / 16; g++)
      split16<parts, false>(load(m.score + r * kKeyBlock + g * 16), m.weights + r * kWeightBytes + g * 32, weight_part);
  for (int64_t r = begin; r < end; r += both) {
    const int64_t rows = min(both, end - r), step = low(r) / kStep, steps = whole_steps_of(high(r + rows - 1)) / kStep - step;
    attend_product<parts>({m.weights + r * kWeightBytes + step * kStep * 2, kWeightBytes, weight_part, m.values + step * kTileBytes, kLaidValues,
                           steps, m.partial, t.stride}, rows, t.stride / 16);
    merge_rows(t, m, r, rows);
  }
}

#else

template <class Kv>
constexpr int kAttendParts = 0;
struct AttendMemory {
  float *score;
  static int64_t bytes(int, int64_t, int64_t) { return 0; }
  uint8_t *place(uint8_t *memory, int, int64_t, int64_t) { return memory; }
};
template <int>
static inline void split_query(const float *, int64_t, f32x16, const AttendMemory &, int64_t, int64_t) {}
template <class Kv>
static inline void attend_on_tiles(const Tile &, const AttendMemory &, const Kept<Kv> &, int64_t, int64_t, int64_t) {}
static inline void begin_tiles(int64_t) {}
static inline void end_tiles() {}

#endif

}  // namespace XK_LEVEL
