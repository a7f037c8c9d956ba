// linear: out[rows, n] = x[rows, k] * weight^T + bias. Weights come in panels [n/16][k][16]. heads_linear: the same for every head of
// x[rows, heads, k] with a weight of its own, [heads][n/16][k][16]. Few rows: one pass, bound by the bandwidth of the weights. Many
// rows: k in blocks, so that a panel block stays in L1. Quantised weights (quantised.h): a first stage quantises the rows of x.
#include "common.h"
#include "rounded.h"

namespace XK_LEVEL {
namespace {

enum { kX, kWeight, kBias, kOut, kHeadsOut = 2, kScratchRows = 4 };
enum { kK, kN, kHeads, kGroup = 2 };
constexpr const char *kRowsArgs = "x weight bias? out scratch_rows?", *kIntArgs = "x weight bias? out scratch_rows", *kIntInts = "k n group";

template <bool Heads>
const char *check(const Call &c) {
  if (c.ints[kK] < 1 || c.ints[kN] < 1) return "k and n must be positive";
  if (Heads && c.ints[kHeads] < 1) return "heads must be positive";
  return nullptr;
}

int64_t panels_of(const Call &c) { return (c.ints[kN] + 15) / 16; }
constexpr int64_t kUnitsOfMany = 24;  // of many panels each, to keep threads busy
int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// A unit is some panels times some rows. Few rows: as many panels as make about kUnitBytes of weights, so that threads end together.
// Many rows: kPanelGroup panels and a block of rows that stays in L2; up to `most` panels where rows are converted for all of them.
int64_t panels_of_unit(const Call &c, int64_t rows, int64_t most = kPanelGroup) {
  if (most > kPanelGroup && rows > kTileRows) return max(kPanelGroup, min(most, panels_of(c) * row_blocks(rows) / kUnitsOfMany / kPanelGroup * kPanelGroup));
  return rows > kTileRows || XK_VECTOR_BYTES == 64 ? kPanelGroup : max(1, min(kPanelGroup, kUnitWeights / (16 * c.ints[kK])));
}
struct Cut {
  int64_t row, rows, first, panels, head;
};
Cut cut_of(const Call &c, const Step &s, int64_t unit, int64_t most, const Tiles &tiles) {
  const int64_t blocks = row_blocks(c.rows(s)), each = panels_of_unit(c, c.rows(s), most), groups = (panels_of(c) + each - 1) / each;
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

struct Sums {  // of a thread
  float sums[kPanelGroup * kRowBlock * 16];  // [panel][row][16]: the chains, between blocks of k
};
template <class Memory>
int64_t scratch(const Call &) { return sizeof(Memory); }

template <bool Heads, int64_t Most = kPanelGroup>
int64_t units(const Call &c, const Step &s) {
  const int64_t each = panels_of_unit(c, c.rows(s), Most);
  return (Heads ? c.ints[kHeads] : 1) * ((panels_of(c) + each - 1) / each) * row_blocks(c.rows(s));
}

template <class Panel, bool Heads>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN], panel_bytes = k * Panel::bytes, heads = Heads ? c.ints[kHeads] : 1;
  const auto [row, rows, first, panels, head] = cut_of(c, s, unit, kPanelGroup, rows_apart(c.rows(s)));
  const float *x = c.arg<const float>(kX, s) + (row * heads + head) * k;
  const uint8_t *weight = c.arg<const uint8_t>(kWeight, s) + (head * panels_of(c) + first) * panel_bytes;
  float *sums = ((Sums *)memory)->sums;
  multiply<Panel>({x, heads * k, weight, panel_bytes, k, sums, 16, rows * 16, false}, rows, panels);
  put_sums(sums, rows, panels, first * 16, n, heads * n, Heads ? nullptr : c.arg<const float>(kBias, s),
           c.arg<float>(Heads ? kHeadsOut : kOut, s) + (row * heads + head) * n);
}

// --- bf16 weights, rows converted ---

const char *check_rows(const Call &c) {
  if (c.args[kScratchRows].kind == XK_NONE) return "scratch_rows must not be none where the machine multiplies bf16: compile the model again";
  return check<false>(c);
}

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
TileCut tile_cut(const Call &c, const Step &s) {
  const int64_t strips = (c.rows(s) + kStripRows - 1) / kStripRows, blocks = (strips + kStrips - 1) / kStrips;
  const int64_t many = min(kPanelsOfTiles, panels_of(c) * blocks / kUnitsOfTiles / 2 * 2);
  return {strips, blocks, strips == 1 ? kPanelGroup : max(2, many)};
}
int64_t tile_units(const Call &c, const Step &s) {
  const TileCut cut = tile_cut(c, s);
  return cut.blocks * ((panels_of(c) + cut.each - 1) / cut.each);
}

template <int Parts>
void run_tiles(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN];
  const auto [strips, blocks, each] = tile_cut(c, s);
  const int64_t block = unit % blocks, row = strips * block / blocks * kStripRows;
  const int64_t rows = min(c.rows(s), strips * (block + 1) / blocks * kStripRows) - row;
  const int64_t first = unit / blocks * each, panels = min(each, panels_of(c) - first);
  FloatTileMemory *scratch = (FloatTileMemory *)memory;
  const uint8_t *weight = c.arg<const uint8_t>(kWeight, s) + first * k * PanelBf16::bytes;
  if (c.rows(s) <= kFewSplit) float_few<Parts>(c.arg<const float>(kX, s), k, rows, weight, k, panels, *scratch);
  else float_tiles<Parts>(c.arg<const uint8_t>(kScratchRows, s), row, rows, weight, k, panels, *scratch);
  put_sums(scratch->sums, rows, panels, first * 16, n, n, c.arg<const float>(kBias, s), c.arg<float>(kOut, s) + row * n);
}

