// linear: out[rows, n] = x[rows, k] * weight^T + bias. Weights come in panels [n/16][k][16]. heads_linear: the same for every head of
// x[rows, heads, k] with a weight of its own, [heads][n/16][k][16]. Few rows: one pass, bound by the bandwidth of the weights. Many
// rows: k in blocks, so that a panel block stays in a cache. Quantised weights (quantised.h): a first stage quantises the rows of x.
// gated_linear: out[rows, n] = act(gate) * up of a weight of 2 n outputs, gates first; the same products, and the same bits as of a gate
// behind them, but a unit has both, and only what comes out is written.
#include "activation.h"
#include "common.h"
#include "rounded.h"

namespace XK_LEVEL {
namespace {

enum { kX, kWeight, kBias, kOut, kHeadsOut = 2, kScratchRows = 4 };
enum { kK, kN, kHeads, kGroup = 2 };
enum { kAct = 2, kIntAct = 3, kActs = 5 };  // silu gelu gelu_tanh relu relu2
constexpr const char *kRowsArgs = "x weight bias? out scratch_rows?", *kIntArgs = "x weight bias? out scratch_rows";
constexpr const char *kIntInts = "k n group", *kGatedInts = "k n act", *kGatedIntInts = "k n group act";

template <bool Heads>
const char *check(const Call &c) {
  if (c.ints[kK] < 1 || c.ints[kN] < 1) return "k and n must be positive";
  if (Heads && c.ints[kHeads] < 1) return "heads must be positive";
  return nullptr;
}

int64_t panels_of(const Call &c) { return (c.ints[kN] + 15) / 16; }
constexpr int64_t kUnitsOfMany = 24;  // of many panels each, to keep threads busy
int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// A unit is some panels times some rows. Few rows: as many panels as make about kUnitWeights weights, so that threads end together.
// Many rows: kPanelGroup panels and a block of rows that stays in L2; up to `most` panels where rows are converted for all of them.
int64_t panels_of_unit(const Call &c, int64_t rows, int64_t all, int64_t most = kPanelGroup) {
  if (most > kPanelGroup && rows > kTileRows) return max(kPanelGroup, min(most, all * row_blocks(rows) / kUnitsOfMany / kPanelGroup * kPanelGroup));
  return rows > kTileRows || XK_VECTOR_BYTES == 64 ? kPanelGroup : max(1, min(kPanelGroup, kUnitWeights / (16 * c.ints[kK])));
}
// Those of what comes out. Gated, as many panels, or one more, are of the other factor, whose columns may begin within a panel: of many
// rows half of all, few rows have as many of each.
template <bool Gated>
int64_t out_panels(const Call &c, int64_t rows, int64_t most = kPanelGroup) {
  const bool half = Gated && rows > kFewRows;
  const int64_t panels = panels_of_unit(c, rows, (half ? 2 : 1) * panels_of(c), most);
  return half ? max(1, (panels - (c.ints[kN] % 16 != 0)) / 2) : panels;
}
struct Cut {
  int64_t row, rows, first, panels, head;
};
template <bool Gated = false>
Cut cut_of(const Call &c, const Step &s, int64_t unit, int64_t most, const Tiles &tiles) {
  const int64_t blocks = row_blocks(c.rows(s)), each = out_panels<Gated>(c, c.rows(s), most), groups = (panels_of(c) + each - 1) / each;
  const int64_t block = unit % blocks, first = unit / blocks % groups * each;
  const int64_t row = tiles.row(tiles.count * block / blocks), end = tiles.row(tiles.count * (block + 1) / blocks);
  return {row, end - row, first, min(each, panels_of(c) - first), unit / blocks / groups};
}

// Sums [panel][row][16] to the columns from `column` on of rows `stride` apart, with their biases.
void put_sums(const float *sums, int64_t rows, int64_t panels, int64_t column, int64_t n, int64_t stride, const float *bias, float *out) {
  for (int64_t r = 0; r < rows; r++, out += stride, sums += 16)
    for (int64_t p = 0, at = column; p < panels; p++, at += 16) {
      const f32x16 sum = load(sums + p * rows * 16);
      store_some(out + at, bias ? sum + load_some(bias + at, n - at) : sum, n - at);
    }
}

// act(gate) * up of such sums, from column `column` on.
template <class Act>
void put_gated(const float *gate, const float *up, int64_t rows, int64_t panels, int64_t column, int64_t n, const float *bias,
               float *out) {
  const int64_t within = n % 16;  // of a panel: where `up` begins
  const auto biased = [&](f32x16 sum, int64_t at, int64_t end) { return bias ? sum + load_some(bias + at, end - at) : sum; };
  for (int64_t r = 0; r < rows; r++, out += n, gate += 16, up += 16)
    for (int64_t p = 0, at = column; p < panels; p++, at += 16) {
      const float *factor = up + p * rows * 16;
      float lane[32] = {};
      if (within) {
        store(lane, load(factor));
        if (within + n - at > 16) store(lane + 16, load(factor + rows * 16));
        factor = lane + within;
      }
      store_some(out + at, Act::of(biased(load(gate + p * rows * 16), at, n)) * biased(load(factor), n + at, 2 * n), n - at);
    }
}

// What a unit makes of its panels' sums, which multiply(first panel, panels, to) leaves.
template <bool Gated, class Multiply>
void put_products(const Call &c, const Step &s, const Cut &cut, int64_t act, float *sums, const Multiply &multiply) {
  const int64_t n = c.ints[kN], column = cut.first * 16;
  const float *bias = c.arg<const float>(kBias, s);
  float *out = c.arg<float>(kOut, s) + cut.row * n, *up = sums + cut.panels * cut.rows * 16;
  multiply(cut.first, cut.panels, sums);
  if constexpr (!Gated) return put_sums(sums, cut.rows, cut.panels, column, n, n, bias, out);
  const int64_t first = (n + column) / 16, end = (n + min(n, column + cut.panels * 16) + 15) / 16;
  multiply(first, end - first, up);
  constexpr auto *silu = put_gated<Silu>, *gelu = put_gated<Gelu>, *tanh = put_gated<GeluTanh>, *relu = put_gated<Relu>;
  constexpr decltype(silu) acts[kActs] = {silu, gelu, tanh, relu, put_gated<Relu2>};
  acts[act](sums, up, cut.rows, cut.panels, column, n, bias, out);
}

template <int Act, const char *(*Check)(const Call &)>
const char *check_gated(const Call &c) { return c.ints[Act] < 0 || c.ints[Act] >= kActs ? "act is no activation" : Check(c); }

struct Sums {  // of a thread
  float sums[kPanelGroup * kRowBlock * 16];  // [panel][row][16]: the chains, between blocks of k
};
template <class Memory>
int64_t scratch(const Call &) { return sizeof(Memory); }

template <bool Heads, int64_t Most = kPanelGroup, bool Gated = false>
int64_t units(const Call &c, const Step &s) {
  const int64_t each = out_panels<Gated>(c, c.rows(s), Most);
  return (Heads ? c.ints[kHeads] : 1) * ((panels_of(c) + each - 1) / each) * row_blocks(c.rows(s));
}

template <class Panel, bool Gated>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], bytes = k * Panel::bytes;
  const Cut cut = cut_of<Gated>(c, s, unit, kPanelGroup, rows_apart(c.rows(s)));
  const float *x = c.arg<const float>(kX, s) + cut.row * k;
  const uint8_t *weight = c.arg<const uint8_t>(kWeight, s);
  put_products<Gated>(c, s, cut, c.ints[kAct], ((Sums *)memory)->sums, [&](int64_t first, int64_t panels, float *sums) {
    multiply<Panel>({x, k, weight + first * bytes, bytes, k, sums, 16, cut.rows * 16, false}, cut.rows, panels);
  });
}

