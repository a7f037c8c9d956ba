// experts: rows through the experts chosen for them. Stages: (moe: logits, choice,) rows sorted by expert, gate and up, down. Each
// active expert's weights are read once for all its rows, which are gathered by index. The products are those of linear (but for bf16
// on a matrix unit, where these stay in vectors); a row adds its experts in their order. So the bits of a row depend on that row alone.
#include "activation.h"
#include "quantised.h"
#include "route.h"

namespace XK_LEVEL {
namespace {

enum { kX, kIndex, kWeights, kGate, kGateBias, kUp, kUpBias, kDown, kDownBias, kOut, kPairs, kHidden, kRows, kHiddenRows };
enum { kRouter = kHiddenRows + 1, kRouterBias, kCorrection, kLogitsOut };
enum { kWidth, kExperts, kInner, kTopK, kAct, kScoring, kGroups, kTopGroups, kGroupTop, kRenormalise };
// Of quantised weights: behind the others, and so in another place for moe.
int64_t group_of(const Call &c, bool moe) { return c.ints[moe ? kRenormalise + 1 : kAct + 1]; }
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
};
int64_t scratch(const Call &) { return sizeof(Scratch); }

template <bool Moe>
const char *check_int(const Call &c) {
  if (const char *wrong = check_group(group_of(c, Moe))) return wrong;
  if (c.args[kRows].kind == XK_NONE || c.args[kHiddenRows].kind == XK_NONE) return "scratch_rows and scratch_hidden_rows must not be none";
  return Moe ? check_moe(c) : check(c);
}

// ---- products with the panels of one expert: `rows` rows picked from x, or from row `first` on ----

template <class Panel>
struct Floats {
  static constexpr bool kQuantised = false;
  static int64_t panel_bytes(const Call &, int64_t k) { return k * Panel::bytes; }
  static void product(const Call &c, const Step &s, int x, int, const int32_t *pick, int64_t first, int64_t rows, const uint8_t *w, int64_t k,
                      int64_t panels, float *sums) {
    const Product t = {c.arg<const float>(x, s) + first * k, k, w, k * Panel::bytes, k, sums, 16, rows * 16, false, pick};
    if (pick) multiply<Panel, true>(t, rows, panels);
    else multiply<Panel>(t, rows, panels);
  }
};

template <class Type, bool Moe>
struct Ints {
  static constexpr bool kQuantised = true;
  static int64_t panel_bytes(const Call &c, int64_t k) {
    const int64_t group = group_of(c, Moe);
    return int_panel_bytes<Type>(padded_inputs(k, group), group);
  }
  static void product(const Call &c, const Step &s, int, int x, const int32_t *pick, int64_t first, int64_t rows, const uint8_t *w, int64_t k,
                      int64_t panels, float *sums) {
    const int64_t group = group_of(c, Moe), padded = padded_inputs(k, group), bytes = Type::row_bytes(padded);
    const Tiles tiles = tiles_of(rows);
    int_product<Type, false>({{c.arg<const uint8_t>(x, s) + first * bytes, bytes, padded}, w, panel_bytes(c, k), group, sums, 16, rows * 16, pick},
                             tiles, 0, tiles.count, panels);
  }
  static void quantise(const Call &c, const Step &s, int x, int to, int64_t k, int64_t all, Rows rows) {
    quantise_rows<Type>(c.arg<const float>(x, s), k, group_of(c, Moe), rows_apart(all), c.arg<uint8_t>(to, s), rows);
  }
};

// ---- moe only: logits and choice ----

int64_t logit_units(const Call &c, const Step &s) { return groups_of(c.ints[kExperts]) * ((c.rows(s) + kRowBlock - 1) / kRowBlock); }

void run_logits(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kWidth], n = c.ints[kExperts], all = c.rows(s), groups = groups_of(n);
  const int64_t row = unit / groups * kRowBlock, rows = min(kRowBlock, all - row);
  const int64_t first = unit % groups * kPanelGroup, panels = min(kPanelGroup, panels_of(n) - first), bytes = k * PanelF32::bytes;
  Scratch *scratch = (Scratch *)memory;
  multiply<PanelF32>({c.arg<const float>(kX, s) + row * k, k, c.arg<const uint8_t>(kRouter, s) + first * bytes, bytes, k,
                      scratch->gate, 16, rows * 16, false},
                     rows, panels);
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

template <class Weights>
void run_up(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t width = c.ints[kWidth], inner = c.ints[kInner], groups = groups_of(inner);
  const Sorted from = sorted(c, s);
  const int64_t active = unit / groups, expert = from.expert[active], end = from.first[active + 1];
  const int64_t first = unit % groups * kPanelGroup, panels = min(kPanelGroup, panels_of(inner) - first), bytes = Weights::panel_bytes(c, width);
  const uint8_t *gate = c.arg<const uint8_t>(kGate, s), *up = c.arg<const uint8_t>(kUp, s);
  const float *gate_bias = c.arg<const float>(kGateBias, s), *up_bias = c.arg<const float>(kUpBias, s);
  const int64_t skip = (expert * panels_of(inner) + first) * bytes;
  Scratch *scratch = (Scratch *)memory;
  for (int64_t q = from.first[active]; q < end; q += kRowBlock) {
    const int64_t rows = min(kRowBlock, end - q);
    Weights::product(c, s, kX, kRows, from.row + q, 0, rows, up + skip, width, panels, scratch->up);
    if (gate) Weights::product(c, s, kX, kRows, from.row + q, 0, rows, gate + skip, width, panels, scratch->gate);
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

template <class Weights>
void run_down(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t width = c.ints[kWidth], inner = c.ints[kInner], all = c.rows(s), bytes = Weights::panel_bytes(c, inner);
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
      Weights::product(c, s, kHidden, kHiddenRows, nullptr, q, rows, c.arg<const uint8_t>(kDown, s) + (expert * panels_of(width) + first) * bytes,
                       inner, panels, scratch->up);
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

// ---- rows of x, or those between the products, quantised ----

int64_t hidden_pairs(const Call &c, const Step &s) { return sorted(c, s).first[*sorted(c, s).count]; }

template <bool Hidden>
int64_t quantise_units(const Call &c, const Step &s) {
  return Hidden ? row_units(hidden_pairs(c, s), c.ints[kInner]) : row_units(c.rows(s), c.ints[kWidth]);
}
template <class Weights, bool Hidden>
void run_quantise(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t k = c.ints[Hidden ? kInner : kWidth], rows = Hidden ? hidden_pairs(c, s) : c.rows(s);
  if constexpr (Weights::kQuantised) Weights::quantise(c, s, Hidden ? kHidden : kX, Hidden ? kHiddenRows : kRows, k, rows, rows_of(unit, rows, k));
}

template <class Weights>
const Kernel down = {"", "", "", "", nullptr, scratch, down_units, run_down<Weights>};
template <class Weights>
const Kernel quantise_hidden = {"", "", "", "", nullptr, no_scratch, quantise_units<true>, run_quantise<Weights, true>, &down<Weights>};
template <class Weights>
const Kernel up = {"", "", "", "", nullptr, scratch, up_units, run_up<Weights>, Weights::kQuantised ? &quantise_hidden<Weights> : &down<Weights>};
template <class Weights>
const Kernel quantise_x = {"", "", "", "", nullptr, no_scratch, quantise_units<false>, run_quantise<Weights, false>, &up<Weights>};
template <class Weights>
const Kernel sort_chosen = {"", "", "", "", nullptr, sort_scratch, one, run_sort<int32_t>,
                            Weights::kQuantised ? &quantise_x<Weights> : &up<Weights>};
template <class Weights>
const Kernel choice = {"", "", "", "", nullptr, no_scratch, choice_units, run_choice, &sort_chosen<Weights>};

constexpr const char *kArgs =
    "x index weights gate? gate_bias? up up_bias? down down_bias? out scratch_pairs scratch_hidden scratch_rows? scratch_hidden_rows?";
constexpr const char *kMoeArgs =
    "x scratch_index scratch_weights gate? gate_bias? up up_bias? down down_bias? out scratch_pairs scratch_hidden scratch_rows?"
    " scratch_hidden_rows? router router_bias? correction? scratch_logits";
constexpr const char *kInts = "width experts inner top_k act", *kIntInts = "width experts inner top_k act group";
constexpr const char *kFloats = "alpha limit shift", *kMoeFloats = "alpha limit shift epsilon scale";
constexpr const char *kMoeInts = "width experts inner top_k act scoring groups top_groups group_top renormalise";
constexpr const char *kMoeIntInts = "width experts inner top_k act scoring groups top_groups group_top renormalise group";

}  // namespace

const Kernel experts_kernels[] = {
    {"experts.f32", kArgs, kInts, kFloats, check, sort_scratch, one, run_sort<int64_t>, &up<Floats<PanelF32>>},
    {"experts.bf16", kArgs, kInts, kFloats, check, sort_scratch, one, run_sort<int64_t>, &up<Floats<PanelBf16>>},
    {"experts.i8", kArgs, kIntInts, kFloats, check_int<false>, sort_scratch, one, run_sort<int64_t>, &quantise_x<Ints<Int8, false>>},
    {"experts.i4", kArgs, kIntInts, kFloats, check_int<false>, sort_scratch, one, run_sort<int64_t>, &quantise_x<Ints<Int4, false>>},
    {"moe.f32", kMoeArgs, kMoeInts, kMoeFloats, check_moe, scratch, logit_units, run_logits, &choice<Floats<PanelF32>>},
    {"moe.bf16", kMoeArgs, kMoeInts, kMoeFloats, check_moe, scratch, logit_units, run_logits, &choice<Floats<PanelBf16>>},
    {"moe.i8", kMoeArgs, kMoeIntInts, kMoeFloats, check_int<true>, scratch, logit_units, run_logits, &choice<Ints<Int8, true>>},
    {"moe.i4", kMoeArgs, kMoeIntInts, kMoeFloats, check_int<true>, scratch, logit_units, run_logits, &choice<Ints<Int4, true>>},
    {},
};

}  // namespace XK_LEVEL
