// A barrier for the threads of one parallel_for, all of which run at the same time.
#pragma once

#include <atomic>
#include <thread>

namespace wsis::cpu {

// Spins for some microseconds, then lets others run: where there are fewer cores than threads,
// the one that is waited for needs the core.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    if (threads_ == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
      if (spins >= kSpins) std::this_thread::yield();
  }

 private:
  static constexpr int kSpins = 2000;
  const int threads_;
  std::atomic<int> arrived_{0}, round_{0};
};

}  // namespace wsis::cpu
