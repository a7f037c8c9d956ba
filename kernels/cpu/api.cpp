// The C interface over runner, levels and probes: exceptions end here and become messages.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "levels.h"
#include "runner.h"
#include "threads.h"

namespace {

thread_local std::string last_error;

template <class R, class F>
R guarded(R failed, F body) {
  try {
    return body();
  } catch (const std::exception &e) {
    last_error = e.what();
    return failed;
  }
}

double seconds_of(xk::Pool &pool, int64_t units, xk::Pool::Body body, void *context, int repeats) {
  double best = 1e30;
  for (int i = 0; i < repeats; i++) {
    const auto begin = std::chrono::steady_clock::now();
    pool.run(units, body, context);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

constexpr int64_t kChecked = 1 << 20;  // bytes of a block that has a checksum of its own
volatile float sink;  // keeps the probes' results alive

}  // namespace

const char *xk_error() { return last_error.c_str(); }

const char *xk_levels() {
  static const std::string text = [] {
    std::string all;
    for (const xk::Level *level : xk::levels()) all += (all.empty() ? "" : " ") + std::string(level->name);
    return all;
  }();
  return text.c_str();
}

const char *xk_describe() {
  static const std::string text = [] {
    std::string all;
    if (xk::levels().empty()) return all;
    const xk::Level &level = *xk::levels().front();
    for (int i = 0; i < level.count; i++) {
      const xk::Kernel &k = level.kernels[i];
      all += std::string(k.name) + "|" + k.args + "|" + k.ints + "|" + k.floats + "\n";
    }
    return all;
  }();
  return text.c_str();
}

xk_runner *xk_runner_new(int32_t threads, const char *name) {
  return guarded<xk_runner *>(nullptr, [&] {
    const xk::Level *level = xk::find_level(name);
    if (!level) throw std::invalid_argument(std::string("level ") + name + " does not run here; runnable: " + xk_levels());
    if (threads < 1 || threads > 256) throw std::invalid_argument("threads must be 1 to 256");
    return new xk_runner(threads, *level);
  });
}

void xk_runner_free(xk_runner *runner) { delete runner; }

void *xk_runner_pool(xk_runner *runner) { return &runner->pool; }

int32_t xk_plan_add(xk_runner *runner, int32_t calls, const xk_call *call) {
  return guarded<int32_t>(-1, [&] { return runner->add(calls, call); });
}

int32_t xk_run(xk_runner *runner, int32_t plan, const xk_batch *batch, int32_t begin, int32_t end, double *seconds,
               xk_draw *draw) {
  return guarded<int32_t>(-1, [&] { return runner->run(plan, *batch, begin, end, seconds, draw); });
}

double xk_measure_read(xk_runner *runner, int64_t bytes, int32_t repeats) {
  return guarded<double>(-1.0, [&] {
    struct Job {
      const xk::Level *level;
      const uint8_t *data;
      int64_t chunk;
    } job{&runner->level, nullptr, 1 << 20};
    const int64_t chunks = std::max<int64_t>(bytes / job.chunk, 1);
    const size_t page = size_t{2} << 20, size = (static_cast<size_t>(chunks * job.chunk) + page - 1) / page * page;
    const std::unique_ptr<uint8_t, void (*)(void *)> data(static_cast<uint8_t *>(aligned_alloc(page, size)), free);
    if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(data.get(), size, MADV_HUGEPAGE);  // small pages would be a lower limit than weights meet
#endif
    memset(data.get(), 1, size);
    job.data = data.get();
    const auto body = [](void *context, int64_t unit, int) {
      const Job *j = static_cast<Job *>(context);
      sink = j->level->read(j->data + unit * j->chunk, j->chunk);
    };
    return static_cast<double>(chunks * job.chunk) / seconds_of(runner->pool, chunks, body, &job, repeats);
  });
}

double xk_measure_fma(xk_runner *runner, int64_t rounds, int32_t repeats) {
  return guarded<double>(-1.0, [&] {
    struct Job {
      const xk::Level *level;
      int64_t rounds, operations;
    } job{&runner->level, rounds, 0};
    job.level->fma(1, &job.operations);
    const double each = static_cast<double>(job.operations) * static_cast<double>(rounds);
    const auto body = [](void *context, int64_t, int) {
      const Job *j = static_cast<Job *>(context);
      int64_t operations;
      sink = j->level->fma(j->rounds, &operations);
    };
    const int64_t units = 16 * runner->pool.size();
    return each * static_cast<double>(units) / seconds_of(runner->pool, units, body, &job, repeats);
  });
}

int32_t xk_checksum(const void *data, int64_t bytes, int32_t threads, uint32_t *out) {
  return guarded<int32_t>(-1, [&] {
    struct Job {
      const xk::Level *level;
      const uint8_t *data;
      int64_t bytes;
      uint32_t *out;
    };
    if (xk::levels().empty()) throw std::invalid_argument("no level of the kernels runs on this CPU");
    const int64_t blocks = (bytes + kChecked - 1) / kChecked;
    Job job{xk::levels().back(), static_cast<const uint8_t *>(data), bytes, out};
    xk::Pool pool(static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(blocks, 1))));
    const auto body = [](void *context, int64_t unit, int) {
      const Job *j = static_cast<Job *>(context);
      const int64_t at = unit * kChecked;
      j->level->checksum(j->data + at, std::min(kChecked, j->bytes - at), j->out + unit * 64);
    };
    pool.run(blocks, body, &job);
    return 0;
  });
}
