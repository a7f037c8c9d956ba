// The KV span of a sequence: groups of 16 tokens, group g at byte g * group_bytes; inside it a layer at layer_offset; inside that,
// per KV head, keys [head_dim][16] and then values [16][head_dim]. The element type is float32 or bfloat16.
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

// Keys of one head in the group of `position`; its values follow head_dim * 16 elements later.
template <class Kv>
XK_INLINE typename Kv::Element *kv_group(uint8_t *span, int64_t layer_offset, int64_t group_bytes, int64_t head_dim, int64_t head,
                                         int64_t position) {
  return (typename Kv::Element *)(span + position / xk::kGroup * group_bytes + layer_offset) + head * head_dim * 32;
}

template <class Kv>
XK_INLINE void kv_put(typename Kv::Element *group, int64_t head_dim, int64_t position, const float *k, const float *v) {
  const int64_t lane = position % xk::kGroup;
  typename Kv::Element *values = group + head_dim * 16 + lane * head_dim;
  for (int64_t d = 0; d < head_dim; d++) group[d * 16 + lane] = Kv::encode(k[d]);
  for (int64_t d = 0; d < head_dim; d++) values[d] = Kv::encode(v[d]);
}

static inline const char *check_kv(int64_t layer_offset, int64_t group_bytes, int64_t kv_heads, int64_t head_dim,
                                   int64_t element_bytes) {
  if (kv_heads < 1 || head_dim < 1) return "kv_heads and head_dim must be positive";
  if (layer_offset < 0 || layer_offset % element_bytes || group_bytes % element_bytes)
    return "layer_offset and group_bytes must be whole elements and not negative";
  if (layer_offset + kv_heads * head_dim * 32 * element_bytes > group_bytes)
    return "the layer does not fit: layer_offset + kv_heads * head_dim * 32 elements exceed group_bytes";
  return nullptr;
}

}  // namespace XK_LEVEL