template <class Panel>
void run_heads(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN], bytes = k * Panel::bytes, heads = c.ints[kHeads];
  const auto [row, rows, first, panels, head] = cut_of(c, s, unit, kPanelGroup, rows_apart(c.rows(s)));
  const float *x = c.arg<const float>(kX, s) + (row * heads + head) * k;
  const uint8_t *weight = c.arg<const uint8_t>(kWeight, s) + (head * panels_of(c) + first) * bytes;
  float *sums = ((Sums *)memory)->sums;
  multiply<Panel>({x, heads * k, weight, bytes, k, sums, 16, rows * 16, false}, rows, panels);
  put_sums(sums, rows, panels, first * 16, n, heads * n, nullptr, c.arg<float>(kHeadsOut, s) + (row * heads + head) * n);
}

// --- bf16 weights, rows converted ---

const char *check_rows(const Call &c) {
  if (c.args[kScratchRows].kind == XK_NONE) return "scratch_rows must not be none where bf16 is multiplied: compile the model again";
  return check<false>(c);
}
constexpr auto *check_rounded = kRoundsFirst ? check_rows : check<false>;

#if defined(__AMX_BF16__)

template <int Parts>
void run_split(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  split_rows<Parts>(c.arg<const float>(kX, s), c.rows(s), c.ints[kK], unit, c.arg<uint8_t>(kScratchRows, s));
}
int64_t split_units(const Call &c, const Step &s) { return c.rows(s) > kFewSplit ? units_of_split(c.rows(s), c.ints[kK]) : 0; }

