// Pairs of bf16 numbers of keys (two dims of sixteen tokens) and of values (two tokens, sixteen dims) as units that multiply bf16 take
// them, from where they lie. Rounded attention by vectors multiplies them at the level that has such an instruction and no
// matrix unit: dims 2i and 2i+1 of a key, tokens 2i and 2i+1 of a block, in order.
#pragma once
#include "common.h"
#include "panel.h"

namespace XK_LEVEL {

enum Both { kBoth };  // of a pair
XK_INLINE f32x16 only(f32x16 x, Both) { return x; }

#if defined(__AVX512BF16__)

XK_INLINE f32x16 interleave(__m512i both) {  // sixteen first ones, then sixteen second ones
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  f32x16 r;
  r.v[0] = (vf)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
  return r;
}
XK_INLINE f32x16 interleave(__m256i a, __m256i b) { return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1)); }

XK_INLINE __mmask16 first_lanes(int64_t n) { return n >= 16 ? (__mmask16)0xffff : n > 0 ? (__mmask16)((1 << n) - 1) : (__mmask16)0; }
XK_INLINE __m256i as_bf16(const uint16_t *p, __mmask16 some) { return _mm256_maskz_loadu_epi16(some, p); }
XK_INLINE __m256i as_bf16(const float *p, __mmask16 some) { return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, p)); }
XK_INLINE __m256i as_bf16(const int8_t *p, __mmask16 some) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, p))));
}

#endif

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

constexpr bool kMultipliesPairs = true;

template <bool Pairs>
struct Chained : Multiplied {};
template <>
struct Chained<true> : Paired {};

XK_INLINE f32x16 pair_of(const uint16_t *a, const uint16_t *b) {
  return interleave(_mm256_loadu_si256((const __m256i *)a), _mm256_loadu_si256((const __m256i *)b));
}
XK_INLINE f32x16 pair_of(const float *a, const float *b) {
  return interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)load(b).v[0], (__m512)load(a).v[0]));
}
XK_INLINE f32x16 pair_of(const int8_t *a, const int8_t *b) {  // the lower half of a small whole float32 is zero
  f32x16 r = load_int8(b);
  r.v[0] = (vf)((vu)load_int8(a).v[0] >> 16 | (vu)r.v[0]);
  return r;
}
// What lies side by side: keys of two dims.
template <class E>
XK_INLINE f32x16 pair_beside(const E *p) {
  if constexpr (sizeof(E) == 2) return interleave(_mm512_loadu_si512(p));
  else return pair_of(p, p + 16);
}

// Only the first or the second of each pair; the other, which may be anything, is zero.
enum Half : uint32_t { kFirst = 0x0000ffff, kSecond = 0xffff0000 };
XK_INLINE f32x16 only(f32x16 pairs, Half half) {
  pairs.v[0] = (vf)((vu)pairs.v[0] & (uint32_t)half);
  return pairs;
}

// Sixteen numbers, rounded to nearest even, as eight pairs.
XK_INLINE void store_rounded(float *to, f32x16 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x.v[0])); }

// Values of two tokens, of which one may not be there.
template <class E>
XK_INLINE f32x16 value_pair(const E *a, const E *b, bool first, bool second, int64_t dims) {
  const __mmask16 some = first_lanes(dims);
  return interleave(as_bf16(a, first ? some : 0), as_bf16(b, second ? some : 0));
}

#else

constexpr bool kMultipliesPairs = false;

template <bool>
struct Chained : Multiplied {};
enum Half : uint32_t { kFirst, kSecond };
XK_INLINE f32x16 only(f32x16 x, Half) { return x; }
template <class E>
XK_INLINE f32x16 pair_of(const E *, const E *) { return zero(); }
template <class E>
XK_INLINE f32x16 pair_beside(const E *) { return zero(); }
template <class E>
XK_INLINE f32x16 value_pair(const E *, const E *, bool, bool, int64_t) { return zero(); }
XK_INLINE void store_rounded(float *, f32x16) {}

#endif

}  // namespace XK_LEVEL