template <int Parts>
const Kernel tiles = {"", "", "", "", nullptr, scratch<FloatTileMemory>, tile_units, run_tiles<Parts>};
const Kernel exact = {"linear.bf16", kRowsArgs, "k n", "", check_rows, no_scratch, split_units, run_split<3>, &tiles<3>};
const Kernel rounded = {"linear_rounded.bf16", kRowsArgs, "k n", "", check_rows, no_scratch, split_units, run_split<1>, &tiles<1>};

#else

// Where elements are pairs, many rows are rounded before all of the product, elsewhere and few of them by each unit.
bool rounds_first(const Call &c, const Step &s) { return kInputs == 2 && c.rows(s) > kFewRows; }
int64_t round_units(const Call &c, const Step &s) { return rounds_first(c, s) ? row_units(c.rows(s), c.ints[kK]) : 0; }
void run_round(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  round_rows(c.arg<const float>(kX, s), c.ints[kK], c.arg<uint8_t>(kScratchRows, s), rows_of(unit, c.rows(s), c.ints[kK]));
}

void run_rounded(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN];
  const auto [row, rows, first, panels, head] = cut_of(c, s, unit, kPanelsOfRounded, rows_apart(c.rows(s)));
  RoundedMemory *scratch = (RoundedMemory *)memory;
  const uint8_t *weight = c.arg<const uint8_t>(kWeight, s) + first * k * PanelBf16::bytes;
  if (rounds_first(c, s)) product_of_rounded(c.arg<const uint8_t>(kScratchRows, s) + row * rounded_bytes(k), rows, weight, k, panels, *scratch);
  else rounded_product(c.arg<const float>(kX, s) + row * k, k, rows, weight, k, panels, *scratch);
  put_sums(scratch->sums, rows, panels, first * 16, n, n, c.arg<const float>(kBias, s), c.arg<float>(kOut, s) + row * n);
}

const Kernel exact = {"linear.bf16", kRowsArgs, "k n", "", check<false>, scratch<Sums>, units<false>, run<PanelBf16, false>};
const Kernel product = {"", "", "", "", nullptr, scratch<RoundedMemory>, units<false, kPanelsOfRounded>, run_rounded};
const Kernel rounded = {"linear_rounded.bf16", kRowsArgs, "k n", "", kInputs == 2 ? check_rows : check<false>, no_scratch, round_units, run_round, &product};

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

