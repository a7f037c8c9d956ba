// Which experts a row goes to, and with what weight: all that a mixture of experts decides before it multiplies.
#pragma once
#include "common.h"
#include "vmath.h"

namespace XK_LEVEL {

constexpr int64_t kMaxExperts = 4096;
enum { kSoftmax, kSigmoid, kLogits };  // what the scores are of the logits

struct Routing {
  int64_t experts, top_k, scoring, groups, top_groups;
  int64_t group_top;  // how many of a group's best scores make the group's
  bool renormalise;
  float epsilon, scale;
};

// The largest value not yet taken, the first of equal ones; a NaN counts as infinite, so that it is seen in the result.
static inline int64_t best_of(const float *value, const uint8_t *taken, int64_t count) {
  int64_t best = -1;
  float most = 0;
  for (int64_t i = 0; i < count; i++) {
    const float v = value[i] == value[i] ? value[i] : __builtin_inff();
    if (!taken[i] && (best < 0 || v > most)) best = i, most = v;
  }
  return best;
}

// In place; the sum is over blocks of 16 in order, so the bits depend on nothing but the row.
static inline void softmax(float *x, int64_t count) {
  const float low = -__builtin_inff();
  f32x16 top = set1(low), sum = zero();
  const auto lanes = [&](int64_t i) {  // lanes beyond the end are the least there is
    f32x16 v = load_some(x + i, count - i);
    return count - i >= 16 ? v : select_less(lane_index(), set1((float)(count - i)), v, set1(low));
  };
  for (int64_t i = 0; i < count; i += 16) top = max(lanes(i), top);
  const f32x16 most = set1(reduce_max(top));
  for (int64_t i = 0; i < count; i += 16) {
    const f32x16 e = exp(lanes(i) - most);
    sum = sum + e;
    store_some(x + i, e, count - i);
  }
  const f32x16 whole = set1(reduce_add(sum));
  for (int64_t i = 0; i < count; i += 16) store_some(x + i, load_some(x + i, count - i) / whole, count - i);
}

static inline void sigmoid(float *x, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const f32x16 v = load_some(x + i, count - i);
    store_some(x + i, set1(1.0f) / (set1(1.0f) + exp(zero() - v)), count - i);
  }
}

// Marks as taken every expert of a group that is not among the best.
static inline void keep_groups(const Routing &how, const float *choice, uint8_t *taken) {
  const int64_t each = how.experts / how.groups;
  float score[kMaxExperts];
  uint8_t kept[kMaxExperts] = {0};
  for (int64_t g = 0; g < how.groups; g++) {
    const int64_t first = best_of(choice + g * each, taken + g * each, each);
    score[g] = choice[g * each + first];
    if (how.group_top == 1) continue;
    taken[g * each + first] = 1;
    score[g] += choice[g * each + best_of(choice + g * each, taken + g * each, each)];
    taken[g * each + first] = 0;
  }
  for (int64_t i = 0; i < how.top_groups; i++) kept[best_of(score, kept, how.groups)] = 1;
  for (int64_t e = 0; e < how.experts; e++) taken[e] = !kept[e / each];
}

// One row: logits are overwritten by scores; index and weight get top_k entries.
static inline void route_row(const Routing &how, float *logits, const float *correction, int32_t *index, float *weight) {
  float choice[kMaxExperts];
  uint8_t taken[kMaxExperts] = {0};
  if (how.scoring == kSoftmax) softmax(logits, how.experts);
  if (how.scoring == kSigmoid) sigmoid(logits, how.experts);
  for (int64_t e = 0; e < how.experts; e++) choice[e] = correction ? logits[e] + correction[e] : logits[e];
  if (how.groups > 1) keep_groups(how, choice, taken);
  for (int64_t i = 0; i < how.top_k; i++) {
    const int64_t best = best_of(choice, taken, how.experts);
    taken[best] = 1;
    index[i] = (int32_t)best;
    weight[i] = logits[best];
  }
  if (how.scoring == kLogits) softmax(weight, how.top_k);
  float sum = 0;
  for (int64_t i = 0; i < how.top_k; i++) sum += weight[i];
  const float total = how.epsilon < 0.0f && sum < -how.epsilon ? -how.epsilon : sum + (how.epsilon < 0.0f ? 0.0f : how.epsilon);
  for (int64_t i = 0; i < how.top_k; i++) weight[i] = (how.renormalise ? weight[i] / total : weight[i]) * how.scale;
}

}  // namespace XK_LEVEL
