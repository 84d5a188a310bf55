// Random walks on CUDA: launchers (formulas: kernels/random_walk.h). A thread owns a pixel of one or
// four maps and gathers, so nothing is added by two threads, and results are the same at every call.
// A product with T is one launch, of 98 for 256 steps: at the sizes of walks all that it reads stays
// in the second-level cache, and a step waits for latency, not for bytes. Nothing is allocated or
// waited for on the host, so a walk may be captured in a graph.
#pragma once

#include "cpu/random_walk.h"

namespace wsis::cuda {

using cpu::Walk;

struct WalkQueue {
  int device;
  uintptr_t stream;
};

// 1 + products launches, and one more if transposed.
template <class T>
void random_walk(const T* maps,      // [B, C, H, W]
                 const T* affinity,  // [B, K, H, W]
                 const Walk& walk, const WalkQueue& queue,
                 T* powers,   // [B, K, H, W], scratch
                 T* inverse,  // [B, H, W], scratch
                 T* buffers,  // [2, B, C, H, W], scratch
                 T* result);  // [B, C, H, W]

}  // namespace wsis::cuda
