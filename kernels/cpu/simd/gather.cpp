// embedding and lookup (rows of a packed weight, by int32 and int64) and rows (rows of a plain array).
#include <string.h>

#include "quantised.h"

namespace XK_LEVEL {
namespace {

// --- embedding: ids, weight (panels), out; vocab width. One output row is one lane of one panel. ---

const char *check_embedding(const Call &c) {
  return c.ints[0] < 1 || c.ints[1] < 1 ? "vocab and width must be positive" : nullptr;
}
const char *check_int_embedding(const Call &c) {
  if (const char *wrong = check_group(c.ints[2])) return wrong;
  return check_embedding(c);
}
int64_t embedding_units(const Call &c, const Step &s) { return row_units(c.rows(s), c.ints[1] * 4); }

template <bool kBf16, class Id = int32_t>
void run_embedding(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t vocab = c.ints[0], width = c.ints[1];
  const Rows rows = rows_of(unit, c.rows(s), width * 4);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const int64_t id = c.arg<const Id>(0, s)[r], lane = id % 16;
    float *out = c.arg<float>(2, s) + r * width;
    if (id < 0 || id >= vocab) {  // the runner refuses such ids before the step; this is for indices it does not know
      memset(out, 0xff, (size_t)width * sizeof(float));
    } else if (kBf16) {
      const uint16_t *w = c.arg<const uint16_t>(1, s) + id / 16 * width * 16 + lane % 8 * 2 + lane / 8;
      for (int64_t i = 0; i < width; i++) out[i] = bf16_to_float(w[i * 16]);
    } else {
      const float *w = c.arg<const float>(1, s) + id / 16 * width * 16 + lane;
      for (int64_t i = 0; i < width; i++) out[i] = w[i * 16];
    }
  }
}

template <class Type, class Id = int32_t>
void run_int_embedding(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t vocab = c.ints[0], width = c.ints[1];
  const Rows rows = rows_of(unit, c.rows(s), width * 4);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const int64_t id = c.arg<const Id>(0, s)[r];
    float *out = c.arg<float>(2, s) + r * width;
    if (id < 0 || id >= vocab) memset(out, 0xff, (size_t)width * sizeof(float));
    else int_row<Type>(c.arg<const uint8_t>(1, s), id, width, c.ints[2], out);
  }
}

// --- rows: index, table, out; width ---

const char *check_rows(const Call &c) { return c.ints[0] < 1 ? "width must be positive" : nullptr; }
int64_t rows_units(const Call &c, const Step &s) { return row_units(c.rows(s), c.ints[0]); }

void run_rows(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t width = c.ints[0];
  const Rows rows = rows_of(unit, c.rows(s), width);
  for (int64_t r = rows.begin; r < rows.end; r++)
    memcpy(c.arg<float>(2, s) + r * width, c.arg<const float>(1, s) + c.arg<const int32_t>(0, s)[r] * width,
           (size_t)width * sizeof(float));
}

}  // namespace

const Kernel gather_kernels[] = {
    {"embedding.f32", "ids weight out", "vocab width", "", check_embedding, no_scratch, embedding_units, run_embedding<false>},
    {"embedding.bf16", "ids weight out", "vocab width", "", check_embedding, no_scratch, embedding_units, run_embedding<true>},
    {"lookup.f32", "ids weight out", "vocab width", "", check_embedding, no_scratch, embedding_units, run_embedding<false, int64_t>},
    {"lookup.bf16", "ids weight out", "vocab width", "", check_embedding, no_scratch, embedding_units, run_embedding<true, int64_t>},
    {"embedding.i8", "ids weight out", "vocab width group", "", check_int_embedding, no_scratch, embedding_units, run_int_embedding<Int8>},
    {"embedding.i4", "ids weight out", "vocab width group", "", check_int_embedding, no_scratch, embedding_units, run_int_embedding<Int4>},
    {"lookup.i8", "ids weight out", "vocab width group", "", check_int_embedding, no_scratch, embedding_units, run_int_embedding<Int8, int64_t>},
    {"lookup.i4", "ids weight out", "vocab width group", "", check_int_embedding, no_scratch, embedding_units, run_int_embedding<Int4, int64_t>},
    {"rows.f32", "index table out", "width", "", check_rows, no_scratch, rows_units, run_rows},
    {},
};

}  // namespace XK_LEVEL
