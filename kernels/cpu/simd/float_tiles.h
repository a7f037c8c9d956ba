// Products of float32 rows with bf16 weights on the matrix unit (AMX), which multiplies bf16 and sums float32. A row is the sum of three
// bf16 parts, exactly, so that nothing of it is lost: for every 32 inputs the products of the smallest parts are added first. The unit
// sums products with even and with odd inputs apart, each from zero, then both, then adds that; few rows, which wait for the weights,
// do the same in vectors. So for any rows and panels together the bits are the same, but not those of the other levels.
// Where float32 ends, so do the parts: from 3.396e38 on they are no numbers any more, below 2^-110 the smallest are zero. What kind of
// NaN a NaN is, nobody promises. Of one part alone (Parts), the row is rounded to bf16, and all else is the same.
// A first stage splits the rows, once for all threads. Weights are laid out one step ahead of the products, so that both overlap: the
// unit has registers to spare (tiles are renamed), and a chain of products on one tile is as fast as products on many.
#pragma once
#include "tiles.h"

namespace XK_LEVEL {

#if defined(__AVX512BF16__)

// Two inputs of a bf16 panel, of which the second may be missing, as units that multiply bf16 take them: [16 outputs][2].
XK_INLINE __m512i lay_out_pair(const uint8_t *w, int64_t inputs) {
  alignas(64) static const uint16_t order[32] = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30,
                                                 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
  __m512i pair = _mm512_setzero_si512();
  if (inputs > 1) pair = _mm512_loadu_si512(w);
  else if (inputs == 1) pair = _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)w));
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), pair);
}

#endif

#if defined(__AMX_BF16__)

constexpr bool kFloatTiles = true;
constexpr int64_t kStep = 32;          // inputs of a tile
constexpr int64_t kTileBytes = 1024;   // of sixteen rows
constexpr int64_t kSplitDepth = 1024;  // inputs of one unit of the first stage
constexpr int64_t kStripRows = 2 * kTileHeight;
constexpr int64_t kStrips = 8;         // most of one unit
constexpr int64_t kPanelsOfTiles = 16; // most of one unit
constexpr int64_t kFewSplit = 3;       // rows that read weights faster in vectors, without a first stage
constexpr int64_t kFewDepth = 256;     // inputs of them that are split at once
constexpr int64_t kRowsAhead = 1;      // steps that rows are fetched into L1 ahead of their use
constexpr int64_t kFewPanels = 4;      // at once, where one tile has all the rows

constexpr unsigned kFlush = 0x8040;  // numbers too small for a normal exponent are zero, as in the matrix unit

struct FloatTileMemory {
  alignas(64) float sums[kPanelsOfTiles * kStrips * kStripRows * 16];
  alignas(64) uint8_t weights[32 * kTileBytes];
  alignas(64) float few[kFewSplit * 3 * kFewDepth];
};

XK_TILE_PRODUCT(add_bf16, "tdpbf16ps")

static inline int64_t steps_of(int64_t inputs) { return (inputs + kStep - 1) / kStep; }

// --- the rows ---

// Bytes of one row in its parts.
template <int Parts>
static inline int64_t split_bytes(int64_t k) { return steps_of(k) * kStep * 2 * Parts; }

// Of 32 inputs, of which `left` are there: [Parts], `apart` bytes from each other, the smallest first. Infinity and NaN have one part.
template <int Parts>
XK_INLINE void split_step(const float *x, int64_t left, uint8_t *to, int64_t apart) {
  __m512 rest[2];
  for (int h = 0; h < 2; h++) rest[h] = left > 16 * h ? (__m512)load_some(x + 16 * h, left - 16 * h).v[0] : _mm512_setzero_ps();
  __mmask16 finite[2];
  for (int h = 0; h < 2; h++) finite[h] = ~_mm512_fpclass_ps_mask(rest[h], 0x99);  // neither NaN nor infinite
#pragma GCC unroll 3
  for (int part = Parts - 1; part >= 0; part--) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(rest[1], rest[0]);
    _mm512_store_si512(to + part * apart, both);
    if (!part) break;
    for (int h = 0; h < 2; h++) {
      const __m512i wide = _mm512_cvtepu16_epi32(h ? _mm512_extracti64x4_epi64(both, 1) : _mm512_castsi512_si256(both));
      rest[h] = _mm512_maskz_sub_ps(finite[h], rest[h], _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
    }
  }
}

static inline int64_t split_chunks(int64_t k) { return (k + kSplitDepth - 1) / kSplitDepth; }
static inline int64_t units_of_split(int64_t rows, int64_t k) { return (rows + kTileHeight - 1) / kTileHeight * split_chunks(k); }

