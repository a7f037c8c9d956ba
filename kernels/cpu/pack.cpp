// Packs a [n, k] weight into panels of 16 rows, rows past n being zero: [k][16] (see simd/panel.h), or quantised (see
// simd/quantised.h). Done once at compile time, in one thread.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "xk.h"

namespace {

float widen(float x) { return x; }
float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

template <class To>
To narrow(float x);
template <>
float narrow<float>(float x) {
  return x;
}
template <>
uint16_t narrow<uint16_t>(float x) {  // round to nearest even; a NaN stays a NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Eight columns of 16 rows of bfloat16, as panels have them: row i beside row i + 8. Zipping the halves three times, by units that
// double, transposes.
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));

#ifdef __clang__
#define XK_ZIP(type, a, b, ...) __builtin_shufflevector((type)(a), (type)(b), __VA_ARGS__)
#else
#define XK_ZIP(type, a, b, ...) __builtin_shuffle((type)(a), (type)(b), (type){__VA_ARGS__})
#endif

void transpose(const u16x8 *rows, uint16_t *out) {
  u32x4 pairs[2][8];
  for (int r = 0; r < 8; r++) {
    pairs[0][r] = (u32x4)XK_ZIP(u16x8, rows[r], rows[r + 8], 0, 8, 1, 9, 2, 10, 3, 11);
    pairs[1][r] = (u32x4)XK_ZIP(u16x8, rows[r], rows[r + 8], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  for (int half = 0; half < 2; half++)
    for (int quarter = 0; quarter < 2; quarter++) {
      const u32x4 *four = pairs[half] + quarter * 4;
      const u64x2 low[2] = {(u64x2)XK_ZIP(u32x4, four[0], four[1], 0, 4, 1, 5), (u64x2)XK_ZIP(u32x4, four[2], four[3], 0, 4, 1, 5)};
      const u64x2 high[2] = {(u64x2)XK_ZIP(u32x4, four[0], four[1], 2, 6, 3, 7), (u64x2)XK_ZIP(u32x4, four[2], four[3], 2, 6, 3, 7)};
      const u64x2 columns[4] = {XK_ZIP(u64x2, low[0], low[1], 0, 2), XK_ZIP(u64x2, low[0], low[1], 1, 3),
                                XK_ZIP(u64x2, high[0], high[1], 0, 2), XK_ZIP(u64x2, high[0], high[1], 1, 3)};
      for (int i = 0; i < 4; i++) memcpy(out + (half * 4 + i) * 16 + quarter * 8, &columns[i], 16);
    }
}

inline u16x8 eight(const uint16_t *from) {
  u16x8 columns;
  memcpy(&columns, from, sizeof columns);
  return columns;
}
inline u16x8 eight(const float *from) {
  uint16_t columns[8];
  for (int i = 0; i < 8; i++) columns[i] = narrow<uint16_t>(from[i]);
  return eight(columns);
}

// Whole panels, where the machine's vectors do it: 32 columns at a time, as rows that lie a power of two apart share few places in
// cache and one line of each should be read once. Returns the columns done.
template <class From>
int64_t pack_whole(const uint8_t *weight, int64_t row_stride, int64_t k, uint16_t *to) {
  int64_t done = 0;
  for (; done + 32 <= k; done += 32) {
    u16x8 rows[4][16];
    for (int r = 0; r < 16; r++)
      for (int i = 0; i < 4; i++) rows[i][r] = eight(reinterpret_cast<const From *>(weight + r * row_stride) + done + i * 8);
    for (int i = 0; i < 4; i++) transpose(rows[i], to + (done + i * 8) * 16);
  }
  return done;
}
template <class From>
int64_t pack_whole(const uint8_t *, int64_t, int64_t, float *) {
  return 0;
}

template <class From, class To>
void pack(const uint8_t *weight, int64_t row_stride, int64_t n, int64_t k, To *out) {
  for (int64_t panel = 0; panel * 16 < n; panel++) {
    To *to = out + panel * k * 16;
    const uint8_t *first = weight + panel * 16 * row_stride;
    const int64_t rows = std::min<int64_t>(16, n - panel * 16);
    if (rows < 16) memset(to, 0, static_cast<size_t>(k * 16) * sizeof(To));
    // Sixteen columns at a time, so that the lines being written stay in cache while the rows pass.
    for (int64_t begin = rows < 16 ? 0 : pack_whole<From>(first, row_stride, k, to); begin < k; begin += 16) {
      const int64_t end = std::min(k, begin + 16);
      for (int64_t r = 0; r < rows; r++) {
        const From *from = reinterpret_cast<const From *>(first + r * row_stride);
        const int64_t lane = sizeof(To) == 2 ? r % 8 * 2 + r / 8 : r;  // bf16: row i beside row i + 8
        for (int64_t i = begin; i < end; i++)
          if constexpr (std::is_same_v<From, To>) to[i * 16 + lane] = from[i];
          else to[i * 16 + lane] = narrow<To>(widen(from[i]));
      }
    }
  }
}

// --- quantised ---

float half_to_float(uint16_t half) {  // of a finite one
  const uint32_t bits = static_cast<uint32_t>(half & 0x7fffu) << 13;
  float f;
  memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  return half & 0x8000u ? -f : f;
}

uint16_t float_to_half(float x) {  // round to nearest even; infinite beyond 65504, and for a NaN
  const float magnitude = fabsf(x);
  const uint16_t sign = signbit(x) ? 0x8000u : 0;
  if (!(magnitude < 65520.0f)) return sign | 0x7c00u;
  // In units of float16's last bit, which is 2^-24 for all subnormals; a carry into the exponent comes out right.
  const int exponent = magnitude < 0x1p-14f ? -14 : ilogbf(magnitude);
  const float unit = ldexpf(1.0f, exponent - 10);
  const float steps = nearbyintf(magnitude / unit);
  return static_cast<uint16_t>(sign | (static_cast<int>(steps) + (exponent + 14) * 1024));
}

struct Group {  // the inputs of one output under one scale
  const float *w;
  int64_t count;
  int low, high;  // steps
};

inline int step_of(float x, int low, int high) {
  const float rounded = x + 12582912.0f - 12582912.0f;  // to nearest even; |x| is far below 2^22
  return static_cast<int>(std::min(std::max(rounded, static_cast<float>(low)), static_cast<float>(high)));
}

struct Fit {
  float error, best;  // sum of squares of what is left; the scale that would leave least with the same steps
};
Fit fit(const Group &g, float scale) {
  const float inverse = 1.0f / scale, low = static_cast<float>(g.low), high = static_cast<float>(g.high);
  float error[4] = {}, along[4] = {}, square[4] = {};
  for (int64_t i = 0; i < g.count; i += 4)
    for (int j = 0; j < 4; j++) {  // four sums, so that the compiler may use a vector; counts are multiples of four
      const float w = g.w[i + j], q = std::min(std::max(w * inverse + 12582912.0f - 12582912.0f, low), high), d = w - q * scale;
      error[j] += d * d;
      along[j] += w * q;
      square[j] += q * q;
    }
  const float total = (square[0] + square[2]) + (square[1] + square[3]);
  return {(error[0] + error[2]) + (error[1] + error[3]), total > 0 ? ((along[0] + along[2]) + (along[1] + along[3])) / total : scale};
}

// int8: the greatest magnitude is 127 steps. int4: of a few starts, each improved once, the one with the least error.
// Infinite where a weight is not finite, or the scale is beyond float16.
uint16_t scale_of(const Group &g) {
  float most = 0;
  for (int64_t i = 0; i < g.count; i++) {
    if (!isfinite(g.w[i])) return 0x7c00u;
    if (fabsf(g.w[i]) > fabsf(most)) most = g.w[i];
  }
  if (most == 0) return 0;
  if (g.high == 127) return float_to_half(fabsf(most) / 127.0f);
  uint16_t chosen = float_to_half(most / static_cast<float>(g.low));
  float least = INFINITY;
  for (float steps : {-8.0f, -7.25f, -6.5f, 7.0f, 6.25f, 5.5f}) {
    float scale = most / steps;
    for (int round = 0; round < 2; round++) {
      const uint16_t half = float_to_half(scale);
      if (!(half & 0x7fffu)) break;
      const Fit found = fit(g, half_to_float(half));
      if (found.error < least) least = found.error, chosen = half;
      scale = found.best;
    }
  }
  return chosen;
}

struct Target {  // one panel
  uint8_t *out;
  int bits;
  int64_t group;  // inputs under one scale
  uint8_t *group_at(int64_t index) const { return out + index * (32 + group * 2 * bits); }
  void put_scale(int64_t index, int64_t row, uint16_t scale) const { memcpy(group_at(index) + row * 2, &scale, 2); }
  void put(int64_t index, int64_t row, int64_t i, int step) const {
    uint8_t *steps = group_at(index) + 32;
    if (bits == 8) {
      steps[i / 2 * 32 + row * 2 + i % 2] = static_cast<uint8_t>(step);
    } else {
      uint8_t &both = steps[i / 8 * 64 + row * 4 + i % 4];
      both = static_cast<uint8_t>(both | (step + 8) << (i / 4 % 2 * 4));
    }
  }
};

template <class From>
int64_t pack_quantised(const uint8_t *weight, int64_t row_stride, int64_t n, int64_t k, int bits, int64_t group, const int8_t *steps,
                       const float *scales, uint8_t *out) {
  const int64_t unit = group ? group : 32, padded = (k + unit - 1) / unit * unit, each = group ? group : padded, groups = padded / each;
  const int64_t panel_bytes = groups * (32 + each * 2 * bits);
  std::vector<float> row(static_cast<size_t>(each));
  int64_t beyond = 0;
  memset(out, 0, static_cast<size_t>((n + 15) / 16 * panel_bytes));
  for (int64_t r = 0; r < n; r++) {
    const Target to{out + r / 16 * panel_bytes, bits, each};
    for (int64_t g = 0; g < groups; g++) {
      const int64_t begin = g * each, count = std::min(each, k - begin);
      if (count <= 0) continue;
      if (steps) {
        const float given = scales[r * groups + g];
        const uint16_t half = float_to_half(given);
        beyond += half_to_float(half) != given || (half & 0x7c00u) == 0x7c00u;
        to.put_scale(g, r % 16, half);
        for (int64_t i = 0; i < count; i++) to.put(g, r % 16, i, steps[r * k + begin + i]);
        continue;
      }
      const From *from = reinterpret_cast<const From *>(weight + r * row_stride) + begin;
      for (int64_t i = 0; i < count; i++) row[static_cast<size_t>(i)] = widen(from[i]);
      std::fill(row.begin() + count, row.end(), 0.0f);
      const Group held{row.data(), each, bits == 8 ? -127 : -8, bits == 8 ? 127 : 7};
      const uint16_t half = scale_of(held);
      beyond += (half & 0x7c00u) == 0x7c00u;
      to.put_scale(g, r % 16, half);
      const float scale = half_to_float(half), inverse = scale != 0 ? 1.0f / scale : 0.0f;
      for (int64_t i = 0; i < count; i++) to.put(g, r % 16, i, step_of(row[static_cast<size_t>(i)] * inverse, held.low, held.high));
    }
  }
  return beyond;
}

}  // namespace

int64_t xk_pack_quantised(const void *weight, int64_t row_stride, int32_t source_bf16, int64_t n, int64_t k, int32_t bits, int64_t group,
                          const int8_t *steps, const float *scales, uint8_t *out) {
  const auto pack = source_bf16 ? pack_quantised<uint16_t> : pack_quantised<float>;
  return pack(static_cast<const uint8_t *>(weight), row_stride, n, k, bits, group, steps, scales, out);
}

void xk_pack_panels(const void *weight, int64_t row_stride, int32_t source_bf16, int64_t n, int64_t k, int32_t target_bf16,
                    void *out) {
  const uint8_t *w = static_cast<const uint8_t *>(weight);
  if (source_bf16 && target_bf16) pack<uint16_t, uint16_t>(w, row_stride, n, k, static_cast<uint16_t *>(out));
  else if (source_bf16) pack<uint16_t, float>(w, row_stride, n, k, static_cast<float *>(out));
  else if (target_bf16) pack<float, uint16_t>(w, row_stride, n, k, static_cast<uint16_t *>(out));
  else pack<float, float>(w, row_stride, n, k, static_cast<float *>(out));
}
