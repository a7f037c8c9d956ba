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

constexpr int64_t kExpandedBytes = kDepthBlock * 64, kEdgeBytes = kRowBlock * 64;
int64_t scratch(const Call &) { return kExpandedBytes + kEdgeBytes; }

int64_t units(const Call &c, const Step &s) { return panel_groups(c) * row_blocks(c.rows(s)); }

// All of k for `rows` rows and `panels` whole panels.
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
    for (int64_t p = 0; p < panels; p++) {
      block.w = t.w + p * t.panel_stride + begin * Panel::bytes;
      block.c = t.c + p * 16;
      if (!expand) {
        product<Panel>(block, rows, 1);
        continue;
      }
      for (int64_t i = 0; i < block.k; i++) store(expanded + i * 64, Panel::load(block.w + i * Panel::bytes));
      block.w = expanded;
      product<PanelF32>(block, rows, 1);
    }
  }
}

template <class Panel>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *scratch) {
  const int64_t k = c.ints[kK], n = c.ints[kN], all = c.rows(s), blocks = row_blocks(all), panel_bytes = k * Panel::bytes;
  const int64_t block = unit % blocks, row = all * block / blocks, rows = all * (block + 1) / blocks - row;
  const int64_t first = unit / blocks * kPanelGroup, last = min(first + kPanelGroup, panels_of(c)), whole = min(last, n / 16);
  float *out = c.arg<float>(kOut, s) + row * n;
  Product t{c.arg<const float>(kX, s) + row * k, k, c.arg<const uint8_t>(kWeight, s) + first * panel_bytes, panel_bytes, k,
            out + first * 16, n, false};
  multiply<Panel>(t, rows, whole - first, scratch);
  if (whole < last) {  // the last panel is partly padding: its columns are computed aside
    float *edge = (float *)(scratch + kExpandedBytes);
    t.w += (whole - first) * panel_bytes;
    t.c = edge;
    t.ldc = 16;
    multiply<Panel>(t, rows, 1, scratch);
    for (int64_t r = 0; r < rows; r++) store_first(out + r * n + whole * 16, load(edge + r * 16), n - whole * 16);
  }
  if (const float *bias = c.arg<const float>(kBias, s)) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = first * 16; i < min(last * 16, n); i += 16) {
        float *p = out + r * n + i;
        store_some(p, load_some(p, n - i) + load_some(bias + i, n - i), n - i);
      }
  }
}

}  // namespace

const Kernel linear_kernels[] = {
    {"linear.f32", "x weight bias? out", "k n", "", check, scratch, units, run<PanelF32>},
    {"linear.bf16", "x weight bias? out", "k n", "", check, scratch, units, run<PanelBf16>},
    {},
};

}  // namespace XK_LEVEL
