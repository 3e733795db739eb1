// Work of unequal size over torch's threads: each thread takes the next task when it is done with the last. Which thread does a task must not
// change its result.
#pragma once
#include <ATen/Parallel.h>

#include <atomic>

namespace mswift {

/// `work(worker, next)` once on each thread; `next()` gives the number of a task, or -1 when all `count` are taken.
template <class Work>
void run_tasks(int64_t count, const Work& work) {
  std::atomic<int64_t> taken{0};
  const auto next = [&]() -> int64_t {
    const int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
    return task < count ? task : -1;
  };
  const int64_t workers = std::min<int64_t>(count, at::in_parallel_region() ? 1 : at::get_num_threads());
  if (workers <= 1) {
    if (count > 0) work(next);
    return;
  }
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) work(next);
  });
}

}  // namespace mswift
