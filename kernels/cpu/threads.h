// The thread pool: runs a sequence of stages, each a number of independent units. Threads claim units one by one; whoever
// finishes the last unit of a stage opens the next, so a thread that the system has put aside delays nobody. Each takes the
// units of a stretch of its own first, so that what it reads is consecutive, and then what others have left.
#pragma once
#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace xk {

class Pool {
 public:
  explicit Pool(int threads);  // the caller of run() is one of them
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  using Units = int64_t (*)(void *context, int stage);
  using Work = void (*)(void *context, int stage, int64_t unit, int thread);
  // Stages begin..end-1 in order; units(stage) is asked once all earlier stages are complete. `thread` is 0..size()-1.
  // Calls from several threads are served one after the other.
  void run(int begin, int end, Units units, Work work, void *context);

  // One stage: body(context, unit, thread) for every unit in 0..units-1.
  using Body = void (*)(void *context, int64_t unit, int thread);
  void run(int64_t units, Body body, void *context);

 private:
  void join();
  void worker(int thread);
  bool work_once(int thread);
  int64_t claimed(int thread);
  void advance(int thread);
  void publish(uint64_t remaining);
  void wake();
  void wait_change(uint64_t seen, bool caller);

  // (sequence number << 32) | units not yet claimed: one word, so that a claim can never fall into a later stage.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> finished_{true};
  std::atomic<bool> stop_{false};
  std::atomic<int> sleepers_{0};
  // Written by the opener of a stage before the ticket; read only by holders of a claim, which keeps the stage open.
  int64_t stage_units_ = 0;
  int stage_ = 0, end_ = 0;
  Units units_ = nullptr;
  Work work_ = nullptr;
  void *context_ = nullptr;

  struct alignas(64) Stretch {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::unique_ptr<Stretch[]> stretches_;  // of each thread

  std::mutex run_mutex_, sleep_mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace xk
