// Reductions over a block.
#pragma once

#include "cuda/launch.h"
#include "kernels/normalize.h"

namespace wsis::cuda {

constexpr int kWarp = 32;

template <class T>
__device__ T from_lane(T value, int lanes) {
  return __shfl_xor_sync(~0u, value, lanes);
}

template <class T>
__device__ kernels::Extrema<T> from_lane(kernels::Extrema<T> value, int lanes) {
  return {from_lane(value.low, lanes), from_lane(value.high, lanes)};
}

// Joins the values of all threads of a block of kThreads (whole warps), in an order that is always
// the same; every thread gets the result. V comes with `from_lane`, the value of the lane at a
// distance, and `join`. `slots` [kThreads / 32] is shared; one use per launch.
template <int kThreads, class V>
__device__ V join_block(V value, V* slots) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = join(value, from_lane(value, lanes));
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = value;
  __syncthreads();
  V all = slots[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) all = join(all, slots[warp]);
  return all;
}

}  // namespace wsis::cuda
