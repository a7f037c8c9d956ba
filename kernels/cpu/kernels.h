// What a kernel is: a signature, a way to cut one call into independent units of work, and the code of one unit. Units never
// share a sum, so any thread may run any unit in any order and the bits stay the same.
#pragma once
#include <stdint.h>

#include "xk.h"

namespace xk {

constexpr int64_t kGroup = 16;      // tokens of one KV group and lanes of one panel
constexpr int64_t kQueryTile = 48;  // most query tokens of one attention unit

struct Step {  // one step with its inputs resolved: what every kernel reads
  xk_batch batch;
  const void *input[5];      // by XK_IDS, XK_POSITIONS, XK_LAST
  int64_t tiles;             // query tiles: at most kQueryTile consecutive rows of one sequence
  const int32_t *tile_seq;   // [tiles] sequence of the tile
  const int32_t *tile_row;   // [tiles] its first row
  const int32_t *tile_rows;  // [tiles] its rows
};

struct Call {  // prebound
  xk_arg args[XK_MAX_ARGS];
  int64_t ints[XK_MAX_INTS];
  float floats[XK_MAX_FLOATS];
  int64_t row_terms[3];  // per token, per logit row, constant

  int64_t rows(const Step &step) const { return row_terms[0] * step.batch.T + row_terms[1] * step.batch.S + row_terms[2]; }
  bool every_token() const { return row_terms[0] == 1 && row_terms[1] == 0 && row_terms[2] == 0; }
  bool every_logit_row() const { return row_terms[0] == 0 && row_terms[1] == 1 && row_terms[2] == 0; }
  template <class E>
  E *arg(int index, const Step &step) const {
    const xk_arg &a = args[index];
    return static_cast<E *>(a.kind == XK_ADDRESS ? a.address : const_cast<void *>(step.input[a.kind]));
  }
};

struct Kernel {
  const char *name;    // "<operation>.<element type>"
  const char *args;    // names in order, separated by spaces; a trailing "?" marks an optional one
  const char *ints;
  const char *floats;
  const char *(*check)(const Call &);                 // null when the ints are sound, else what is wrong
  int64_t (*scratch)(const Call &);                   // bytes of scratch a thread needs, whatever the step
  int64_t (*units)(const Call &, const Step &);       // 0 when there is nothing to do
  void (*run)(const Call &, const Step &, int64_t unit, uint8_t *scratch);
  const Kernel *next = nullptr;  // a further stage of the same call, begun when every unit of this one is done
};

struct Level {  // all kernels compiled for one instruction set
  const char *name;
  const Kernel *kernels;
  int count;
  float (*read)(const uint8_t *data, int64_t bytes);  // touches every byte; for measuring
  float (*fma)(int64_t rounds, int64_t *operations);  // nothing but multiply-add; for measuring
  void (*checksum)(const uint8_t *data, int64_t bytes, uint32_t *out);  // out: [64], the same at every level
};

// Not of a level, but of a core: whether it reads a stream of weights faster where lines are asked for ahead of need, by hand.
extern const bool asks_ahead;

}  // namespace xk
