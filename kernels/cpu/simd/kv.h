// The KV span of a sequence: groups of 16 tokens, group g at byte g * group_bytes; inside it a layer at layer_offset; inside that,
// per KV head, keys [key_dim][16] and then values [16][value_dim]; latent layers keep no values. The element type is float32, bfloat16
// or int8. Before the keys of int8 lie float32 scales, what a step is worth: of the 16 keys, then of the 16 values; of latent keys,
// whose parts differ in size, of their two parts.
#pragma once
#include "steps.h"

namespace XK_LEVEL {

// Sixteen bf16 in the order that costs least, even ones before odd ones where that saves shuffles: sums of such lanes are woven into
// their natural order once, at the end.
XK_INLINE f32x16 load_bf16_apart(const uint16_t *p) {
#if defined(__x86_64__) && XK_VECTOR_BYTES < 64
  f32x16 r;
  for (int i = 0; i < kParts; i += 2) {
    const vu pairs = *(const vu_memory *)(p + i * kLanes);
    r.v[i] = (vf)(pairs << 16);
    r.v[i + 1] = (vf)(pairs & 0xffff0000u);
  }
  return r;
#else
  return load_bf16(p);
#endif
}
XK_INLINE f32x16 weave_apart(f32x16 a) {
#if defined(__x86_64__) && XK_VECTOR_BYTES == 32
  const __m256 low = _mm256_unpacklo_ps((__m256)a.v[0], (__m256)a.v[1]), high = _mm256_unpackhi_ps((__m256)a.v[0], (__m256)a.v[1]);
  a.v[0] = (vf)_mm256_permute2f128_ps(low, high, 0x20);
  a.v[1] = (vf)_mm256_permute2f128_ps(low, high, 0x31);
#elif defined(__x86_64__) && XK_VECTOR_BYTES == 16
  for (int i = 0; i < kParts; i += 2) {
    const __m128 even = (__m128)a.v[i], odd = (__m128)a.v[i + 1];
    a.v[i] = (vf)_mm_unpacklo_ps(even, odd);
    a.v[i + 1] = (vf)_mm_unpackhi_ps(even, odd);
  }
#endif
  return a;
}

struct KvF32 {
  using Element = float;
  static constexpr int64_t kScaleBytes = 0;
  static constexpr bool kRounded = false;
  XK_INLINE float encode(float x) { return x; }
  XK_INLINE f32x16 load(const float *p) { return XK_LEVEL::load(p); }
  XK_INLINE f32x16 load_apart(const float *p) { return XK_LEVEL::load(p); }
  XK_INLINE f32x16 weave(f32x16 a) { return a; }
  XK_INLINE float decode(float x) { return x; }
};
struct KvBf16 {
  using Element = uint16_t;
  static constexpr int64_t kScaleBytes = 0;
  static constexpr bool kRounded = false;
  XK_INLINE uint16_t encode(float x) { return float_to_bf16(x); }
  XK_INLINE f32x16 load(const uint16_t *p) { return load_bf16(p); }
  XK_INLINE f32x16 load_apart(const uint16_t *p) { return load_bf16_apart(p); }
  XK_INLINE f32x16 weave(f32x16 a) { return weave_apart(a); }
  XK_INLINE float decode(uint16_t x) { return bf16_to_float(x); }
};
struct KvInt8 {  // steps; who reads them multiplies by their scales
  using Element = int8_t;
  static constexpr int64_t kScaleBytes = 2 * xk::kGroup * sizeof(float);
  static constexpr bool kRounded = false;
  XK_INLINE f32x16 load(const int8_t *p) { return load_int8(p); }
  XK_INLINE f32x16 load_apart(const int8_t *p) { return load_int8(p); }
  XK_INLINE f32x16 weave(f32x16 a) { return a; }
  XK_INLINE float decode(int8_t x) { return (float)x; }
};

// Rounded to bf16, as what meets the state then is too; steps of int8 need no rounding.
XK_INLINE f32x16 nearest_bf16(f32x16 a) {
  XK_PARTS {
    const vu bits = (vu)a.v[i], nearest = bits + 0x7fffu + (bits >> 16 & 1);
    a.v[i] = (vf)(((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : nearest) & 0xffff0000u);
  }
  return a;
}
template <class Kv>
struct Rounded : Kv {
  static constexpr bool kRounded = true;
};
template <>
struct Rounded<KvF32> : KvF32 {
  static constexpr bool kRounded = true;
  XK_INLINE f32x16 load(const float *p) { return nearest_bf16(XK_LEVEL::load(p)); }
  XK_INLINE f32x16 load_apart(const float *p) { return load(p); }
  XK_INLINE float decode(float x) { return bf16_to_float(float_to_bf16(x)); }
};

struct KvPlace {  // of one layer in the groups of a span; value_dim 0: only keys are kept
  int64_t layer_offset, group_bytes, kv_heads, key_dim, value_dim;
  template <class Kv>
  int64_t head_bytes() const {
    return (key_dim + value_dim) * xk::kGroup * (int64_t)sizeof(typename Kv::Element) + Kv::kScaleBytes;
  }
};

// Keys of one head in the group of `position`; its scales lie before them, its values follow key_dim * 16 elements later.
template <class Kv>
XK_INLINE typename Kv::Element *kv_group(uint8_t *span, const KvPlace &p, int64_t head, int64_t position) {
  uint8_t *heads = span + position / xk::kGroup * p.group_bytes + p.layer_offset;
  return (typename Kv::Element *)(heads + head * p.head_bytes<Kv>() + Kv::kScaleBytes);
}

// n numbers under one scale, `stride` elements apart. A number that is not finite makes the scale NaN.
template <class Kv>
XK_INLINE void kv_store(typename Kv::Element *to, int64_t stride, const float *x, int64_t n, [[maybe_unused]] float *scale) {
  if constexpr (Kv::kScaleBytes == 0) {
    for (int64_t d = 0; d < n; d++) to[d * stride] = Kv::encode(x[d]);
  } else {
    const Span span = span_of(x, n, 127.0f);
    *scale = span.step;
    for (int64_t d = 0; d < n; d += 16) {
      int32_t whole[16];
      whole_steps(span.steps > 0 ? load_some(x + d, n - d) / set1(span.step) : zero(), 1.0f, whole);
      for (int64_t i = 0; i < min(16, n - d); i++) to[(d + i) * stride] = (int8_t)whole[i];
    }
  }
}

// dims first..first+count-1 of the key of `position`, under the first or the second of its scales.
template <class Kv>
XK_INLINE void kv_put_key(typename Kv::Element *group, int64_t position, const float *k, int64_t first, int64_t count, int scale) {
  const int64_t lane = position % xk::kGroup;
  float *scales = (float *)((uint8_t *)group - Kv::kScaleBytes);
  kv_store<Kv>(group + first * xk::kGroup + lane, xk::kGroup, k, count, scales + scale * xk::kGroup + lane);
}

template <class Kv>
XK_INLINE void kv_put(typename Kv::Element *group, const KvPlace &p, int64_t position, const float *k, const float *v) {
  const int64_t lane = position % xk::kGroup;
  float *scales = (float *)((uint8_t *)group - Kv::kScaleBytes);
  kv_put_key<Kv>(group, position, k, 0, p.key_dim, 0);
  kv_store<Kv>(group + p.key_dim * xk::kGroup + lane * p.value_dim, 1, v, p.value_dim, scales + xk::kGroup + lane);
}

template <class Kv>
static const char *check_kv(const KvPlace &p) {
  const int64_t element_bytes = Kv::kScaleBytes ? sizeof(float) : sizeof(typename Kv::Element);
  if (p.kv_heads < 1 || p.key_dim < 1 || p.value_dim < 0) return "kv_heads and key_dim must be positive, value_dim not negative";
  if (p.layer_offset < 0 || p.layer_offset % element_bytes || p.group_bytes % element_bytes)
    return "layer_offset and group_bytes must be whole elements (of int8, whole scales) and not negative";
  if (p.layer_offset + p.kv_heads * p.head_bytes<Kv>() > p.group_bytes)
    return "the layer does not fit: its heads' keys and values exceed group_bytes";
  return nullptr;
}

}  // namespace XK_LEVEL