// Rows as tiles take them: [tile of up to sixteen rows][step][part][row][32].
template <int Parts>
static void split_rows(const float *x, int64_t rows, int64_t k, int64_t unit, uint8_t *to) {
  const int64_t first = unit / split_chunks(k) * kTileHeight, height = min(kTileHeight, rows - first), begin = unit % split_chunks(k) * kSplitDepth;
  to += first * split_bytes<Parts>(k);
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | kFlush);
  for (int64_t i = begin; i < min(k, begin + kSplitDepth); i += kStep)
    for (int64_t r = 0; r < height; r++)
      split_step<Parts>(x + (first + r) * k + i, k - i, to + (i / kStep * Parts * height + r) * 64, height * 64);
  _mm_setcsr(control);
}

// --- the product ---

// Tiles 0 to 3 are sums. Of two tiles of rows: 4 and 5 are rows, 6 and 7 weights; of one: 4 to 6 are its parts, 7 weights.
static inline void set_float_tiles(int64_t first, int64_t second) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    const bool weights = second ? i > 5 : i == 7, below = second && (i == 2 || i == 3 || i == 5);
    config.rows[i] = (uint8_t)(weights ? kTileHeight : below ? second : first), config.row_bytes[i] = 64;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}

struct Strip {  // one or two tiles of rows, from a step on
  const uint8_t *x[2];
  int64_t bytes[2];       // of a tile of them
  const uint8_t *next[2]; // the strip that comes next
};
struct FloatPanels {  // weights of a stretch of inputs
  const uint8_t *w;
  int64_t stride, inputs;  // bytes between panels
  uint8_t *laid;           // [step, modulo what fits][panel]: tiles
  const uint8_t *next;     // weights that come after these, or null
};

template <int P>
XK_INLINE void lay_out_step(const FloatPanels &t, int64_t step, int64_t ring) {
  uint8_t *to = t.laid + step % ring * P * kTileBytes;
  const int64_t left = t.inputs - step * kStep;
#pragma GCC unroll 4
  for (int p = 0; p < P; p++, to += kTileBytes) {
    const uint8_t *w = t.w + p * t.stride + step * kTileBytes;
    if (__builtin_expect(left >= kStep, 1)) {
#pragma GCC unroll 16
      for (int i = 0; i < kTileHeight; i++) _mm512_store_si512(to + i * 64, lay_out_pair(w + i * 64, 2));
    } else {
      for (int i = 0; i < kTileHeight; i++) _mm512_store_si512(to + i * 64, lay_out_pair(w + i * 64, left - 2 * i));
    }
  }
}

// All parts of a tile of rows times one of weights.
template <int Parts, int To>
XK_INLINE void add_panel(const uint8_t *w) {
  load_tile<7>(w, 64);
  add_bf16<To, 4, 7>();
  if constexpr (Parts > 1) add_bf16<To, 5, 7>(), add_bf16<To, 6, 7>();
}

