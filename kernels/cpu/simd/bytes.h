// Products with rows of int8, under a scale for every 32 inputs, or one for the row. The same exact sums at every level: fours of bytes
// where the machine multiplies those, with weights made unsigned (int8 + 128, int4 + 8) and a start that takes it back; pairs elsewhere.
#pragma once
#include "quantised.h"

namespace XK_LEVEL {

#if defined(__AVX512VNNI__)

// Four inputs of an int8 panel, as units that multiply bytes take them: [16 outputs][4].
XK_INLINE __m512i lay_out_four(const uint8_t *w) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), _mm512_loadu_si512(w));
}

#endif

// Steps of activations, and their sums with weights, under whatever scales. Beside the steps of a stretch lie two numbers: what a step
// is worth, and the start (int32), the sum of its steps times -128.
struct ByteRows {
  static constexpr int64_t bits = 8;
  static constexpr int kFactors = 2;
#if defined(__AVX512VNNI__)
  typedef int8_t Value;
#else
  typedef int16_t Value;
#endif
  static int64_t row_bytes(int64_t padded, int64_t stretches) {
    return (padded * (int64_t)sizeof(Value) + stretches * kFactors * 4 + 63) / 64 * 64;
  }
  static void put_start(int32_t sum, float *factors) {
    const int32_t start = -128 * sum;
    memcpy(factors + 1, &start, 4);
  }

  template <bool Fetch, int R, int P, class X>
  XK_INLINE void sum_bytes(const Stretch &s, const X &x, [[maybe_unused]] int64_t stretch, [[maybe_unused]] int64_t inputs, vi sum[R][P][kParts]) {
#if defined(__AVX512VNNI__)
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    const uint8_t *w = s.w;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vi start = broadcast32(x.factors(r, stretch) + 1);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) sum[r][p][0] = start;
    }
#pragma GCC unroll 8
    for (int64_t k = 0; k < inputs; k += 4, w += 64) {
      vb line[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        line[p] = (vb)_mm512_xor_si512(lay_out_four(w + p * s.w_stride), sign);
        if (Fetch) __builtin_prefetch(w + p * s.w_stride + fetch_ahead(P, s.w_stride), 0, fetch_into(R));
      }
      if (!Fetch) s.ahead.fetch(w);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const vb four = (vb)broadcast32(x.word(r, s.at + k));
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) sum[r][p][0] = add_bytes(sum[r][p][0], line[p], four);
      }
    }
#else
    Int8::sum_pairs<Fetch, R, P>(s, x, sum);
#endif
  }
};

// A scale for every 32 inputs of a row.
struct Int8Bytes : ByteRows {
  static constexpr bool kRowScale = false, kWholeRows = false, kTiled = true;
  static int64_t stretch(int64_t) { return kStretch4; }
  XK_INLINE f32x16 scaled(f32x16 sum, const float *factors) { return sum * set1(factors[0]); }
  static int64_t row_bytes(int64_t padded) { return ByteRows::row_bytes(padded, padded / kStretch4); }
  static void quantise(const float *x, int64_t k, int64_t padded, int64_t, const Place &to) {
    float *factors = to.factors;
    for (int64_t j = 0; j < padded; j += kStretch4, factors += to.next) put_start(quantise_stretch<Value>(x, k, j, to, factors[0]), factors);
  }

  template <bool Fetch, int R, int P, class X>
  XK_INLINE void add(const Stretch &s, const X &x, f32x16 (*c)[P]) {
    vi sum[R][P][kParts];
    sum_bytes<Fetch, R, P>(s, x, s.at / kStretch4, kStretch4, sum);
    add_stretch<Int8Bytes, R, P>(s, x, sum, c);
  }
};

// One scale for a row, beside one for each output: a sum is whole until its end.
constexpr int64_t kLongestRow = 1 << 17;  // 127 * 127 times as many stays below 2^31
struct Int8WholeBytes : ByteRows {
  static constexpr bool kRowScale = true, kWholeRows = true, kTiled = false;
  static int64_t stretch(int64_t inputs) { return inputs; }
  static int64_t row_bytes(int64_t padded) { return ByteRows::row_bytes(padded, 1); }
  static void quantise(const float *x, int64_t k, int64_t padded, int64_t, const Place &to) {
    Wide sums = {};
    *to.factors = row_steps(x, k, padded, 127.0f, [&](Wide values, int64_t at) { put<Value>(values, to, at), sums += values; });
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += sums[i];
    put_start(sum, to.factors);
  }

  template <bool Fetch, int R, int P, class X>
  XK_INLINE void add(const Stretch &s, const X &x, f32x16 (*c)[P]) {
    vi sum[R][P][kParts];
    sum_bytes<Fetch, R, P>(s, x, 0, s.inputs, sum);
    add_scaled<R, P>(s, sum, c);
  }
};

// int4 weights and one scale for a row: a sum is whole until the end of a group. Beside the steps of a row lie its scale and, for every
// group, the start (int32), the sum of its steps times -8.
struct Int4RowBytes {
  static constexpr int64_t bits = 4;
  static constexpr bool kRowScale = true, kWholeRows = false, kTiled = false;
  static constexpr int kFactors = 1;
  typedef int8_t Value;
  static int64_t stretch(int64_t group) { return group; }
  static int64_t row_bytes(int64_t padded) { return (padded + (1 + padded / kStretch4) * 4 + 63) / 64 * 64; }
  static void quantise(const float *x, int64_t k, int64_t padded, int64_t group, const Place &to) {
    Wide sums = {};
    float *start = to.factors;
    const int64_t each = group ? group : padded;
    *to.factors = row_steps(x, k, padded, 127.0f, [&](Wide values, int64_t at) {
      put<Value>(values, to, at), sums += values;
      if ((at + 16) % each) return;
      int32_t sum = 0;
      for (int i = 0; i < 16; i++) sum -= 8 * sums[i];
      memcpy(start += to.next, &sum, 4), sums = (Wide){};
    });
  }

  template <bool Fetch, int R, int P, class X>
  XK_INLINE void add(const Stretch &s, const X &x, f32x16 (*c)[P]) {
    vi sum[R][P][kParts];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vi start = broadcast32(x.factors(r, 1 + (uint32_t)s.at / (uint32_t)s.inputs));
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) XK_PARTS sum[r][p][i] = start;
    }
    for (int64_t k = 0; k < s.inputs; k += kStretch4) Int4::sum_nibbles<Fetch, R, P>(s, x, k, sum);
    add_scaled<R, P>(s, sum, c);
  }
};

}  // namespace XK_LEVEL
