#include "runner.h"

#include <string.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "levels.h"
#include "sampling.h"

namespace xk {
namespace {

std::vector<std::string> words(const char *text) {
  std::istringstream in(text);
  return {std::istream_iterator<std::string>(in), {}};
}

uint8_t *aligned(uint8_t *p) { return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63}); }

Bound bind(const Level &level, const xk_call &c, int index) {
  const std::string where = "call " + std::to_string(index) + ", kernel " + (c.kernel ? c.kernel : "(null)");
  const auto fail = [&](const std::string &what) { throw std::invalid_argument(where + ": " + what); };
  const Kernel *kernel = nullptr;
  for (int i = 0; i < level.count; i++)
    if (c.kernel && strcmp(level.kernels[i].name, c.kernel) == 0) kernel = &level.kernels[i];
  if (!kernel) fail("no such kernel");
  Bound bound{};
  memcpy(bound.call.args, c.args, sizeof c.args);
  memcpy(bound.call.ints, c.ints, sizeof c.ints);
  memcpy(bound.call.floats, c.floats, sizeof c.floats);
  memcpy(bound.call.row_terms, c.rows, sizeof c.rows);
  for (int64_t term : c.rows)
    if (term < 0 || term > INT32_MAX) fail("rows must not be negative, nor beyond 31 bits");
  bound.kernel = kernel;
  const std::vector<std::string> names = words(kernel->args);
  for (size_t i = 0; i < names.size(); i++) {
    const xk_arg &a = c.args[i];
    if (a.kind < XK_NONE || a.kind > XK_LAST) fail("argument " + names[i] + " is of no known kind");
    if (a.kind == XK_NONE && names[i].back() != '?') fail("argument " + names[i] + " must not be none");
    if (a.kind == XK_ADDRESS && a.address == nullptr) fail("argument " + names[i] + " is a null address");
    if (a.kind == XK_ADDRESS && reinterpret_cast<uintptr_t>(a.address) % 4) fail("argument " + names[i] + " is not aligned to 4 bytes");
    if (a.kind == XK_LAST && !bound.call.every_logit_row()) fail("argument " + names[i] + " is `last`, which has S rows, the call has others");
    if ((a.kind == XK_IDS || a.kind == XK_POSITIONS) && !bound.call.every_token())
      fail("argument " + names[i] + " has T rows, the call has others");
  }
  if (const char *wrong = kernel->check(bound.call)) fail(wrong);
  return bound;
}

struct Walk {
  const Bound *stages;
  const Step *step;
  uint8_t **scratch;
  int64_t *opened;  // [stages], nanoseconds; null where nobody asked
};

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t units(void *context, int stage) {
  const Walk *w = static_cast<Walk *>(context);
  const Bound &b = w->stages[stage];
  return b.call.rows(*w->step) > 0 ? b.kernel->units(b.call, *w->step) : 0;
}

// The pool asks for a stage's units when all earlier stages are complete: one stage's opening is the end of the one before.
int64_t timed_units(void *context, int stage) {
  static_cast<Walk *>(context)->opened[stage] = now();
  return units(context, stage);
}

void work(void *context, int stage, int64_t unit, int thread) {
  const Walk *w = static_cast<Walk *>(context);
  const Bound &b = w->stages[stage];
  b.kernel->run(b.call, *w->step, unit, w->scratch[thread]);
}

}  // namespace
}  // namespace xk

using namespace xk;

int32_t xk_runner::add(int32_t count, const xk_call *calls) {
  auto plan = std::make_unique<Plan>();
  int64_t bytes = 0;
  for (int32_t i = 0; i < count; i++) {
    const Bound bound = bind(level, calls[i], i);
    if (strncmp(bound.kernel->name, "embedding.", 10) == 0 && bound.call.args[0].kind == XK_IDS)
      plan->vocab = plan->vocab ? std::min(plan->vocab, bound.call.ints[0]) : bound.call.ints[0];
    plan->first.push_back(static_cast<int32_t>(plan->stages.size()));
    for (const Kernel *stage = bound.kernel; stage; stage = stage->next) {
      bytes = std::max(bytes, stage->scratch(bound.call));
      plan->stages.push_back({bound.call, stage});
    }
  }
  plan->first.push_back(static_cast<int32_t>(plan->stages.size()));
  std::lock_guard<std::mutex> lock(mutex);
  reserve(bytes);
  plans.push_back(std::move(plan));
  return static_cast<int32_t>(plans.size()) - 1;
}