// A strip times P panels. Lay: the weights are laid out on the way. Lines from..to-1 of each tile of weights that comes next are fetched.
template <int Parts, int R, int P, bool Lay>
static void float_strip(const Strip &s, const FloatPanels &t, int64_t from, int64_t to, bool resume, float *c, int64_t c_panel) {
  constexpr int64_t ring = 32 / P, tile = kTileHeight * 16;
  const int64_t steps = steps_of(t.inputs);
  if (resume) {
    load_tile<0>(c, 64);
    if constexpr (P > 1) load_tile<1>(c + c_panel, 64);
    if constexpr (R > 1) load_tile<2>(c + tile, 64);
    if constexpr (R > 1 && P > 1) load_tile<3>(c + tile + c_panel, 64);
    if constexpr (P > 2) load_tile<2>(c + 2 * c_panel, 64), load_tile<3>(c + 3 * c_panel, 64);
  } else {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  }
  if constexpr (Lay) lay_out_step<P>(t, 0, ring);
  const uint8_t *x = s.x[0], *below = s.x[1];
  for (int64_t step = 0; step < steps; step++) {
    if constexpr (Lay)
      if (step + 1 < steps) lay_out_step<P>(t, step + 1, ring);
    if constexpr (R > 1) {
      const int64_t ahead = step + kRowsAhead;
      const bool inside = ahead < steps;
      const uint8_t *rows = inside ? x + kRowsAhead * Parts * kTileBytes : s.next[0] + (ahead - steps) * Parts * kTileBytes;
      const uint8_t *others = inside ? below + kRowsAhead * Parts * s.bytes[1] : s.next[1] + (ahead - steps) * Parts * s.bytes[1];
      for (int64_t line = 0; line < Parts * kTileBytes; line += 64) __builtin_prefetch(rows + line), __builtin_prefetch(others + line);
    }
    if (t.next)
      for (int64_t line = from; line < to; line++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) __builtin_prefetch(t.next + p * t.stride + step * kTileBytes + line * 64, 0, 2);
    const uint8_t *w = t.laid + step % ring * P * kTileBytes;
    if constexpr (R == 1) {
      load_tile<4>(x, 64);
      if constexpr (Parts > 1) load_tile<5>(x + s.bytes[0], 64), load_tile<6>(x + 2 * s.bytes[0], 64);
      add_panel<Parts, 0>(w);
      if constexpr (P > 1) add_panel<Parts, 1>(w + kTileBytes);
      if constexpr (P > 2) add_panel<Parts, 2>(w + 2 * kTileBytes), add_panel<Parts, 3>(w + 3 * kTileBytes);
    } else {
      load_tile<6>(w, 64);
      if constexpr (P > 1) load_tile<7>(w + kTileBytes, 64);
#pragma GCC unroll 3
      for (int part = 0; part < Parts; part++) {
        load_tile<4>(x + part * s.bytes[0], 64);
        add_bf16<0, 4, 6>();
        if constexpr (P > 1) add_bf16<1, 4, 7>();
        load_tile<5>(below + part * s.bytes[1], 64);
        add_bf16<2, 5, 6>();
        if constexpr (P > 1) add_bf16<3, 5, 7>();
      }
    }
    x += Parts * s.bytes[0], below += Parts * s.bytes[1];
  }
  store_tile<0>(c);
  if constexpr (P > 1) store_tile<1>(c + c_panel);
  if constexpr (R > 1) store_tile<2>(c + tile);
  if constexpr (R > 1 && P > 1) store_tile<3>(c + tile + c_panel);
  if constexpr (P > 2) store_tile<2>(c + 2 * c_panel), store_tile<3>(c + 3 * c_panel);
}

template <int Parts, bool Lay>
static void float_panels(int64_t wide, const Strip &s, const FloatPanels &t, int64_t from, int64_t to, bool resume, float *c, int64_t c_panel) {
  if (s.bytes[1]) {
    if (wide == 2) float_strip<Parts, 2, 2, Lay>(s, t, from, to, resume, c, c_panel);
    else float_strip<Parts, 2, 1, Lay>(s, t, from, to, resume, c, c_panel);
  } else {
    if (wide == 4) float_strip<Parts, 1, 4, Lay>(s, t, from, to, resume, c, c_panel);
    else if (wide == 2) float_strip<Parts, 1, 2, Lay>(s, t, from, to, resume, c, c_panel);
    else float_strip<Parts, 1, 1, Lay>(s, t, from, to, resume, c, c_panel);
  }
}

// Sums of rows first..first+rows-1 (whole strips, but for the last of all) of `x` (split_rows) times `panels` panels: [panel][rows][16].
template <int Parts>
static void float_tiles(const uint8_t *x, int64_t first, int64_t rows, const uint8_t *w, int64_t k, int64_t panels, FloatTileMemory &memory, float *sums) {
  const int64_t strips = (rows + kStripRows - 1) / kStripRows, row_bytes = split_bytes<Parts>(k);
  const int64_t most = rows <= kTileHeight && Parts == 1 ? kFewPanels : 2;  // fewer streams from memory where more is done with each
  // Panels that one strip passes need be laid out but in part; else as much as stays in L1 while the strips pass, and as keeps the
  // rows in L2 while the panels pass.
  const int64_t depth = strips == 1 ? k : Parts == 1 ? 8 * kStep : 4 * kStep;
  int64_t set = 0;
  for (int64_t begin = 0; begin < k; begin += depth)
    for (int64_t p = 0, wide; p < panels; p += wide) {
      wide = panels - p >= most ? most : panels - p >= 2 ? 2 : 1;
      FloatPanels t = {w + (p * k + begin) * 32, k * 32, min(depth, k - begin), memory.weights, nullptr};
      if (strips == 1 || p + wide < panels) t.next = t.w + wide * t.stride;  // the last of them are another unit's
      else if (begin + depth < k) t.next = w + (begin + depth) * 32;
      for (int64_t strip = 0; strip < strips; strip++) {
        const int64_t row = strip * kStripRows, left = min(kStripRows, rows - row), above = min(kTileHeight, left), under = left - above;
        if (set != left) set_float_tiles(above, under), set = left;
        const uint8_t *from = x + (first + row) * row_bytes;
        Strip s = {{from + begin / kStep * Parts * above * 64, from + kTileHeight * row_bytes + begin / kStep * Parts * under * 64},
                         {above * 64, under * 64},
                         {}};
        for (int i = 0; i < 2; i++) s.next[i] = s.x[i] + (strip + 1 < strips ? kStripRows * row_bytes : 0);
        float *c = sums + (p * rows + row) * 16;
        const int64_t lines = kTileBytes / 64, line = strip * lines / strips, end = (strip + 1) * lines / strips;
        if (strip) float_panels<Parts, false>(wide, s, t, line, end, begin, c, rows * 16);
        else float_panels<Parts, true>(wide, s, t, line, end, begin, c, rows * 16);
      }
    }
  release_tiles();
}