template <class Type>
void run_quantised(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN], group = c.ints[kGroup], padded = padded_inputs(k, group);
  const bool on_unit = tiled<Type>(c, s);
  const Tiles tiles = tiles_in<Type>(c, s);
  const Cut cut = cut_of(c, s, unit, kPanelGroup, tiles);
  const int64_t row_bytes = Type::row_bytes(padded), panel_bytes = int_panel_bytes<Type>(padded, group);
  IntScratch *scratch = (IntScratch *)memory;
  const float *bias = c.arg<const float>(kBias, s);
  float *out = c.arg<float>(kOut, s) + cut.row * n;
  IntProduct product = {{c.arg<const uint8_t>(kScratchRows, s) + cut.row * row_bytes, row_bytes, padded},
                        c.arg<const uint8_t>(kWeight, s) + cut.first * panel_bytes, panel_bytes, group, scratch->sums, 16, cut.rows * 16};
  const bool direct = !on_unit && !bias && (cut.first + cut.panels) * 16 <= n;  // vectors end where the results are wanted
  if (direct) product.c = out + cut.first * 16, product.c_row = n, product.c_stride = 16;
  if constexpr (Type::kTiled)
    if (on_unit) tile_product<Type>(product, cut.rows, cut.panels, scratch->tiles);
  if (!on_unit) int_product<Type, true>(product, tiles, tiles.of(cut.row), tiles.of(cut.row + cut.rows - 1) + 1, cut.panels);
  if (!direct) put_sums(scratch->sums, cut.rows, cut.panels, cut.first * 16, n, n, bias, out);
}

template <class Type>
const Kernel quantised = {"", "", "", "", nullptr, scratch<IntScratch>, units<false>, run_quantised<Type>};

const char *check_groups(const Call &c) { return c.ints[kGroup] ? check_quantised(c) : "group must not be 0, which linear_rounded_row is for: compile the model again"; }
const char *check_long(const Call &c) {
  return c.ints[kGroup] || c.ints[kK] <= kLongestRow ? check_quantised(c) : "k must be at most 131072 under one scale: use groups";
}
const char *check_whole(const Call &c) { return c.ints[kGroup] ? "group must be 0: linear_rounded is for others" : check_long(c); }

}  // namespace

const Kernel linear_kernels[] = {
    {"linear.f32", "x weight bias? out", "k n", "", check<false>, scratch<Sums>, units<false>, run<PanelF32, false>},
    exact,
    rounded,
    {"linear.i8", kIntArgs, kIntInts, "", check_quantised, no_scratch, quantise_units<Int8>, run_quantise<Int8>, &quantised<Int8>},
    {"linear.i4", kIntArgs, kIntInts, "", check_quantised, no_scratch, quantise_units<Int4>, run_quantise<Int4>, &quantised<Int4>},
    {"linear_rounded.i8", kIntArgs, kIntInts, "", check_groups, no_scratch, quantise_units<Int8Bytes>, run_quantise<Int8Bytes>, &quantised<Int8Bytes>},
    {"linear_rounded_row.i8", kIntArgs, kIntInts, "", check_whole, no_scratch, quantise_units<Int8WholeBytes>, run_quantise<Int8WholeBytes>,
     &quantised<Int8WholeBytes>},
    {"linear_rounded.i4", kIntArgs, kIntInts, "", check_long, no_scratch, quantise_units<Int4RowBytes>, run_quantise<Int4RowBytes>,
     &quantised<Int4RowBytes>},
    {"heads_linear.f32", "x weight out", "k n heads", "", check<true>, scratch<Sums>, units<true>, run<PanelF32, true>},
    {"heads_linear.bf16", "x weight out", "k n heads", "", check<true>, scratch<Sums>, units<true>, run<PanelBf16, true>},
    {},
};

}  // namespace XK_LEVEL
