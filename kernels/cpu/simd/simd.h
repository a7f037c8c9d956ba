// f32x16: sixteen float lanes made of the level's native vectors, and the few operations kernels need. Every level keeps the same
// order of operations per lane, so bits depend on the level only through FMA. Nothing here may have external linkage: the same
// names are compiled once per instruction set, and the linker must never mix them.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define XK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define XK_VECTOR_BYTES 32
#else
#define XK_VECTOR_BYTES 16
#endif

#define XK_INLINE static inline __attribute__((always_inline))

namespace XK_LEVEL {

typedef float vf __attribute__((vector_size(XK_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(XK_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(XK_VECTOR_BYTES)));
typedef float vf_memory __attribute__((vector_size(XK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t vu_memory __attribute__((vector_size(XK_VECTOR_BYTES), aligned(4), may_alias));

constexpr int kLanes = XK_VECTOR_BYTES / 4, kParts = 16 / kLanes;

// Tile sizes, all in one place: accumulators of f32x16 that fit the register file beside the operands, rows of the
// widest tile, and rows that may be one tile, though it is narrow, so that their weights are read from memory but once.
#if XK_VECTOR_BYTES == 64
constexpr int kAccumulators = 24, kTileRows = 6, kFewRows = 8;
#elif XK_VECTOR_BYTES == 32 || defined(__aarch64__)
constexpr int kAccumulators = 6, kTileRows = 6, kFewRows = kTileRows;
#else
constexpr int kAccumulators = 2, kTileRows = 2, kFewRows = kTileRows;
#endif
// How far ahead of the weights in use others are fetched by hand, and into which cache. Cores with wide vectors are far from memory:
// there it is what lies behind the panels of a tile, so that each line is asked for once, a tile before its use; or, of one panel after
// the other, a line that near, if any (below).
#if XK_VECTOR_BYTES == 64
constexpr int64_t kFetchAhead = 8192;
constexpr int kFetchInto = 2;  // L2
#else
constexpr int64_t kFetchAhead = 2048;
constexpr int kFetchInto = 3;  // L1
#endif
// Few rows may read one panel after the other: prefetchers of a core are best at one stream, but rows that do not stay in L1 beside it
// are read again for every panel. Those of Zen 4 bring whole numbers at the speed of memory (30 of 31 GB/s), several streams, or what is
// asked for by hand, at less (20 to 24). Those of Zen 5 need help (xk::asks_ahead), which makes a token of one sequence 5 to 15 % quicker;
// one row of bf16 too is then read so (10 %). Sizes are from measuring 1 to 8 rows of 1,024, 2,048 and 3,072 inputs both ways, on either.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
constexpr bool kStreams = true;
static inline bool streams(int rows, int64_t row_bytes, int64_t panel_bytes) {
  const int64_t bytes = rows * row_bytes;
  return (xk::asks_ahead && rows <= kTileRows) || (bytes <= panel_bytes && bytes <= (rows > 4 ? 10752 : 9216));
}
#else
constexpr bool kStreams = false;
static inline bool streams(int, int64_t, int64_t) { return false; }
#endif
constexpr int fetch_into(int rows) { return rows > 4 ? 3 : kFetchInto; }  // many rows leave time to bring a line all the way
static inline int64_t fetch_ahead(int panels, int64_t stride) {
  return XK_VECTOR_BYTES == 64 && !(kStreams && panels == 1 && xk::asks_ahead) ? panels * stride : kFetchAhead;
}
// What a tile of many rows fetches while it multiplies: the tiles that pass some panels share those that come next, as one alone would
// wait for memory, which would then wait for the others. Bytes from a line of the first panel; 0, the line itself, is nothing.
struct Ahead {
  int64_t first, second;
  __attribute__((always_inline)) void fetch(const uint8_t *line) const { __builtin_prefetch(line + first, 0, 2), __builtin_prefetch(line + second, 0, 2); }
};
static inline Ahead share_ahead(int tile, int tiles, int panels, int64_t stride) {
  const int sharing = tiles < panels ? tiles : panels;
  if (tile >= sharing) return {0, 0};
  const int from = panels * tile / sharing, end = panels * (tile + 1) / sharing;
  const int64_t ahead = fetch_ahead(panels, stride);
  return {ahead + from * stride, ahead + (end - 1) * stride};
}
constexpr int64_t kRowBlock = 96;    // rows that share one pass over a panel: they stay in L2
constexpr int64_t kDepthBlock = XK_VECTOR_BYTES == 64 ? 2048 : 256;  // part of K that stays in L2 (with rows of up to about 3,000), or in L1, while they pass
constexpr int64_t kPanelGroup = 4;   // most panels of one unit of work
constexpr int64_t kUnitWeights = 32768;  // weights of one unit where there are few rows; wide vectors need kPanelGroup panels
constexpr int64_t kKeyBlock = 64;    // tokens of one attention block; part of the definition of the result
constexpr int64_t kKeyChunk = 512;   // tokens whose blocks are merged first; so too
constexpr int64_t kQueryRows = 96;   // query rows (token x head) that share one pass over keys and values

struct f32x16 {
  vf v[kParts];
};

#define XK_PARTS for (int i = 0; i < kParts; i++)

XK_INLINE vf native_fma(vf a, vf b, vf c) {
#if XK_VECTOR_BYTES == 64
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif XK_VECTOR_BYTES == 32
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

XK_INLINE f32x16 load(const void *p) {
  f32x16 r;
  XK_PARTS r.v[i] = *(const vf_memory *)((const float *)p + i * kLanes);
  return r;
}
XK_INLINE void store(void *p, f32x16 a) { XK_PARTS *(vf_memory *)((float *)p + i * kLanes) = a.v[i]; }
XK_INLINE f32x16 set1(float x) {
  f32x16 r;
  XK_PARTS r.v[i] = x - (vf){};
  return r;
}
XK_INLINE f32x16 zero() {
  f32x16 r;
  XK_PARTS r.v[i] = (vf){};
  return r;
}
XK_INLINE f32x16 lane_index() {
  static const float index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(index);
}
XK_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  XK_PARTS c.v[i] = native_fma(a.v[i], b.v[i], c.v[i]);
  return c;
}
XK_INLINE f32x16 operator+(f32x16 a, f32x16 b) {
  XK_PARTS a.v[i] = a.v[i] + b.v[i];
  return a;
}
XK_INLINE f32x16 operator-(f32x16 a, f32x16 b) {
  XK_PARTS a.v[i] = a.v[i] - b.v[i];
  return a;
}
XK_INLINE f32x16 operator*(f32x16 a, f32x16 b) {
  XK_PARTS a.v[i] = a.v[i] * b.v[i];
  return a;
}
XK_INLINE f32x16 operator/(f32x16 a, f32x16 b) {
  XK_PARTS a.v[i] = a.v[i] / b.v[i];
  return a;
}
// b where the comparison fails, so a NaN in b survives.
XK_INLINE f32x16 max(f32x16 a, f32x16 b) {
  XK_PARTS b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
}
XK_INLINE f32x16 min(f32x16 a, f32x16 b) {
  XK_PARTS b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return b;
}
// a < b ? yes : no, lane by lane
XK_INLINE f32x16 select_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no) {
  XK_PARTS no.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return no;
}
XK_INLINE f32x16 abs(f32x16 a) {
  XK_PARTS a.v[i] = (vf)((vu)a.v[i] & 0x7fffffffu);
  return a;
}
XK_INLINE f32x16 copy_sign(f32x16 magnitude, f32x16 sign) {
  XK_PARTS magnitude.v[i] = (vf)(((vu)magnitude.v[i] & 0x7fffffffu) | ((vu)sign.v[i] & 0x80000000u));
  return magnitude;
}

// The first n of 16 lanes; the rest are zero and their memory is not touched.
XK_INLINE f32x16 load_first(const float *p, int64_t n) {
  float lane[16] = {0};
  memcpy(lane, p, (size_t)n * sizeof(float));
  return load(lane);
}
XK_INLINE void store_first(float *p, f32x16 a, int64_t n) {
  float lane[16];
  store(lane, a);
  memcpy(p, lane, (size_t)n * sizeof(float));
}
XK_INLINE f32x16 load_some(const float *p, int64_t n) { return n >= 16 ? load(p) : load_first(p, n); }
XK_INLINE void store_some(float *p, f32x16 a, int64_t n) {
  if (n >= 16) store(p, a);
  else store_first(p, a, n);
}

// Lane l meets l+8, then l+4, l+2, l+1: the same tree at every level.
typedef float quarter __attribute__((vector_size(16), aligned(4), may_alias));
XK_INLINE float reduce_add(f32x16 a) {
  quarter q[4];
  store(q, a);
  q[0] = (q[0] + q[2]) + (q[1] + q[3]);
  return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}
XK_INLINE float reduce_max(f32x16 a) {
  quarter q[4];
  store(q, a);
  q[0] = q[0] > q[2] ? q[0] : q[2];
  q[1] = q[1] > q[3] ? q[1] : q[3];
  q[0] = q[0] > q[1] ? q[0] : q[1];
  const float even = q[0][0] > q[0][2] ? q[0][0] : q[0][2], odd = q[0][1] > q[0][3] ? q[0][1] : q[0][3];
  return even > odd ? even : odd;
}

// A bf16 panel keeps lanes i and i+8 as low and high half of uint32 i: a shift and a mask, no shuffle across lanes.
XK_INLINE f32x16 load_bf16_panel(const void *p) {
  f32x16 r;
#if XK_VECTOR_BYTES == 64
  const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
  const __m512i pick = _mm512_set_epi64(
      (long long)0x0f0e80800b0a8080, (long long)0x0706808003028080, (long long)0x0f0e80800b0a8080,
      (long long)0x0706808003028080, (long long)0x0d0c808009088080, (long long)0x0504808001008080,
      (long long)0x0d0c808009088080, (long long)0x0504808001008080);
  r.v[0] = (vf)_mm512_shuffle_epi8(both, pick);
#else
  for (int i = 0; i < kParts / 2; i++) {
    const vu pair = *(const vu_memory *)((const uint32_t *)p + i * kLanes);
    r.v[i] = (vf)(pair << 16);
    r.v[i + kParts / 2] = (vf)(pair & 0xffff0000u);
  }
#endif
  return r;
}

// Sixteen bf16 in their natural order.
XK_INLINE f32x16 load_bf16(const uint16_t *p) {
  f32x16 r;
#if XK_VECTOR_BYTES == 64
  r.v[0] = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif XK_VECTOR_BYTES == 32
  XK_PARTS r.v[i] = (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + i * 8))), 16);
#elif defined(__aarch64__)
  XK_PARTS r.v[i] = (vf)vshll_n_u16(vld1_u16(p + i * 4), 16);
#else
  XK_PARTS r.v[i] = (vf)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(p + i * 4))), 16);
#endif
  return r;
}

// Sixteen int8 as float32.
XK_INLINE f32x16 load_int8(const int8_t *p) {
  f32x16 r;
#if XK_VECTOR_BYTES == 64
  r.v[0] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif XK_VECTOR_BYTES == 32
  XK_PARTS r.v[i] = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + i * 8))));
#elif defined(__aarch64__)
  const int8x16_t all = vld1q_s8(p);
  const int16x8_t half[2] = {vmovl_s8(vget_low_s8(all)), vmovl_high_s8(all)};
  XK_PARTS r.v[i] = (vf)vcvtq_f32_s32(i % 2 ? vmovl_high_s16(half[i / 2]) : vmovl_s16(vget_low_s16(half[i / 2])));
#else
  XK_PARTS {
    int four;
    memcpy(&four, p + i * 4, 4);
    r.v[i] = (vf)_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four)));
  }
#endif
  return r;
}

XK_INLINE float bf16_to_float(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
// Round to nearest even; a NaN stays a NaN.
XK_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace XK_LEVEL
