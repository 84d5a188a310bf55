// The CUDA runtime and device language on the host, as far as the sources in csrc/cuda need them,
// so that the very same .cu files run where there is no GPU. Included in place of <cuda_runtime.h>.
//
// Blocks run one after another; the threads of a block run
//   * as fibers (default): one at a time, switched at barriers, in an order shuffled by the
//     environment variable WSIS_EMULATOR_SEED (0: in order). A barrier that can no longer be
//     reached by all raises "barrier divergence";
//   * as real threads (-DWSIS_EMULATOR_THREADS): for the address and thread sanitizers.
// With -DWSIS_EMULATOR_COUNT (fibers) launches are reported to counter.cpp, which counts them and
// the bytes of global memory they touch.
// Shared memory starts as garbage. Not emulated: streams, errors, textures, cooperative groups.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(WSIS_EMULATOR_THREADS)
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned count() const { return x * y * z; }
};

namespace wsis_emulator {

constexpr unsigned kWarp = 32;

// Threads that wait for each other: all of a block, or the lanes of a warp named by a mask.
struct Barrier {
  unsigned expected = 0;
  unsigned arrived = 0;
  std::vector<unsigned> waiting;  // fibers
  uint64_t round = 0;             // threads
};

struct Warp {
  std::map<unsigned, Barrier> barriers;  // by mask
  uint64_t slots[kWarp] = {};            // what the lanes exchange
};

// A block that runs.
struct Block {
  dim3 grid, index, size;
  unsigned char* shared = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
};

// The thread that runs.
struct Context {
  Block* block = nullptr;
  dim3 thread;
  unsigned rank = 0;
};
inline thread_local Context current;

inline dim3 unravel(unsigned rank, dim3 size) {
  return {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
}

inline void fill_with_garbage(std::unique_ptr<unsigned char[]>& memory, size_t bytes) {
  std::fill_n(memory.get(), bytes, 0xA5);
}

// ---- reports to counter.cpp
// ---------------------------------------------------------------------------

#if defined(WSIS_EMULATOR_COUNT)
extern "C" void wsis_count_launch(const char* kernel, const unsigned* sizes);
extern "C" void wsis_count_landing();
extern "C" void wsis_count_write(const void* address, size_t bytes);

// A launch, while it lives.
struct Report {
  Report(const char* name, dim3 grid, dim3 block, size_t shared_bytes) {
    const unsigned sizes[] = {grid.x,  grid.y,  grid.z, block.x,
                              block.y, block.z, static_cast<unsigned>(shared_bytes)};
    wsis_count_launch(name, sizes);
  }
  ~Report() { wsis_count_landing(); }
};
#else
struct Report {
  Report(const char*, dim3, dim3, size_t) {}
  ~Report() {}
};
inline void wsis_count_write(const void*, size_t) {}
#endif

// ---- engines: wait(barrier), finish_thread(), run_grid()
// -----------------------------------------

#if defined(WSIS_EMULATOR_THREADS)

struct Engine {
  std::mutex mutex;
  std::condition_variable changed;

  void release(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.round;
    changed.notify_all();
  }
  void wait(Barrier& barrier) {
    std::unique_lock<std::mutex> lock(mutex);
    const uint64_t round = barrier.round;
    if (++barrier.arrived == barrier.expected) return release(barrier);
    changed.wait(lock, [&] { return barrier.round != round; });
  }
};
inline Engine engine;

// One set of threads walks over all blocks together.
inline void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  const unsigned threads = size.count();
  std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes]);
  Block block;
  Barrier step;
  step.expected = threads;
  const auto walk = [&](unsigned rank) {
    current = {&block, unravel(rank, size), rank};
    for (unsigned b = 0; b < grid.count(); ++b) {
      engine.wait(step);
      if (rank == 0) {
        fill_with_garbage(shared, shared_bytes);
        block = Block{grid, unravel(b, grid), size, shared.get(), {}, {}};
        block.barrier.expected = threads;
        block.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
      }
      engine.wait(step);
      body();
    }
  };
  std::vector<std::thread> pool;
  for (unsigned rank = 0; rank < threads; ++rank) pool.emplace_back(walk, rank);
  for (std::thread& thread : pool) thread.join();
}

#else

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool ready = true, done = false;
};

struct Engine {
  std::vector<std::unique_ptr<Fiber> > fibers;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;

  void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.expected) {
      for (unsigned rank : barrier.waiting) fibers[rank]->ready = true;
      barrier.waiting.clear();
      barrier.arrived = 0;
      return;
    }
    Fiber& self = *fibers[current.rank];
    self.ready = false;
    barrier.waiting.push_back(current.rank);
    swapcontext(&self.context, &scheduler);
  }
};
inline Engine engine;

inline void fiber_main() {
  Fiber& self = *engine.fibers[current.rank];
  (*engine.body)();
  self.done = true;
  swapcontext(&self.context, &engine.scheduler);
}

