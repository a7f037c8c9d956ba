// experts: rows through the experts chosen for them. Stages: (moe: logits, choice,) rows sorted by expert, gate and up, down. Each
// active expert's weights are read once for all its rows, which are gathered by index. The products are those of linear; a row
// adds its experts in their order. So the bits of a row depend on that row alone.
#include "activation.h"
#include "common.h"
#include "panel.h"
#include "route.h"

namespace XK_LEVEL {
namespace {

enum { kX, kIndex, kWeights, kGate, kGateBias, kUp, kUpBias, kDown, kDownBias, kOut, kPairs, kHidden };
enum { kRouter = kHidden + 1, kRouterBias, kCorrection, kLogitsOut };
enum { kWidth, kExperts, kInner, kTopK, kAct, kScoring, kGroups, kTopGroups, kGroupTop, kRenormalise };
enum { kAlpha, kLimit, kShift, kEpsilon, kScale };

const char *check(const Call &c) {
  if (c.ints[kWidth] < 1 || c.ints[kInner] < 1) return "width and inner must be positive";
  if (c.ints[kExperts] < 1 || c.ints[kExperts] > kMaxExperts) return "experts must be from 1 to 4096";
  if (c.ints[kTopK] < 1 || c.ints[kTopK] > c.ints[kExperts]) return "top_k must be from 1 to experts";
  if (c.ints[kAct] < 0 || c.ints[kAct] > 3) return "act is no activation";
  return nullptr;
}

const char *check_moe(const Call &c) {
  if (const char *wrong = check(c)) return wrong;
  const int64_t groups = c.ints[kGroups], top = c.ints[kTopGroups];
  if (groups < 1 || c.ints[kExperts] % groups) return "groups must divide experts";
  if (top < 1 || top > groups) return "top_groups must be from 1 to groups";
  const int64_t each = c.ints[kExperts] / groups;
  if (c.ints[kTopK] > top * each) return "top_k must fit the chosen groups";
  if (c.ints[kGroupTop] < 1 || c.ints[kGroupTop] > min(2, each)) return "group_top must be 1 or 2, and fit a group";
  if (c.ints[kScoring] < 0 || c.ints[kScoring] > 2) return "scoring is no way to score";
  return nullptr;
}

// What the sort leaves: [active experts' count][their numbers: E][first pair of each active expert: E + 1][row of a pair: T k]
// [weight of a pair, an index into weights: T k].
struct Sorted {
  int32_t *count, *expert, *first, *row, *weight;
};
Sorted sorted(const Call &c, const Step &s) {
  int32_t *p = c.arg<int32_t>(kPairs, s);
  const int64_t experts = c.ints[kExperts], pairs = c.rows(s) * c.ints[kTopK];
  return {p, p + 1, p + 1 + experts, p + 2 + 2 * experts, p + 2 + 2 * experts + pairs};
}

int64_t panels_of(int64_t n) { return (n + 15) / 16; }
int64_t groups_of(int64_t n) { return (panels_of(n) + kPanelGroup - 1) / kPanelGroup; }
int64_t one(const Call &, const Step &) { return 1; }

struct Scratch {  // of a thread
  float gate[kPanelGroup * kRowBlock * 16], up[kPanelGroup * kRowBlock * 16];
  uint8_t expanded[kExpandedBytes];
};
int64_t scratch(const Call &) { return sizeof(Scratch); }

// ---- moe only: logits and choice ----

int64_t logit_units(const Call &c, const Step &s) { return groups_of(c.ints[kExperts]) * ((c.rows(s) + kRowBlock - 1) / kRowBlock); }

void run_logits(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kWidth], n = c.ints[kExperts], all = c.rows(s), groups = groups_of(n);
  const int64_t row = unit / groups * kRowBlock, rows = min(kRowBlock, all - row);
  const int64_t first = unit % groups * kPanelGroup, panels = min(kPanelGroup, panels_of(n) - first), bytes = k * PanelF32::bytes;
  Scratch *scratch = (Scratch *)memory;
  multiply<PanelF32>({c.arg<const float>(kX, s) + row * k, k, c.arg<const uint8_t>(kRouter, s) + first * bytes, bytes, k,
                      scratch->gate, 16, rows * 16, false, kFetchAhead},
                     rows, panels, scratch->expanded);
  const float *bias = c.arg<const float>(kRouterBias, s), *sums = scratch->gate;
  for (int64_t p = 0, column = first * 16; p < panels; p++, column += 16) {
    const f32x16 add = bias ? load_some(bias + column, n - column) : zero();
    float *out = c.arg<float>(kLogitsOut, s) + row * n + column;
    for (int64_t r = 0; r < rows; r++, sums += 16, out += n) store_some(out, bias ? load(sums) + add : load(sums), n - column);
  }
}

int64_t choice_units(const Call &c, const Step &s) { return row_units(c.rows(s), 8 * c.ints[kExperts]); }

void run_choice(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const Routing how = {c.ints[kExperts], c.ints[kTopK], c.ints[kScoring], c.ints[kGroups], c.ints[kTopGroups], c.ints[kGroupTop],
                       c.ints[kRenormalise] != 0, c.floats[kEpsilon], c.floats[kScale]};
  const Rows rows = rows_of(unit, c.rows(s), 8 * how.experts);
  for (int64_t r = rows.begin; r < rows.end; r++)
    route_row(how, c.arg<float>(kLogitsOut, s) + r * how.experts, c.arg<const float>(kCorrection, s),
              c.arg<int32_t>(kIndex, s) + r * how.top_k, c.arg<float>(kWeights, s) + r * how.top_k);
}

// ---- rows by expert ----

template <class Index>
void run_sort(const Call &c, const Step &s, int64_t, uint8_t *memory) {
  const int64_t experts = c.ints[kExperts], top = c.ints[kTopK], pairs = c.rows(s) * top;
  const Index *index = c.arg<const Index>(kIndex, s);
  const Sorted to = sorted(c, s);
  int32_t *place = (int32_t *)memory;  // [E]: pairs of an expert, then where its next one goes
  memset(place, 0, (size_t)experts * 4);
  for (int64_t p = 0; p < pairs; p++)
    if (index[p] >= 0 && index[p] < experts) place[index[p]]++;
  int32_t active = 0, at = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int32_t count = place[e];
    place[e] = at;
    if (!count) continue;
    to.expert[active] = (int32_t)e;
    to.first[active++] = at;
    at += count;
  }
  to.first[active] = at;
  *to.count = active;
  for (int64_t p = 0; p < pairs; p++)
    if (index[p] >= 0 && index[p] < experts) {
      const int32_t q = place[index[p]]++;
      to.row[q] = (int32_t)(p / top);
      to.weight[q] = (int32_t)p;
    }
}
int64_t sort_scratch(const Call &) { return kMaxExperts * 4; }