// --- few rows ---

// The parts of n inputs of a row, padded with zeros to whole steps: [Parts][kFewDepth], the smallest first.
template <int Parts>
static void split_wide(const float *x, int64_t n, float *to) {
  alignas(64) uint16_t parts[Parts][kStep];
  for (int64_t i = 0; i < n; i += kStep) {
    split_step<Parts>(x + i, n - i, (uint8_t *)parts, kStep * 2);
    for (int part = 0; part < Parts; part++)
      for (int h = 0; h < kStep; h += 16) store(to + part * kFewDepth + i + h, load_bf16(parts[part] + h));
  }
}

// R rows times P panels in vectors. parts: [R][Parts][kFewDepth]; c: [P][R][16].
template <int Parts, int R, int P>
static void few_rows(const float *parts, const uint8_t *w, int64_t w_stride, int64_t inputs, bool resume, float *c) {
  const __m512i high = _mm512_set1_epi32((int)0xffff0000);
  __m512 sums[P][R];
#pragma GCC unroll 2
  for (int p = 0; p < P; p++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sums[p][r] = resume ? _mm512_loadu_ps(c + (p * R + r) * 16) : _mm512_setzero_ps();
  for (int64_t begin = 0; begin < inputs; begin += kStep) {
    __m512 even[P][R][Parts], odd[P][R][Parts];
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int part = 0; part < Parts; part++) even[p][r][part] = odd[p][r][part] = _mm512_setzero_ps();
    for (int64_t i = begin; i < begin + kStep; i += 2) {
#pragma GCC unroll 2
      for (int p = 0; p < P; p++) {
        const uint8_t *from = w + p * w_stride + i * 32;
        const __m512i pair = lay_out_pair(from, inputs - i);
        __builtin_prefetch(from + kFetchAhead, 0, kFetchInto);
        const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), second = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 3
          for (int part = 0; part < Parts; part++) {
            const float *x = parts + (r * Parts + part) * kFewDepth + i;
            even[p][r][part] = _mm512_fmadd_ps(_mm512_set1_ps(x[0]), first, even[p][r][part]);
            odd[p][r][part] = _mm512_fmadd_ps(_mm512_set1_ps(x[1]), second, odd[p][r][part]);
          }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int part = 0; part < Parts; part++) sums[p][r] = _mm512_add_ps(sums[p][r], _mm512_add_ps(even[p][r][part], odd[p][r][part]));
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; p++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) _mm512_storeu_ps(c + (p * R + r) * 16, sums[p][r]);
}

template <int Parts, int R>
static void few_panels(const float *x, int64_t stride, const uint8_t *w, int64_t k, int64_t panels, FloatTileMemory &memory, float *sums) {
  constexpr int wide = R == 1 ? 2 : 1;
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | kFlush);
  for (int64_t begin = 0; begin < k; begin += kFewDepth) {
    const int64_t inputs = min(kFewDepth, k - begin);
    for (int r = 0; r < R; r++) split_wide<Parts>(x + r * stride + begin, inputs, memory.few + r * Parts * kFewDepth);
    for (int64_t p = 0; p < panels;) {
      const uint8_t *from = w + (p * k + begin) * 32;
      float *c = sums + p * R * 16;
      if (p + wide <= panels) few_rows<Parts, R, wide>(memory.few, from, k * 32, inputs, begin, c), p += wide;
      else few_rows<Parts, R, 1>(memory.few, from, k * 32, inputs, begin, c), p++;
    }
  }
  _mm_setcsr(control);
}
template <int Parts>
static void float_few(const float *x, int64_t stride, int64_t rows, const uint8_t *w, int64_t k, int64_t panels, FloatTileMemory &memory, float *sums) {
  if (rows == 1) few_panels<Parts, 1>(x, stride, w, k, panels, memory, sums);
  else if (rows == 2) few_panels<Parts, 2>(x, stride, w, k, panels, memory, sums);
  else few_panels<Parts, 3>(x, stride, w, k, panels, memory, sums);
}

#else

constexpr bool kFloatTiles = false;
constexpr int64_t kPanelsOfTiles = kPanelGroup;

#endif

}  // namespace XK_LEVEL