// Few rows wait for the weights: kPanelGroup panels. Many: a block of rows that stays in L2, and panels for which it is read once.
constexpr int64_t kUnitsOfTiles = 16;  // at least, where there are panels for them
struct TileCut {
  int64_t strips, blocks, each;
};
template <bool Gated>
TileCut tile_cut(const Call &c, const Step &s) {
  const int64_t strips = (c.rows(s) + kStripRows - 1) / kStripRows, blocks = (strips + kStrips - 1) / kStrips;
  const int64_t all = (Gated ? 2 : 1) * panels_of(c), many = max(2, min(kPanelsOfTiles, all * blocks / kUnitsOfTiles / 2 * 2));
  if (strips == 1) return {strips, blocks, kPanelGroup};
  return {strips, blocks, Gated ? max(1, (many - (c.ints[kN] % 16 != 0)) / 2) : many};
}
template <bool Gated>
int64_t tile_units(const Call &c, const Step &s) {
  const TileCut cut = tile_cut<Gated>(c, s);
  return cut.blocks * ((panels_of(c) + cut.each - 1) / cut.each);
}

template <int Parts, bool Gated>
void run_tiles(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK];
  const auto [strips, blocks, each] = tile_cut<Gated>(c, s);
  const int64_t block = unit % blocks, row = strips * block / blocks * kStripRows;
  const int64_t rows = min(c.rows(s), strips * (block + 1) / blocks * kStripRows) - row;
  const int64_t first = unit / blocks * each;
  FloatTileMemory *scratch = (FloatTileMemory *)memory;
  const Cut cut = {row, rows, first, min(each, panels_of(c) - first), 0};
  put_products<Gated>(c, s, cut, c.ints[kAct], scratch->sums, [&](int64_t first, int64_t panels, float *sums) {
    const uint8_t *weight = c.arg<const uint8_t>(kWeight, s) + first * k * PanelBf16::bytes;
    if (c.rows(s) <= kFewSplit) float_few<Parts>(c.arg<const float>(kX, s), k, cut.rows, weight, k, panels, *scratch, sums);
    else float_tiles<Parts>(c.arg<const uint8_t>(kScratchRows, s), cut.row, cut.rows, weight, k, panels, *scratch, sums);
  });
}

template <int Parts, bool Gated>
const Kernel tiles = {"", "", "", "", nullptr, scratch<FloatTileMemory>, tile_units<Gated>, run_tiles<Parts, Gated>};
template <bool Gated>
constexpr Kernel exact(const char *name, const char *ints, const char *(*check)(const Call &)) {
  return {name, kRowsArgs, ints, "", check, no_scratch, split_units, run_split<3>, &tiles<3, Gated>};
}
template <bool Gated>
constexpr Kernel rounded(const char *name, const char *ints, const char *(*check)(const Call &)) {
  return {name, kRowsArgs, ints, "", check, no_scratch, split_units, run_split<1>, &tiles<1, Gated>};
}
constexpr auto *check_exact = check_rows;

#else

bool rounds_first(const Call &c, const Step &s) { return kRoundsFirst && c.rows(s) > kFewRows; }
int64_t round_units(const Call &c, const Step &s) { return rounds_first(c, s) ? row_units(c.rows(s), c.ints[kK]) : 0; }
void run_round(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  round_rows(c.arg<const float>(kX, s), c.ints[kK], c.arg<uint8_t>(kScratchRows, s), rows_of(unit, c.rows(s), c.ints[kK]));
}

