// The KV span of a sequence: groups of 16 tokens, group g at byte g * group_bytes; inside it a layer at layer_offset; inside that,
// per KV head, keys [key_dim][16] and then values [16][value_dim]; latent layers keep no values. The element type is float32 or
// bfloat16.
#pragma once
#include "../kernels.h"
#include "panel.h"
#include "simd.h"

namespace XK_LEVEL {

struct KvF32 {
  using Element = float;
  using Keys = PanelF32;
  XK_INLINE float encode(float x) { return x; }
  XK_INLINE f32x16 load(const float *p) { return XK_LEVEL::load(p); }
  XK_INLINE float decode(float x) { return x; }
};
struct KvBf16 {
  using Element = uint16_t;
  using Keys = PlainBf16;
  XK_INLINE uint16_t encode(float x) { return float_to_bf16(x); }
  XK_INLINE f32x16 load(const uint16_t *p) { return load_bf16(p); }
  XK_INLINE float decode(uint16_t x) { return bf16_to_float(x); }
};

struct KvPlace {  // of one layer in the groups of a span; value_dim 0: only keys are kept
  int64_t layer_offset, group_bytes, kv_heads, key_dim, value_dim;
  int64_t head_elements() const { return (key_dim + value_dim) * xk::kGroup; }
};

// Keys of one head in the group of `position`; its values follow key_dim * 16 elements later.
template <class Kv>
XK_INLINE typename Kv::Element *kv_group(uint8_t *span, const KvPlace &p, int64_t head, int64_t position) {
  return (typename Kv::Element *)(span + position / xk::kGroup * p.group_bytes + p.layer_offset) + head * p.head_elements();
}

// dims first..first+count-1 of the key of `position`.
template <class Kv>
XK_INLINE void kv_put_key(typename Kv::Element *group, int64_t position, const float *k, int64_t first, int64_t count) {
  typename Kv::Element *lane = group + first * xk::kGroup + position % xk::kGroup;
  for (int64_t d = 0; d < count; d++) lane[d * xk::kGroup] = Kv::encode(k[d]);
}

template <class Kv>
XK_INLINE void kv_put(typename Kv::Element *group, const KvPlace &p, int64_t position, const float *k, const float *v) {
  typename Kv::Element *values = group + p.key_dim * xk::kGroup + position % xk::kGroup * p.value_dim;
  kv_put_key<Kv>(group, position, k, 0, p.key_dim);
  for (int64_t d = 0; d < p.value_dim; d++) values[d] = Kv::encode(v[d]);
}

template <class Kv>
static const char *check_kv(const KvPlace &p) {
  const int64_t element_bytes = sizeof(typename Kv::Element);
  if (p.kv_heads < 1 || p.key_dim < 1 || p.value_dim < 0) return "kv_heads and key_dim must be positive, value_dim not negative";
  if (p.layer_offset < 0 || p.layer_offset % element_bytes || p.group_bytes % element_bytes)
    return "layer_offset and group_bytes must be whole elements and not negative";
  if (p.layer_offset + p.kv_heads * p.head_elements() * element_bytes > p.group_bytes)
    return "the layer does not fit: its heads' keys and values exceed group_bytes";
  return nullptr;
}

}  // namespace XK_LEVEL
