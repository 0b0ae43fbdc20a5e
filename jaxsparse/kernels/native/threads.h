// Loops over XLA's threads.

#ifndef JAXSPARSE_THREADS_H_
#define JAXSPARSE_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jaxsparse {

// Calls f(i) for each i < count, on the caller's thread and on others that are free.
//
// The caller waits only for calls that have begun: all threads of the pool may wait here at
// once, with tasks of each other behind them in the queue. A task that comes too late finds
// nothing left and looks at nothing but `Work`.
template <class F>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t count, const F& f) {
  const int64_t threads = std::min(pool.num_threads(), count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  struct Work {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto work = std::make_shared<Work>();
  const auto run = [work, count, &f] {
    int64_t mine = 0;
    for (int64_t i; (i = work->next.fetch_add(1)) < count; ++mine) f(i);
    if (mine > 0 && work->done.fetch_add(mine) + mine == count) {
      std::lock_guard<std::mutex> lock(work->mutex);
      work->all_done.notify_all();
    }
  };
  for (int64_t t = 1; t < threads; ++t) {
    auto task = run;
    pool.Schedule(std::move(task));
  }
  run();
  // What others have begun ends soon: sleeping takes longer than most of it.
  for (int spin = 0; spin < 4000 && work->done.load() < count; ++spin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all_done.wait(lock, [&] { return work->done.load() == count; });
}

}  // namespace jaxsparse

#endif  // JAXSPARSE_THREADS_H_
