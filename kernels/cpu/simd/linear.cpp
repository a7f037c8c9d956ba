// linear: out[rows, n] = x[rows, k] * weight^T + bias. Weights come in panels [n/16][k][16]. heads_linear: the same for every head of
// x[rows, heads, k] with a weight of its own, [heads][n/16][k][16]. Few rows: one pass, bound by the bandwidth of the weights. Many rows: k in blocks, so that a panel block stays in L1; partial sums travel through `out`.
#include "common.h"
#include "panel.h"

namespace XK_LEVEL {
namespace {

enum { kX, kWeight, kBias, kOut, kHeadsOut = 2 };
enum { kK, kN, kHeads };

template <bool Heads>
const char *check(const Call &c) {
  if (c.ints[kK] < 1 || c.ints[kN] < 1) return "k and n must be positive";
  if (Heads && c.ints[kHeads] < 1) return "heads must be positive";
  return nullptr;
}

int64_t panels_of(const Call &c) { return (c.ints[kN] + 15) / 16; }
int64_t panel_groups(const Call &c) { return (panels_of(c) + kPanelGroup - 1) / kPanelGroup; }
int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

struct Scratch {  // of a thread
  float sums[kPanelGroup * kRowBlock * 16];          // [panel][row][16]: the chains, between blocks of k
  uint8_t expanded[kExpandedBytes];                  // bf16 panels widened once for all rows
};
int64_t scratch(const Call &) { return sizeof(Scratch); }

template <bool Heads>
int64_t units(const Call &c, const Step &s) {
  return (Heads ? c.ints[kHeads] : 1) * panel_groups(c) * row_blocks(c.rows(s));
}

template <class Panel, bool Heads>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t k = c.ints[kK], n = c.ints[kN], all = c.rows(s), blocks = row_blocks(all), panel_bytes = k * Panel::bytes;
  const int64_t block = unit % blocks, row = all * block / blocks, rows = all * (block + 1) / blocks - row;
  const int64_t group = unit / blocks % panel_groups(c), first = group * kPanelGroup, panels = min(kPanelGroup, panels_of(c) - first);
  const int64_t heads = Heads ? c.ints[kHeads] : 1, head = unit / blocks / panel_groups(c);
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

}  // namespace

const Kernel linear_kernels[] = {
    {"linear.f32", "x weight bias? out", "k n", "", check<false>, scratch, units<false>, run<PanelF32, false>},
    {"linear.bf16", "x weight bias? out", "k n", "", check<false>, scratch, units<false>, run<PanelBf16, false>},
    {"heads_linear.f32", "x weight out", "k n heads", "", check<true>, scratch, units<true>, run<PanelF32, true>},
    {"heads_linear.bf16", "x weight out", "k n heads", "", check<true>, scratch, units<true>, run<PanelBf16, true>},
    {},
};

}  // namespace XK_LEVEL