// ---- gate and up ----

int64_t up_units(const Call &c, const Step &s) { return *sorted(c, s).count * groups_of(c.ints[kInner]); }

// Activation of `rows` rows of one panel: sums of gate (or up alone) and up, biases already chosen for the columns.
template <class F>
void activate(const Call &c, bool gated, const float *gate, const float *up, f32x16 gate_bias, f32x16 up_bias, float *out, int64_t n,
              int64_t inner, int64_t rows) {
  const f32x16 alpha = set1(c.floats[kAlpha]), shift = set1(c.floats[kShift]), limit = set1(c.floats[kLimit]);
  const bool clamped = c.floats[kLimit] != 0, scaled = c.floats[kAlpha] != 1;
  for (int64_t r = 0; r < rows; r++, gate += 16, up += 16, out += inner) {
    f32x16 u = load(up) + up_bias;
    if (!gated) {
      store_some(out, F::of(u), n);
      continue;
    }
    f32x16 g = load(gate) + gate_bias;
    if (clamped) {
      g = min(limit, g);
      u = min(limit, max(zero() - limit, u));
    }
    const f32x16 a = scaled ? F::of(alpha * g) / alpha : F::of(g);
    store_some(out, a * (u + shift), n);
  }
}

template <class Panel>
void run_up(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t width = c.ints[kWidth], inner = c.ints[kInner], groups = groups_of(inner);
  const Sorted from = sorted(c, s);
  const int64_t active = unit / groups, expert = from.expert[active], end = from.first[active + 1];
  const int64_t first = unit % groups * kPanelGroup, panels = min(kPanelGroup, panels_of(inner) - first), bytes = width * Panel::bytes;
  const uint8_t *gate = c.arg<const uint8_t>(kGate, s), *up = c.arg<const uint8_t>(kUp, s);
  const float *gate_bias = c.arg<const float>(kGateBias, s), *up_bias = c.arg<const float>(kUpBias, s);
  const int64_t skip = (expert * panels_of(inner) + first) * bytes;
  Scratch *scratch = (Scratch *)memory;
  for (int64_t q = from.first[active]; q < end; q += kRowBlock) {
    const int64_t rows = min(kRowBlock, end - q);
    Product t = {c.arg<const float>(kX, s), width, up + skip, bytes, width, scratch->up, 16, rows * 16, false, kFetchAhead, from.row + q};
    multiply<Panel, true>(t, rows, panels, scratch->expanded);
    t.w = gate + skip, t.c = scratch->gate;
    if (gate) multiply<Panel, true>(t, rows, panels, scratch->expanded);
    for (int64_t p = 0, column = first * 16; p < panels; p++, column += 16) {
      const int64_t n = inner - column, sums = p * rows * 16;
      const f32x16 g = gate_bias ? load_some(gate_bias + expert * inner + column, n) : zero();
      const f32x16 u = up_bias ? load_some(up_bias + expert * inner + column, n) : zero();
      float *out = c.arg<float>(kHidden, s) + q * inner + column;
      const auto with = [&](auto f) {
        activate<decltype(f)>(c, gate != nullptr, scratch->gate + sums, scratch->up + sums, g, u, out, n, inner, rows);
      };
      switch (c.ints[kAct]) {
        case 0: with(Silu{}); break;
        case 1: with(Gelu{}); break;
        case 2: with(GeluTanh{}); break;
        default: with(Relu{});
      }
    }
  }
}