template <bool Gated>
void run_rounded(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK];
  const Cut cut = cut_of<Gated>(c, s, unit, kPanelsOfRounded, rows_apart(c.rows(s)));
  RoundedMemory *scratch = (RoundedMemory *)memory;
  put_products<Gated>(c, s, cut, c.ints[kAct], scratch->sums, [&](int64_t first, int64_t panels, float *sums) {
    const uint8_t *weight = c.arg<const uint8_t>(kWeight, s) + first * k * PanelBf16::bytes, *rows = c.arg<const uint8_t>(kScratchRows, s);
    if (rounds_first(c, s)) product_of_rounded(rows + cut.row * rounded_bytes(k), cut.rows, weight, k, panels, *scratch, sums);
    else rounded_product(c.arg<const float>(kX, s) + cut.row * k, k, cut.rows, weight, k, panels, *scratch, sums);
  });
}

template <bool Gated>
const Kernel product = {"", "", "", "", nullptr, scratch<RoundedMemory>, units<false, kPanelsOfRounded, Gated>, run_rounded<Gated>};
template <bool Gated>
constexpr Kernel exact(const char *name, const char *ints, const char *(*check)(const Call &)) {
  return {name, kRowsArgs, ints, "", check, scratch<Sums>, units<false, kPanelGroup, Gated>, run<PanelBf16, Gated>};
}
template <bool Gated>
constexpr Kernel rounded(const char *name, const char *ints, const char *(*check)(const Call &)) {
  return {name, kRowsArgs, ints, "", check, no_scratch, round_units, run_round, &product<Gated>};
}
constexpr auto *check_exact = check<false>;

#endif

// --- quantised weights ---

const char *check_quantised(const Call &c) {
  if (const char *wrong = check_group(c.ints[kGroup])) return wrong;
  return check<false>(c);
}

// Rows for the matrix unit. Rows of bytes under one scale do not go there yet.
template <class Type>
bool tiled(const Call &c, const Step &s) { return Type::kTiled && c.rows(s) >= kTileLeast; }

struct IntScratch : Sums {
  TileMemory tiles;
};

// Rows are quantised in the tiles they are multiplied in: of woven ones two threads would write to one line.
template <class Type>
Tiles tiles_in(const Call &c, const Step &s) {
  return tiled<Type>(c, s) ? Tiles{c.rows(s), (c.rows(s) + kTileHeight - 1) / kTileHeight, kTileHeight} : tiles_of(c.rows(s));
}
constexpr int64_t kQuantiseWork = 4;  // of an element, beside that of other kernels on rows
int64_t quantise_work(const Call &c, const Tiles &tiles) { return kQuantiseWork * c.ints[kK] * (tiles.height ? tiles.height : kTileRows); }
template <class Type>
int64_t quantise_units(const Call &c, const Step &s) {
  const Tiles tiles = tiles_in<Type>(c, s);
  return row_units(tiles.count, quantise_work(c, tiles));
}

template <class Type>
void run_quantise(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t k = c.ints[kK], group = c.ints[kGroup];
  const Tiles tiles = tiles_in<Type>(c, s);
  const Rows some = rows_of(unit, tiles.count, quantise_work(c, tiles)), rows = {tiles.row(some.begin), tiles.row(some.end)};
  const float *x = c.arg<const float>(kX, s);
  uint8_t *to = c.arg<uint8_t>(kScratchRows, s);
  if constexpr (Type::kTiled)
    if (tiled<Type>(c, s)) return tile_quantise<Type>(x, k, group, to, rows);
  quantise_rows<Type>(x, k, group, tiles, to, rows);
}

