// sdpa: attention of a function. rows are batches: q [B, L, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv], out [B, L, H, Dv], or with
// heads_first [B, H, L, D] and so on. The mask, if any, is added to the scores (sdpa) or holds a byte for what is seen (sdpa_seen);
// its four strides count elements, 0 where it is repeated. Keys are taken in blocks of kKeyBlock, merged in order. A query that sees
// nothing gives zeros.
#include <float.h>
#include <math.h>

#include "attend.h"
#include "common.h"

namespace XK_LEVEL {
namespace {

enum { kQ, kK, kV, kMask, kOut };
enum { kQHeads, kKvHeads, kHeadDim, kValueDim, kQueries, kKeys, kHeadsFirst, kCausal, kMaskBatch, kMaskHead, kMaskQuery, kMaskKey };
enum { kScale, kSoftcap };

const char *check(const Call &c) {
  if (c.row_terms[0] || c.row_terms[1]) return "rows are batches: a number";
  if (c.ints[kKvHeads] < 1 || c.ints[kHeadDim] < 1 || c.ints[kValueDim] < 1) return "kv_heads, head_dim and value_dim must be positive";
  if (c.ints[kQHeads] < 1 || c.ints[kQHeads] % c.ints[kKvHeads]) return "q_heads must be a positive multiple of kv_heads";
  for (int i = kQueries; i <= kMaskKey; i++)
    if (c.ints[i] < 0) return "sizes and strides must not be negative";
  if (c.ints[kHeadsFirst] > 1 || c.ints[kCausal] > 1) return "heads_first and causal are 0 or 1";
  if (c.ints[kMaskKey] > 1) return "a mask's keys lie side by side, or are one";
  if (!(c.floats[kSoftcap] >= 0)) return "softcap must be 0 (none) or positive";
  return nullptr;
}

// Behind the tile: maximum and sum of every query row of a unit.
int64_t scratch(const Call &c) {
  const int64_t rows = c.ints[kQueries] * (c.ints[kQHeads] / c.ints[kKvHeads]);
  return KeyTile::scratch_bytes(c.ints[kHeadDim], c.ints[kValueDim]) + (int64_t)sizeof(float) * 2 * rows;
}

int64_t units(const Call &c, const Step &s) { return c.rows(s) * c.ints[kKvHeads]; }

struct Strides {  // of one operand, in floats
  int64_t batch, head, token;
};

Strides strides(const Call &c, int64_t heads, int64_t tokens, int64_t width) {
  return c.ints[kHeadsFirst] ? Strides{heads * tokens * width, tokens * width, width} : Strides{heads * tokens * width, width, heads * width};
}

f32x16 shown(const float *mask) { return load(mask); }
f32x16 shown(const uint8_t *mask) {
  float lane[16];
  for (int l = 0; l < 16; l++) lane[l] = mask[l] ? 0.0f : -INFINITY;
  return load(lane);
}

// What the mask adds to the scores of sixteen keys, of which `count` exist.
template <class Element>
f32x16 masked(const Element *mask, int64_t stride, int64_t count) {
  Element held[16] = {0};
  if (count >= 16 && stride) return shown(mask);
  for (int64_t l = 0; l < min(count, 16); l++) held[l] = mask[l * stride];
  return shown(held);
}

// Scores of a row become weights; it sees the first `seen` tokens of the block. Where all is hidden the maximum stays finite, so that
// the weights are zeros and no difference of infinities arises.
template <class Element>
void soften(const KeyTile &t, float *score, const Element *mask, int64_t stride, int64_t seen, float softcap, float *maximum, float *sum) {
  const f32x16 lowest = set1(-INFINITY), last = set1((float)(seen - 1));
  f32x16 index = lane_index(), value[kBlockGroups], top = set1(-FLT_MAX), total = zero();
  for (int g = 0; g < kBlockGroups; g++, index = index + set1(16.0f)) {
    value[g] = load(score + g * 16);
    if (softcap > 0) value[g] = set1(softcap) * tanh(value[g] / set1(softcap));
    if (mask && g * 16 < t.tokens) value[g] = value[g] + masked(mask + g * 16 * stride, stride, t.tokens - g * 16);
    value[g] = select_less(last, index, lowest, value[g]);
    top = max(value[g], top);
  }
  *maximum = reduce_max(top);
  const f32x16 m = set1(*maximum);
  for (int g = 0; g < kBlockGroups; g++) {
    const f32x16 weight = exp(value[g] - m);
    store(score + g * 16, weight);
    total = total + weight;
  }
  *sum = reduce_add(total);
}

template <class Element>
void run_sdpa(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t kv_heads = c.ints[kKvHeads], q_heads = c.ints[kQHeads], share = q_heads / kv_heads;
  const int64_t batch = unit / kv_heads, head = unit % kv_heads, queries = c.ints[kQueries], keys = c.ints[kKeys];
  KeyTile t;
  t.place(memory, c.ints[kHeadDim], c.ints[kValueDim]);
  float *state = (float *)(memory + KeyTile::scratch_bytes(t.dim, t.value_dim));
  const Strides at_q = strides(c, q_heads, queries, t.dim), at_out = strides(c, q_heads, queries, t.value_dim);
  const Strides at_k = strides(c, kv_heads, keys, t.dim), at_v = strides(c, kv_heads, keys, t.value_dim);
  const float *q = c.arg<const float>(kQ, s) + batch * at_q.batch + head * share * at_q.head;
  const float *k = c.arg<const float>(kK, s) + batch * at_k.batch + head * at_k.head;
  const float *v = c.arg<const float>(kV, s) + batch * at_v.batch + head * at_v.head;
  float *out = c.arg<float>(kOut, s) + batch * at_out.batch + head * share * at_out.head;
  const Element *mask = c.arg<const Element>(kMask, s);
  if (mask) mask += batch * c.ints[kMaskBatch] + head * share * c.ints[kMaskHead];
  for (int64_t sharing = 0; sharing < share; sharing++)
    for (int64_t row = 0; row < queries; row++) {
      float *held = state + (sharing * queries + row) * 2, *line = out + sharing * at_out.head + row * at_out.token;
      held[0] = -INFINITY, held[1] = 0.0f;
      for (int64_t d = 0; d < t.value_dim; d++) line[d] = 0.0f;
    }
  const int64_t ahead = keys - queries;  // causal: query i sees keys up to i + ahead
  for (t.first = 0; t.first < keys; t.first += kKeyBlock) {
    t.tokens = min(kKeyBlock, keys - t.first);
    pack_block(t, k + t.first * at_k.token, at_k.token, v + t.first * at_v.token, at_v.token, c.floats[kScale]);
    const int64_t from = c.ints[kCausal] ? max(0, t.first - ahead) : 0;
    for (int64_t sharing = 0; sharing < share; sharing++)
      for (int64_t begin = from; begin < queries; begin += kTileRows) {
        const int rows = (int)min(kTileRows, queries - begin);
        const float *query[kTileRows];
        float *target[kTileRows], *kept[kTileRows];
        for (int r = 0; r < rows; r++) {
          query[r] = q + sharing * at_q.head + (begin + r) * at_q.token;
          target[r] = out + sharing * at_out.head + (begin + r) * at_out.token;
          kept[r] = state + (sharing * queries + begin + r) * 2;
        }
        attend(t, rows, query, target, kept, [&](float *score, int r, float *maximum, float *sum) {
          const int64_t row = begin + r, seen = c.ints[kCausal] ? min(t.tokens, row + ahead + 1 - t.first) : t.tokens;
          const Element *line = mask ? mask + sharing * c.ints[kMaskHead] + row * c.ints[kMaskQuery] + t.first * c.ints[kMaskKey] : nullptr;
          soften(t, score, line, c.ints[kMaskKey], seen, c.floats[kSoftcap], maximum, sum);
        });
      }
  }
  for (int64_t sharing = 0; sharing < share; sharing++)
    for (int64_t row = 0; row < queries; row++) {
      float *line = out + sharing * at_out.head + row * at_out.token;
      const float held = state[(sharing * queries + row) * 2 + 1];
      const f32x16 sum = set1(held > 0 ? held : 1.0f);
      for (int64_t d = 0; d < t.value_dim; d += 16) store_some(line + d, load_some(line + d, t.value_dim - d) / sum, t.value_dim - d);
    }
}

#define XK_SDPA_INTS \
  "q_heads kv_heads head_dim value_dim queries keys heads_first causal mask_batch mask_head mask_query mask_key"

}  // namespace

const Kernel sdpa_kernels[] = {
    {"sdpa.f32", "q k v mask? out", XK_SDPA_INTS, "scale softcap", check, scratch, units, run_sdpa<float>},
    {"sdpa_seen.f32", "q k v mask? out", XK_SDPA_INTS, "scale softcap", check, scratch, units, run_sdpa<uint8_t>},
    {},
};

}  // namespace XK_LEVEL
