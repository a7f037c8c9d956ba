// Packs a [n, k] weight into panels [n/16 rounded up][k][16], rows past n being zero. Done once at compile time, in one thread.
#include <string.h>

#include <algorithm>

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

template <class From, class To>
void pack(const uint8_t *weight, int64_t row_stride, int64_t n, int64_t k, To *out) {
  for (int64_t panel = 0; panel * 16 < n; panel++) {
    To *to = out + panel * k * 16;
    const int64_t rows = std::min<int64_t>(16, n - panel * 16);
    if (rows < 16) memset(to, 0, static_cast<size_t>(k * 16) * sizeof(To));
    // Sixteen columns at a time, so that the lines being written stay in cache while the rows pass.
    for (int64_t begin = 0; begin < k; begin += 16) {
      const int64_t end = std::min(k, begin + 16);
      for (int64_t r = 0; r < rows; r++) {
        const From *from = reinterpret_cast<const From *>(weight + (panel * 16 + r) * row_stride);
        const int64_t lane = sizeof(To) == 2 ? r % 8 * 2 + r / 8 : r;  // bf16: row i beside row i + 8
        for (int64_t i = begin; i < end; i++) to[i * 16 + lane] = narrow<To>(widen(from[i]));
      }
    }
  }
}

}  // namespace

void xk_pack_panels(const void *weight, int64_t row_stride, int32_t source_bf16, int64_t n, int64_t k, int32_t target_bf16,
                    void *out) {
  const uint8_t *w = static_cast<const uint8_t *>(weight);
  if (source_bf16 && target_bf16) pack<uint16_t, uint16_t>(w, row_stride, n, k, static_cast<uint16_t *>(out));
  else if (source_bf16) pack<uint16_t, float>(w, row_stride, n, k, static_cast<float *>(out));
  else if (target_bf16) pack<float, uint16_t>(w, row_stride, n, k, static_cast<uint16_t *>(out));
  else pack<float, float>(w, row_stride, n, k, static_cast<float *>(out));
}
