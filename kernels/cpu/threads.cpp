#include "threads.h"

#include <chrono>

namespace xk {
namespace {

// Long enough to bridge the gap between two calls of a step, short enough to leave the core to the host between steps.
constexpr std::chrono::microseconds kSpin{60};
constexpr uint64_t kRemaining = 0xffffffffu;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct OneStage {
  int64_t units;
  Pool::Body body;
  void *context;
};

}  // namespace

Pool::Pool(int threads) : stretches_(new Stretch[static_cast<size_t>(threads)]) {
  try {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { worker(i); });
  } catch (...) {
    join();  // the system refused a thread: a vector of running ones must not be destroyed
    throw;
  }
}

Pool::~Pool() { join(); }

void Pool::join() {
  stop_ = true;
  publish(0);
  for (std::thread &t : workers_) t.join();
  workers_.clear();
}

void Pool::run(int begin, int end, Units units, Work work, void *context) {
  std::lock_guard<std::mutex> lock(run_mutex_);
  stage_ = begin - 1;
  end_ = end;
  units_ = units;
  work_ = work;
  context_ = context;
  finished_.store(false, std::memory_order_relaxed);
  advance(0);
  while (!finished_.load(std::memory_order_acquire)) {
    const uint64_t seen = ticket_.load();
    if (!work_once(0)) wait_change(seen, true);
  }
}

void Pool::run(int64_t units, Body body, void *context) {
  OneStage stage{units, body, context};
  run(
      0, 1, [](void *c, int) { return static_cast<OneStage *>(c)->units; },
      [](void *c, int, int64_t unit, int thread) {
        const OneStage *s = static_cast<OneStage *>(c);
        s->body(s->context, unit, thread);
      },
      &stage);
}

void Pool::worker(int thread) {
  while (!stop_.load(std::memory_order_relaxed)) {
    const uint64_t seen = ticket_.load();
    if (!work_once(thread) && !stop_.load()) wait_change(seen, false);
  }
}

// Claims and runs units until none is left to claim; false when there was none at all.
bool Pool::work_once(int thread) {
  bool any = false;
  uint64_t seen = ticket_.load(std::memory_order_acquire);
  while ((seen & kRemaining) != 0) {
    if (!ticket_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    any = true;
    const int64_t units = stage_units_;
    work_(context_, stage_, claimed(thread), thread);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == units) advance(thread);
    seen = ticket_.load(std::memory_order_acquire);
  }
  return any;
}

// The unit of a claim. There are as many claims as units, so somebody's stretch has one left for it.
int64_t Pool::claimed(int thread) {
  for (int i = thread;; i = i + 1 < size() ? i + 1 : 0) {
    Stretch &from = stretches_[static_cast<size_t>(i)];
    if (from.next.load(std::memory_order_relaxed) >= from.end) continue;
    const int64_t unit = from.next.fetch_add(1, std::memory_order_relaxed);
    if (unit < from.end) return unit;
  }
}

// Only the thread that completed a stage comes here. Stages of a single unit are run on the spot: no other thread is told.
void Pool::advance(int thread) {
  while (++stage_ < end_) {
    const int64_t units = units_(context_, stage_);
    if (units == 1 || (units > 0 && workers_.empty())) {
      for (int64_t unit = 0; unit < units; unit++) work_(context_, stage_, unit, thread);
    } else if (units > 1) {
      stage_units_ = units;
      for (int i = 0; i < size(); i++) {
        stretches_[static_cast<size_t>(i)].next.store(units * i / size(), std::memory_order_relaxed);
        stretches_[static_cast<size_t>(i)].end = units * (i + 1) / size();
      }
      done_.store(0, std::memory_order_relaxed);
      publish(static_cast<uint64_t>(units));
      return;
    }
  }
  // The last word: the caller may open the next run as soon as it has seen it, and the ticket is that run's then.
  finished_.store(true);
  wake();
}

void Pool::publish(uint64_t remaining) {
  const uint64_t sequence = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(sequence << 32 | remaining);
  wake();
}

void Pool::wake() {
  if (sleepers_.load() > 0) {
    { std::lock_guard<std::mutex> lock(sleep_mutex_); }
    wake_.notify_all();
  }
}

// Until another stage is open; of the caller of a run, also until that is finished.
void Pool::wait_change(uint64_t seen, bool caller) {
  const uint64_t sequence = seen >> 32;
  const auto over = [&] { return ticket_.load() >> 32 != sequence || (caller && finished_.load()); };
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; i++) {
      if (over()) return;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < until);
  std::unique_lock<std::mutex> lock(sleep_mutex_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, [&] { return over() || stop_.load(); });
  sleepers_.fetch_sub(1);
}

}  // namespace xk
