// linear: out[rows, n] = x[rows, k] * weight^T + bias. Weights come in panels [n/16][k][16]. heads_linear: the same for every head of
// x[rows, heads, k] with a weight of its own, [heads][n/16][k][16]. Few rows: one pass, bound by the bandwidth of the weights. Many
// rows: k in blocks, so that a panel block stays in L1. Quantised weights (quantised.h): a first stage quantises the rows of x.
#include "common.h"
#include "quantised.h"

namespace XK_LEVEL {
namespace {

enum { kX, kWeight, kBias, kOut, kHeadsOut = 2, kRowsQuantised = 4 };
enum { kK, kN, kHeads, kGroup = 2 };

template <bool Heads>
const char *check(const Call &c) {
  if (c.ints[kK] < 1 || c.ints[kN] < 1) return "k and n must be positive";
  if (Heads && c.ints[kHeads] < 1) return "heads must be positive";
  return nullptr;
}

int64_t panels_of(const Call &c) { return (c.ints[kN] + 15) / 16; }

// A unit is some panels times some rows. Few rows: as many panels as make about kUnitBytes of weights, so that threads end together.
// Many rows: kPanelGroup panels and a block of rows that stays in L2.
int64_t panels_of_unit(const Call &c, int64_t rows) {
  return rows > kTileRows ? kPanelGroup : max(1, min(kPanelGroup, kUnitWeights / (16 * c.ints[kK])));
}
int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

struct Cut {
  int64_t row, rows, first, panels, head;
};
Cut cut_of(const Call &c, const Step &s, int64_t unit) {
  const int64_t all = c.rows(s), blocks = row_blocks(all), each = panels_of_unit(c, all), groups = (panels_of(c) + each - 1) / each;
  const int64_t block = unit % blocks, row = all * block / blocks, first = unit / blocks % groups * each;
  return {row, all * (block + 1) / blocks - row, first, min(each, panels_of(c) - first), unit / blocks / groups};
}

struct Scratch {  // of a thread
  float sums[kPanelGroup * kRowBlock * 16];          // [panel][row][16]: the chains, between blocks of k
  uint8_t expanded[kExpandedBytes];                  // bf16 panels widened once for all rows
};
int64_t scratch(const Call &) { return sizeof(Scratch); }

template <bool Heads>
int64_t units(const Call &c, const Step &s) {
  const int64_t each = panels_of_unit(c, c.rows(s));
  return (Heads ? c.ints[kHeads] : 1) * ((panels_of(c) + each - 1) / each) * row_blocks(c.rows(s));
}

template <class Panel, bool Heads>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN], panel_bytes = k * Panel::bytes, heads = Heads ? c.ints[kHeads] : 1;
  const auto [row, rows, first, panels, head] = cut_of(c, s, unit);
  const float *x = c.arg<const float>(kX, s) + (row * heads + head) * k;
  const uint8_t *weight = c.arg<const uint8_t>(kWeight, s) + (head * panels_of(c) + first) * panel_bytes;
  Scratch *scratch = (Scratch *)memory;
  multiply<Panel>({x, heads * k, weight, panel_bytes, k, scratch->sums, 16, rows * 16, false, kFetchAhead}, rows, panels,
                  scratch->expanded);
  const float *bias = Heads ? nullptr : c.arg<const float>(kBias, s), *sums = scratch->sums;
  for (int64_t p = 0, column = first * 16; p < panels; p++, column += 16) {
    const f32x16 add = bias ? load_some(bias + column, n - column) : zero();
    float *out = c.arg<float>(Heads ? kHeadsOut : kOut, s) + (row * heads + head) * n + column;
    for (int64_t r = 0; r < rows; r++, sums += 16, out += heads * n)
      store_some(out, bias ? load(sums) + add : load(sums), n - column);
  }
}

// --- quantised weights ---

const char *check_quantised(const Call &c) {
  const int64_t group = c.ints[kGroup];
  if (group != 0 && group != 32 && group != 64 && group != 128) return "group must be 32, 64 or 128, or 0 for one scale an output";
  return check<false>(c);
}

int64_t quantise_units(const Call &c, const Step &s) { return row_units(c.rows(s), c.ints[kK]); }

template <class Type>
void run_quantise(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t k = c.ints[kK], padded = padded_inputs(k, c.ints[kGroup]), bytes = Type::row_bytes(padded);
  const Rows rows = rows_of(unit, c.rows(s), k);
  for (int64_t r = rows.begin; r < rows.end; r++)
    Type::quantise(c.arg<const float>(kX, s) + r * k, k, padded, c.arg<uint8_t>(kRowsQuantised, s) + r * bytes);
}

template <class Type>
void run_quantised(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN], group = c.ints[kGroup], padded = padded_inputs(k, group);
  const Cut cut = cut_of(c, s, unit);
  const QuantisedRows x = {c.arg<const uint8_t>(kRowsQuantised, s), Type::row_bytes(padded), padded};
  const int64_t panel_bytes = int_panel_bytes<Type>(padded, group);
  Scratch *scratch = (Scratch *)memory;
  int_multiply<Type>({x, cut.row, c.arg<const uint8_t>(kWeight, s) + cut.first * panel_bytes, panel_bytes, group, scratch->sums, 16,
                      cut.rows * 16},
                     cut.rows, cut.panels, scratch->expanded);
  const float *bias = c.arg<const float>(kBias, s), *sums = scratch->sums;
  for (int64_t p = 0, column = cut.first * 16; p < cut.panels; p++, column += 16) {
    const f32x16 add = bias ? load_some(bias + column, n - column) : zero();
    float *out = c.arg<float>(kOut, s) + cut.row * n + column;
    for (int64_t r = 0; r < cut.rows; r++, sums += 16, out += n)
      store_some(out, fma(load(sums), set1(Type::row_scale(x, cut.row + r)), add), n - column);
  }
}

template <class Type>
const Kernel quantised = {"", "", "", "", nullptr, scratch, units<false>, run_quantised<Type>};

constexpr const char *kIntArgs = "x weight bias? out scratch_rows", *kIntInts = "k n group";

}  // namespace

const Kernel linear_kernels[] = {
    {"linear.f32", "x weight bias? out", "k n", "", check<false>, scratch, units<false>, run<PanelF32, false>},
    {"linear.bf16", "x weight bias? out", "k n", "", check<false>, scratch, units<false>, run<PanelBf16, false>},
    {"linear.i8", kIntArgs, kIntInts, "", check_quantised, no_scratch, quantise_units, run_quantise<Int8>, &quantised<Int8>},
    {"linear.i4", kIntArgs, kIntInts, "", check_quantised, no_scratch, quantise_units, run_quantise<Int4>, &quantised<Int4>},
    {"heads_linear.f32", "x weight out", "k n heads", "", check<true>, scratch, units<true>, run<PanelF32, true>},
    {"heads_linear.bf16", "x weight out", "k n heads", "", check<true>, scratch, units<true>, run<PanelBf16, true>},
    {},
};

}  // namespace XK_LEVEL