inline void run_block(Block& block, std::mt19937& random, bool shuffled) {
  const unsigned threads = block.size.count();
  while (engine.fibers.size() < threads) engine.fibers.push_back(std::make_unique<Fiber>());
  for (unsigned rank = 0; rank < threads; ++rank) {
    Fiber& fiber = *engine.fibers[rank];
    fiber.ready = true;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned done = 0; done < threads;) {
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (unsigned rank : order) {
      Fiber& fiber = *engine.fibers[rank];
      if (!fiber.ready || fiber.done) continue;
      moved = true;
      current = {&block, unravel(rank, block.size), rank};
      swapcontext(&engine.scheduler, &fiber.context);
      done += fiber.done;
    }
    if (!moved)
      throw std::runtime_error("barrier divergence: " + std::to_string(threads - done) +
                               " threads wait, " + std::to_string(done) + "/" +
                               std::to_string(threads) + " have left");
  }
}

inline void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  const char* text = std::getenv("WSIS_EMULATOR_SEED");
  const unsigned seed = text ? static_cast<unsigned>(std::atoi(text)) : 0;
  std::mt19937 random(seed);
  std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes]);
  engine.body = &body;
  for (unsigned b = 0; b < grid.count(); ++b) {
    fill_with_garbage(shared, shared_bytes);
    Block block{grid, unravel(b, grid), size, shared.get(), {}, {}};
    block.barrier.expected = size.count();
    block.warps = std::vector<Warp>((size.count() + kWarp - 1) / kWarp);
    run_block(block, random, seed != 0);
  }
}

#endif

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            Args... args) {
  // What a GPU refuses.
  const size_t parameters = (size_t{0} + ... + sizeof(Params));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || block.count() == 0 || block.count() > 1024 || shared_bytes > 48 * 1024 ||
      parameters > 4096)
    throw std::runtime_error(std::string("a GPU refuses this launch of ") + name);
  const Report report(name, grid, block, shared_bytes);
  run_grid(grid, block, shared_bytes, [=] { kernel(args...); });
}

// ---- warps
// ---------------------------------------------------------------------------------------

inline unsigned lane() { return current.rank % kWarp; }

inline unsigned lanes_of_warp() {
  const unsigned first = current.rank / kWarp * kWarp;
  const unsigned count = std::min(kWarp, current.block->size.count() - first);
  return count == kWarp ? ~0u : (1u << count) - 1;
}

inline Warp& warp() { return current.block->warps[current.rank / kWarp]; }

inline void sync_warp(unsigned mask) {
#if defined(WSIS_EMULATOR_THREADS)
  std::unique_lock<std::mutex> lock(engine.mutex);
#endif
  Barrier& barrier = warp().barriers[mask];
  barrier.expected = __builtin_popcount(mask & lanes_of_warp());
#if defined(WSIS_EMULATOR_THREADS)
  lock.unlock();
#endif
  engine.wait(barrier);
}

// Everybody writes, everybody reads, nobody overtakes.
template <class T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  std::memcpy(&warp().slots[lane()], &value, sizeof(T));
  sync_warp(mask);
  T result;
  std::memcpy(&result, &warp().slots[source < kWarp ? source : lane()], sizeof(T));
  sync_warp(mask);
  return result;
}

// The votes of all lanes of the mask, in two waits as in exchange().
inline unsigned ballot(unsigned mask, bool vote) {
  warp().slots[lane()] = vote;
  sync_warp(mask);
  unsigned votes = 0;
  for (unsigned source = 0; source < kWarp; ++source)
    if (mask & lanes_of_warp() & (1u << source))
      votes |= static_cast<unsigned>(warp().slots[source] != 0) << source;
  sync_warp(mask);
  return votes;
}

template <class T>
T atomic_update(T* address, const std::function<T(T)>& change) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = change(old);
  } while (
      !__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace wsis_emulator

#define WSIS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                       \
   wsis_emulator::launch(#kernel, (kernel), (grid), (block), (shared_bytes), __VA_ARGS__))
#define WSIS_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(wsis_emulator::current.block->shared)

#define threadIdx (wsis_emulator::current.thread)
#define blockIdx (wsis_emulator::current.block->index)
#define blockDim (wsis_emulator::current.block->size)
#define gridDim (wsis_emulator::current.block->grid)
#define warpSize 32

inline void __syncthreads() { wsis_emulator::engine.wait(wsis_emulator::current.block->barrier); }
inline void __syncwarp(unsigned mask = ~0u) { wsis_emulator::sync_warp(mask); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return wsis_emulator::exchange(mask, value, static_cast<unsigned>(source) % 32);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return wsis_emulator::exchange(mask, value, wsis_emulator::lane() + delta);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return wsis_emulator::exchange(mask, value, wsis_emulator::lane() - delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return wsis_emulator::exchange(mask, value, wsis_emulator::lane() ^ lanes);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return wsis_emulator::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == (mask & wsis_emulator::lanes_of_warp());
}

template <class T>
T atomicAdd(T* address, T value) {
  return wsis_emulator::atomic_update<T>(address, [=](T old) { return old + value; });
}
template <class T>
T atomicMax(T* address, T value) {
  return wsis_emulator::atomic_update<T>(address, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* address, T value) {
  return wsis_emulator::atomic_update<T>(address, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicExch(T* address, T value) {
  return wsis_emulator::atomic_update<T>(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T compare, T value) {
  return wsis_emulator::atomic_update<T>(address,
                                         [=](T old) { return old == compare ? value : old; });
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
using std::max;
using std::min;

#include "cuda_types.h"
