// A runner: a thread pool, a level, and plans whose calls are already bound. One xk_run is one step or a part of it.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace xk {

struct Bound {
  Call call;
  const Kernel *kernel;
};

class Plan {
 public:
  std::vector<Bound> stages;   // of all calls, in order
  std::vector<int32_t> first;  // call -> its first stage; one more entry ends the list
  int64_t vocab = 0;  // smallest table that the step's ids index, 0 if none does
};

}  // namespace xk

struct xk_runner {
  xk_runner(int threads, const xk::Level &level) : level(level), pool(threads), scratch(static_cast<size_t>(pool.size())) {}

  const xk::Level &level;
  xk::Pool pool;
  int32_t add(int32_t count, const xk_call *calls);  // throws std::invalid_argument
  // seconds: of each call, or null; draw: from the rows that these leave, or null. How the draw was refused, or 0.
  int32_t run(int32_t plan, const xk_batch &batch, int32_t begin, int32_t end, double *seconds, xk_draw *draw);

 private:
  void prepare(const xk::Plan &plan, const xk_batch &batch);  // checks the batch, resolves ids, cuts query tiles
  void reserve(int64_t bytes);

  std::mutex mutex;  // one step at a time
  std::vector<std::unique_ptr<xk::Plan>> plans;
  std::vector<std::unique_ptr<uint8_t[]>> scratch;  // one per thread, 64-byte aligned inside
  int64_t scratch_bytes = 0;
  xk::Step step{};
  std::vector<int32_t> ids, tile_seq, tile_row, tile_rows;
};