// ---- down, and the sum over experts ----

int64_t down_units(const Call &c, const Step &) { return groups_of(c.ints[kWidth]); }

template <class Panel>
void run_down(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t width = c.ints[kWidth], inner = c.ints[kInner], all = c.rows(s), bytes = inner * Panel::bytes;
  const int64_t first = unit * kPanelGroup, panels = min(kPanelGroup, panels_of(width) - first);
  const int64_t from_column = first * 16, columns = min(width, (first + panels) * 16) - from_column;
  const Sorted from = sorted(c, s);
  const float *weights = c.arg<const float>(kWeights, s), *bias = c.arg<const float>(kDownBias, s);
  float *out = c.arg<float>(kOut, s);
  Scratch *scratch = (Scratch *)memory;
  for (int64_t r = 0; r < all; r++) memset(out + r * width + from_column, 0, (size_t)columns * 4);
  for (int64_t active = 0; active < *from.count; active++) {
    const int64_t expert = from.expert[active], end = from.first[active + 1];
    for (int64_t q = from.first[active]; q < end; q += kRowBlock) {
      const int64_t rows = min(kRowBlock, end - q);
      multiply<Panel>({c.arg<const float>(kHidden, s) + q * inner, inner,
                       c.arg<const uint8_t>(kDown, s) + (expert * panels_of(width) + first) * bytes, bytes, inner, scratch->up, 16,
                       rows * 16, false, kFetchAhead},
                      rows, panels, scratch->expanded);
      const float *sums = scratch->up;
      for (int64_t p = 0, column = from_column; p < panels; p++, column += 16) {
        const int64_t n = width - column;
        const f32x16 add = bias ? load_some(bias + expert * width + column, n) : zero();
        for (int64_t r = 0; r < rows; r++, sums += 16) {
          float *to = out + from.row[q + r] * width + column;
          store_some(to, fma(set1(weights[from.weight[q + r]]), load(sums) + add, load_some(to, n)), n);
        }
      }
    }
  }
}

template <class Panel>
const Kernel down = {"", "", "", "", nullptr, scratch, down_units, run_down<Panel>};
template <class Panel>
const Kernel up = {"", "", "", "", nullptr, scratch, up_units, run_up<Panel>, &down<Panel>};
template <class Panel>
const Kernel sort_chosen = {"", "", "", "", nullptr, sort_scratch, one, run_sort<int32_t>, &up<Panel>};
template <class Panel>
const Kernel choice = {"", "", "", "", nullptr, no_scratch, choice_units, run_choice, &sort_chosen<Panel>};

constexpr const char *kArgs = "x index weights gate? gate_bias? up up_bias? down down_bias? out scratch_pairs scratch_hidden";
constexpr const char *kMoeArgs =
    "x scratch_index scratch_weights gate? gate_bias? up up_bias? down down_bias? out scratch_pairs scratch_hidden"
    " router router_bias? correction? scratch_logits";
constexpr const char *kInts = "width experts inner top_k act", *kFloats = "alpha limit shift";
constexpr const char *kMoeInts = "width experts inner top_k act scoring groups top_groups group_top renormalise";
constexpr const char *kMoeFloats = "alpha limit shift epsilon scale";

}  // namespace

const Kernel experts_kernels[] = {
    {"experts.f32", kArgs, kInts, kFloats, check, sort_scratch, one, run_sort<int64_t>, &up<PanelF32>},
    {"experts.bf16", kArgs, kInts, kFloats, check, sort_scratch, one, run_sort<int64_t>, &up<PanelBf16>},
    {"moe.f32", kMoeArgs, kMoeInts, kMoeFloats, check_moe, scratch, logit_units, run_logits, &choice<PanelF32>},
    {"moe.bf16", kMoeArgs, kMoeInts, kMoeFloats, check_moe, scratch, logit_units, run_logits, &choice<PanelBf16>},
    {},
};

}  // namespace XK_LEVEL