template <class Type, bool Gated>
void run_quantised(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN], group = c.ints[kGroup], padded = padded_inputs(k, group);
  const bool on_unit = tiled<Type>(c, s);
  const Tiles tiles = tiles_in<Type>(c, s);
  const Cut cut = cut_of<Gated>(c, s, unit, kPanelGroup, tiles);
  const int64_t row_bytes = Type::row_bytes(padded), panel_bytes = int_panel_bytes<Type>(padded, group);
  IntScratch *scratch = (IntScratch *)memory;
  IntProduct product = {{c.arg<const uint8_t>(kScratchRows, s) + cut.row * row_bytes, row_bytes, padded},
                        nullptr, panel_bytes, group, nullptr, 16, cut.rows * 16};
  const auto multiply = [&](int64_t first, int64_t panels, float *sums) {
    product.w = c.arg<const uint8_t>(kWeight, s) + first * panel_bytes, product.c = sums;
    if constexpr (Type::kTiled)
      if (on_unit) return tile_product<Type>(product, cut.rows, panels, scratch->tiles);
    int_product<Type, true>(product, tiles, tiles.of(cut.row), tiles.of(cut.row + cut.rows - 1) + 1, panels);
  };
  if (Gated || on_unit || c.arg<const float>(kBias, s) || (cut.first + cut.panels) * 16 > n)
    return put_products<Gated>(c, s, cut, c.ints[kIntAct], scratch->sums, multiply);
  product.c_row = n, product.c_stride = 16;  // vectors end where the results are wanted
  multiply(cut.first, cut.panels, c.arg<float>(kOut, s) + cut.row * n + cut.first * 16);
}

template <class Type, bool Gated>
const Kernel quantised = {"", "", "", "", nullptr, scratch<IntScratch>, units<false, kPanelGroup, Gated>, run_quantised<Type, Gated>};
template <class Type, bool Gated = false>
constexpr Kernel ints(const char *name, const char *(*check)(const Call &)) {
  return {name, kIntArgs, Gated ? kGatedIntInts : kIntInts, "", check, no_scratch, quantise_units<Type>, run_quantise<Type>, &quantised<Type, Gated>};
}

const char *check_groups(const Call &c) { return c.ints[kGroup] ? check_quantised(c) : "group must not be 0, which linear_rounded_row is for: compile the model again"; }
const char *check_long(const Call &c) {
  return c.ints[kGroup] || c.ints[kK] <= kLongestRow ? check_quantised(c) : "k must be at most 131072 under one scale: use groups";
}
const char *check_whole(const Call &c) { return c.ints[kGroup] ? "group must be 0: linear_rounded is for others" : check_long(c); }

}  // namespace

const Kernel linear_kernels[] = {
    {"linear.f32", "x weight bias? out", "k n", "", check<false>, scratch<Sums>, units<false>, run<PanelF32, false>},
    exact<false>("linear.bf16", "k n", check_exact),
    rounded<false>("linear_rounded.bf16", "k n", check_rounded),
    ints<Int8>("linear.i8", check_quantised),
    ints<Int4>("linear.i4", check_quantised),
    ints<Int8Bytes>("linear_rounded.i8", check_groups),
    ints<Int8WholeBytes>("linear_rounded_row.i8", check_whole),
    ints<Int4RowBytes>("linear_rounded.i4", check_long),
    {"gated_linear.f32", "x weight bias? out", kGatedInts, "", check_gated<kAct, check<false>>, scratch<Sums>, units<false, kPanelGroup, true>,
     run<PanelF32, true>},
    exact<true>("gated_linear.bf16", kGatedInts, check_gated<kAct, check_exact>),
    rounded<true>("gated_linear_rounded.bf16", kGatedInts, check_gated<kAct, check_rounded>),
    ints<Int8, true>("gated_linear.i8", check_gated<kIntAct, check_quantised>),
    ints<Int4, true>("gated_linear.i4", check_gated<kIntAct, check_quantised>),
    ints<Int8Bytes, true>("gated_linear_rounded.i8", check_gated<kIntAct, check_groups>),
    ints<Int8WholeBytes, true>("gated_linear_rounded_row.i8", check_gated<kIntAct, check_whole>),
    ints<Int4RowBytes, true>("gated_linear_rounded.i4", check_gated<kIntAct, check_long>),
    {"heads_linear.f32", "x weight out", "k n heads", "", check<true>, scratch<Sums>, units<true>, run_heads<PanelF32>},
    {"heads_linear.bf16", "x weight out", "k n heads", "", check<true>, scratch<Sums>, units<true>, run_heads<PanelBf16>},
    {},
};

}  // namespace XK_LEVEL
