// linear: out[rows, n] = x[rows, k] * weight^T + bias. Weights come in panels [n/16][k][16]. Few rows: one pass, bound by the
// bandwidth of the weights. Many rows: k in blocks, so that a panel block stays in L1; partial sums travel through `out`.
#include "common.h"
#include "panel.h"

namespace XK_LEVEL {
namespace {

enum { kX, kWeight, kBias, kOut };
enum { kK, kN };

const char *check(const Call &c) {
  if (c.ints[kK] < 1 || c.ints[kN] < 1) return "k and n must be positive";
  return nullptr;
}

int64_t panels_of(const Call &c) { return (c.ints[kN] + 15) / 16; }
int64_t panel_groups(const Call &c) { return (panels_of(c) + kPanelGroup - 1) / kPanelGroup; }
int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

constexpr int64_t kWide = tile_panels(kTileRows);  // panels of the widest tile

struct Scratch {  // of a thread
  float sums[kPanelGroup * kRowBlock * 16];          // [panel][row][16]: the chains, between blocks of k
  uint8_t expanded[kWide * kDepthBlock * 64];        // bf16 panels widened once for all rows
};
int64_t scratch(const Call &) { return sizeof(Scratch); }

int64_t units(const Call &c, const Step &s) { return panel_groups(c) * row_blocks(c.rows(s)); }

// Chains of `rows` rows times `panels` panels over all of k.
template <class Panel>
void multiply(Product t, int64_t rows, int64_t panels, uint8_t *expanded) {
  if (rows <= kTileRows) return product<Panel>(t, rows, panels);
  const bool expand = Panel::bytes != 64 && rows > 2 * kTileRows;
  const int64_t k = t.k;
  for (int64_t begin = 0; begin < k; begin += kDepthBlock) {
    Product block = t;
    block.k = min(kDepthBlock, k - begin);
    block.x = t.x + begin;
    block.resume = begin > 0;
    for (int64_t p = 0; p < panels; p += kWide) {
      const int64_t wide = min(kWide, panels - p);
      block.w = t.w + p * t.w_stride + begin * Panel::bytes;
      block.w_stride = t.w_stride;
      block.c = t.c + p * t.c_stride;
      if (!expand) {
        product<Panel>(block, rows, wide);
        continue;
      }
      for (int64_t j = 0; j < wide; j++)
        for (int64_t i = 0; i < block.k; i++)
          store(expanded + (j * kDepthBlock + i) * 64, Panel::load(block.w + j * t.w_stride + i * Panel::bytes));
      block.w = expanded;
      block.w_stride = kDepthBlock * 64;
      product<PanelF32>(block, rows, wide);
    }
  }
}

template <class Panel>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN], all = c.rows(s), blocks = row_blocks(all), panel_bytes = k * Panel::bytes;
  const int64_t block = unit % blocks, row = all * block / blocks, rows = all * (block + 1) / blocks - row;
  const int64_t first = unit / blocks * kPanelGroup, panels = min(kPanelGroup, panels_of(c) - first);
  Scratch *scratch = (Scratch *)memory;
  multiply<Panel>({c.arg<const float>(kX, s) + row * k, k, c.arg<const uint8_t>(kWeight, s) + first * panel_bytes, panel_bytes, k,
                   scratch->sums, 16, rows * 16, false, kFetchAhead},
                  rows, panels, scratch->expanded);
  const float *bias = c.arg<const float>(kBias, s), *sums = scratch->sums;
  for (int64_t p = 0, column = first * 16; p < panels; p++, column += 16) {
    const f32x16 add = bias ? load_some(bias + column, n - column) : zero();
    float *out = c.arg<float>(kOut, s) + row * n + column;
    for (int64_t r = 0; r < rows; r++, sums += 16, out += n) store_some(out, bias ? load(sums) + add : load(sums), n - column);
  }
}

}  // namespace

const Kernel linear_kernels[] = {
    {"linear.f32", "x weight bias? out", "k n", "", check, scratch, units, run<PanelF32>},
    {"linear.bf16", "x weight bias? out", "k n", "", check, scratch, units, run<PanelBf16>},
    {},
};

}  // namespace XK_LEVEL