void xk_runner::reserve(int64_t bytes) {
  if (bytes <= scratch_bytes) return;
  for (auto &s : scratch) s.reset(new uint8_t[static_cast<size_t>(bytes) + 64]);
  scratch_bytes = bytes;  // not before all have it: one may be refused
}

void xk_runner::prepare(const Plan &plan, const xk_batch &b) {
  const auto fail = [](const std::string &what) { throw std::invalid_argument("batch: " + what); };
  if (b.T < 0 || b.S < 0 || b.N < 0) fail("T, S and N must not be negative");
  if (!b.seq_start || (b.T && (!b.ids || !b.positions)) || (b.S && !b.last) || (b.N && !b.seq_kv)) fail("an array is missing");
  if (b.seq_start[0] != 0 || b.seq_start[b.N] != b.T) fail("seq_start must begin at 0 and end at T");
  ids.resize(static_cast<size_t>(b.T));
  tile_seq.clear(), tile_row.clear(), tile_rows.clear();
  for (int32_t i = 0; i < b.T; i++) {
    int32_t id = b.ids[i];
    if (id < 0) {
      if (!b.prev_tokens) fail("ids[" + std::to_string(i) + "] refers to prev_tokens, which is none");
      // A poisoned row sampled no token; whatever follows it is thrown away by the engine, so any valid id will do.
      id = std::max(b.prev_tokens[-1 - id], 0);
    }
    if (plan.vocab && id >= plan.vocab) fail("ids[" + std::to_string(i) + "] = " + std::to_string(id) + " is outside the vocabulary");
    ids[static_cast<size_t>(i)] = id;
  }
  for (int32_t i = 0; i < b.S; i++)
    if (b.last[i] < 0 || b.last[i] >= b.T) fail("last[" + std::to_string(i) + "] is not a row of the step");
  for (int32_t n = 0; n < b.N; n++) {
    const int32_t begin = b.seq_start[n], end = b.seq_start[n + 1];
    if (end < begin || end > b.T) fail("seq_start must not decrease");
    if (end > begin && (!b.seq_kv[n] || reinterpret_cast<uintptr_t>(b.seq_kv[n]) % 64))
      fail("seq_kv[" + std::to_string(n) + "] is null or not aligned to 64 bytes");
    for (int32_t row = begin; row < end; row++)
      if (b.positions[row] < 0 || b.positions[row] != b.positions[begin] + row - begin)
        fail("positions of sequence " + std::to_string(n) + " must be consecutive and not negative");
    for (int32_t row = begin; row < end; row += kQueryTile) {
      tile_seq.push_back(n);
      tile_row.push_back(row);
      tile_rows.push_back(std::min<int32_t>(kQueryTile, end - row));
    }
  }
  step.batch = b;
  step.input[XK_NONE] = step.input[XK_ADDRESS] = nullptr;
  step.input[XK_IDS] = ids.data();
  step.input[XK_POSITIONS] = b.positions;
  step.input[XK_LAST] = b.last;
  step.tiles = static_cast<int64_t>(tile_seq.size());
  step.tile_seq = tile_seq.data();
  step.tile_row = tile_row.data();
  step.tile_rows = tile_rows.data();
}

int32_t xk_runner::run(int32_t index, const xk_batch &batch, int32_t begin, int32_t end, double *seconds,
                       xk_draw *draw) {
  std::lock_guard<std::mutex> lock(mutex);
  if (index < 0 || index >= static_cast<int32_t>(plans.size())) throw std::invalid_argument("no such plan: " + std::to_string(index));
  const Plan &plan = *plans[static_cast<size_t>(index)];
  const int32_t count = static_cast<int32_t>(plan.first.size()) - 1;
  if (end < 0) end = count;
  if (begin < 0 || begin > end || end > count) throw std::invalid_argument("begin and end must be a range of the plan's calls");
  prepare(plan, batch);
  uint8_t *per_thread[256];
  for (size_t i = 0; i < scratch.size(); i++) per_thread[i] = scratch_bytes ? aligned(scratch[i].get()) : nullptr;
  const int32_t *first = plan.first.data();
  std::vector<int64_t> opened(seconds ? plan.stages.size() + 1 : 0);
  Walk walk{plan.stages.data(), &step, per_thread, opened.data()};
  pool.run(first[begin], first[end], seconds ? timed_units : units, work, &walk);
  if (seconds) opened[static_cast<size_t>(first[end])] = now();
  for (int32_t i = begin; seconds && i < end; i++)
    seconds[i - begin] = 1e-9 * static_cast<double>(opened[static_cast<size_t>(first[i + 1])] - opened[static_cast<size_t>(first[i])]);
  return draw ? xk_sampler_sample(&pool, draw) : XK_SAMPLED;
}
