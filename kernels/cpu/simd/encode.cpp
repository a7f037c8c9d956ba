// What encoders need: attention over the whole of a sequence, which lies in one step, and the row that stands for a sequence.
// encode_attention takes keys in blocks of kKeyBlock tokens counted from the start of the sequence and merges each block into a
// row's running state in block order, so that a row depends on its own sequence alone.
#include <math.h>

#include "attend.h"
#include "common.h"
#include "vmath.h"

namespace XK_LEVEL {
namespace {

// --- encode_attention: q [T, Hq D], k [T, Hkv D], v [T, Hkv Dv], out [T, Hq Dv], scratch_state [T, Hq, 2] (maximum and sum). A unit
// is one KV head of one sequence: its keys and values are brought into panels once, for all query rows. ---

enum { kQ, kK, kV, kOut, kState };
enum { kQHeads, kKvHeads, kHeadDim, kValueDim, kWindow };
enum { kScale, kSoftcap };

const char *check_attention(const Call &c) {
  if (!c.every_token()) return "attends for every token of the step: rows must be T";
  if (c.ints[kKvHeads] < 1 || c.ints[kHeadDim] < 1 || c.ints[kValueDim] < 1) return "kv_heads, head_dim and value_dim must be positive";
  if (c.ints[kQHeads] < 1 || c.ints[kQHeads] % c.ints[kKvHeads]) return "q_heads must be a positive multiple of kv_heads";
  if (c.ints[kWindow] < 0) return "window must be 0 (none) or positive";
  if (!(c.floats[kSoftcap] >= 0)) return "softcap must be 0 (none) or positive";
  return nullptr;
}

// Scratch of a thread: a block's keys and values in panels, and of a tile of rows the queries, the scores and the block's sums.
int64_t scratch_attention(const Call &c) {
  return KeyTile::scratch_bytes(c.ints[kHeadDim], c.ints[kValueDim]);
}

int64_t units_attention(const Call &c, const Step &s) { return s.batch.N * c.ints[kKvHeads]; }

struct Tile : KeyTile {
  int64_t window;
  float softcap;
};

// The scores of the row at `position` become weights exp(score - maximum), zero for tokens it does not see.
void soften(const Tile &t, float *score, int64_t position, float *maximum, float *sum) {
  const f32x16 lowest = set1(-INFINITY);
  const int64_t from = t.window > 0 ? max(0, position - t.window + 1 - t.first) : 0;
  const int64_t to = t.window > 0 ? min(t.tokens, position + t.window - t.first) : t.tokens;
  const f32x16 first = set1((float)from), last = set1((float)(to - 1));
  f32x16 index = lane_index(), value[kBlockGroups], top = lowest, total = zero();
#pragma GCC unroll 4
  for (int g = 0; g < kBlockGroups; g++, index = index + set1(16.0f)) {
    value[g] = load(score + g * 16);
    if (t.softcap > 0) value[g] = set1(t.softcap) * tanh(value[g] / set1(t.softcap));
    value[g] = select_less(index, first, lowest, select_less(last, index, lowest, value[g]));
    top = max(value[g], top);
  }
  *maximum = reduce_max(top);
  const f32x16 m = set1(*maximum);
#pragma GCC unroll 4
  for (int g = 0; g < kBlockGroups; g++) {
    const f32x16 weight = exp(value[g] - m);
    store(score + g * 16, weight);
    total = total + weight;
  }
  *sum = reduce_add(total);
}

void run_attention(const Call &c, const Step &s, int64_t unit, uint8_t *scratch) {
  const int64_t kv_heads = c.ints[kKvHeads], q_heads = c.ints[kQHeads], share = q_heads / kv_heads, head = unit % kv_heads;
  const int64_t begin = s.batch.seq_start[unit / kv_heads], length = s.batch.seq_start[unit / kv_heads + 1] - begin;
  const int64_t k_stride = kv_heads * c.ints[kHeadDim], v_stride = kv_heads * c.ints[kValueDim];
  Tile t;
  t.window = c.ints[kWindow], t.softcap = c.floats[kSoftcap];
  t.place(scratch, c.ints[kHeadDim], c.ints[kValueDim]);
  const float *q = c.arg<const float>(kQ, s), *k = c.arg<const float>(kK, s), *v = c.arg<const float>(kV, s);
  float *out = c.arg<float>(kOut, s), *state = c.arg<float>(kState, s);
  const auto at = [&](int64_t row, int64_t sharing) { return (begin + row) * q_heads + head * share + sharing; };  // in q, out, state
  for (int64_t row = 0; row < length; row++)
    for (int64_t sharing = 0; sharing < share; sharing++) {
      state[at(row, sharing) * 2] = -INFINITY, state[at(row, sharing) * 2 + 1] = 0.0f;
      for (int64_t d = 0; d < t.value_dim; d++) out[at(row, sharing) * t.value_dim + d] = 0.0f;
    }
  for (t.first = 0; t.first < length; t.first += kKeyBlock) {
    t.tokens = min(kKeyBlock, length - t.first);
    const int64_t token = begin + t.first;
    pack_block(t, k + token * k_stride + head * t.dim, k_stride, v + token * v_stride + head * t.value_dim, v_stride,
         c.floats[kScale]);
    // Rows that see a token of this block are consecutive.
    const int64_t from = t.window > 0 ? max(0, t.first - t.window + 1) : 0;
    const int64_t to = t.window > 0 ? min(length, t.first + t.tokens + t.window - 1) : length;
    for (int64_t sharing = 0; sharing < share; sharing++)
      for (int64_t row = from; row < to; row += kTileRows) {
        const int rows = (int)min(kTileRows, to - row);
        const float *query[kTileRows];
        float *target[kTileRows], *kept[kTileRows];
        for (int r = 0; r < rows; r++) {
          const int64_t place = at(row + r, sharing);
          query[r] = q + place * t.dim, target[r] = out + place * t.value_dim, kept[r] = state + place * 2;
        }
        attend(t, rows, query, target, kept,
               [&](float *score, int r, float *maximum, float *sum) { soften(t, score, row + r, maximum, sum); });
      }
  }
  for (int64_t row = 0; row < length; row++)
    for (int64_t sharing = 0; sharing < share; sharing++) {
      float *line = out + at(row, sharing) * t.value_dim;
      const f32x16 sum = set1(state[at(row, sharing) * 2 + 1]);
      for (int64_t d = 0; d < t.value_dim; d += 16) store_some(line + d, load_some(line + d, t.value_dim - d) / sum, t.value_dim - d);
    }
}

// --- first_rows and mean_rows: index (last), table [T, width], out [S, width]. The sequence whose last row is i begins at row
// i - positions[i]. ---

const char *check_rows(const Call &c) {
  if (c.ints[0] < 1) return "width must be positive";
  return c.every_logit_row() ? nullptr : "takes one row for each of `last`: rows must be S";
}
int64_t units_rows(const Call &c, const Step &s) { return c.rows(s); }

template <bool kMean>
void run_rows(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0], end = s.batch.last[unit], begin = max(0, end - s.batch.positions[end]);
  const float *table = c.arg<const float>(1, s);
  float *out = c.arg<float>(2, s) + unit * width;
  for (int64_t i = 0; i < width; i += 16) {
    f32x16 sum = load_some(table + begin * width + i, width - i);
    if (kMean) {
      for (int64_t row = begin + 1; row <= end; row++) sum = sum + load_some(table + row * width + i, width - i);
      sum = sum / set1((float)(end - begin + 1));
    }
    store_some(out + i, sum, width - i);
  }
}

// --- l2_normalize: x, out; width, eps. out = x / max(|x|, eps), the squares summed in sixteen fixed lanes. ---

const char *check_normalize(const Call &c) { return c.ints[0] < 1 ? "width must be positive" : nullptr; }
int64_t units_normalize(const Call &c, const Step &s) { return row_units(c.rows(s), c.ints[0]); }

void run_normalize(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const float *x = c.arg<const float>(0, s) + r * width;
    float *out = c.arg<float>(1, s) + r * width;
    f32x16 squares = zero();
    for (int64_t i = 0; i < width; i += 16) {
      const f32x16 part = load_some(x + i, width - i);
      squares = fma(part, part, squares);
    }
    const float norm = sqrtf(reduce_add(squares));
    const f32x16 divisor = set1(norm < c.floats[0] ? c.floats[0] : norm);
    for (int64_t i = 0; i < width; i += 16) store_some(out + i, load_some(x + i, width - i) / divisor, width - i);
  }
}

}  // namespace

const Kernel encode_kernels[] = {
    {"encode_attention.f32", "q k v out scratch_state", "q_heads kv_heads head_dim value_dim window", "scale softcap", check_attention,
     scratch_attention, units_attention, run_attention},
    {"first_rows.f32", "index table out", "width", "", check_rows, no_scratch, units_rows, run_rows<false>},
    {"mean_rows.f32", "index table out", "width", "", check_rows, no_scratch, units_rows, run_rows<true>},
    {"l2_normalize.f32", "x out", "width", "eps", check_normalize, no_scratch, units_normalize, run_normalize},
    {},
};

}  // namespace XK_LEVEL
