#include "cuda/confusion.h"
#include "cuda/launch.h"
#include "kernels/confusion.h"

namespace wsis::cuda {
namespace {

using kernels::kIgnored;
using kernels::kOutOfRange;
using Count = unsigned long long;  // the 64-bit integer that atomics know

constexpr int kThreads = 256;

__device__ int64_t load_class(ClassMap map, int64_t i) {
  switch (map.dtype) {
    case DType::kUint8:
      return static_cast<const uint8_t*>(map.data)[i];
    case DType::kInt16:
      return static_cast<const int16_t*>(map.data)[i];
    case DType::kInt32:
      return static_cast<const int32_t*>(map.data)[i];
    default:
      return static_cast<const int64_t*>(map.data)[i];
  }
}

__device__ void report_bad(Count* status, int64_t left) {
  atomicAdd(&status[0], Count{1});
  atomicMax(&status[1], static_cast<Count>(left));
}

// Counters of a block: in shared memory where they fit, else the global ones. 32 bits are enough
// for a block, which sees n / gridDim pixels.
template <bool kShared>
struct Counters {
  unsigned* local;  // [cells], shared; unused when !kShared
  Count* total;     // [cells], global
  int cells;

  __device__ void clear() const {
    if constexpr (kShared) {
      for (int i = threadIdx.x; i < cells; i += blockDim.x) local[i] = 0;
      __syncthreads();
    }
  }
  __device__ void add(int cell) const {
    if constexpr (kShared)
      atomicAdd(&local[cell], 1u);
    else
      atomicAdd(&total[cell], Count{1});
  }
  __device__ void flush() const {
    if constexpr (kShared) {
      __syncthreads();
      for (int i = threadIdx.x; i < cells; i += blockDim.x)
        if (local[i] != 0) atomicAdd(&total[i], Count{local[i]});
    }
  }
};

template <bool kShared>
__global__ void confusion_matrix_kernel(ClassMap pred, ClassMap target, int64_t n,
                                        int32_t num_classes, int64_t ignore_index, Count* tally) {
  WSIS_DYNAMIC_SHARED(unsigned, local);
  const int cells = num_classes * num_classes;
  const Counters<kShared> counters{local, tally, cells};
  counters.clear();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += stride) {
    const int32_t t = kernels::class_code(load_class(target, i), num_classes, ignore_index);
    if (t == kIgnored) continue;
    const int32_t p = kernels::class_code(load_class(pred, i), num_classes);
    if (t == kOutOfRange || p == kOutOfRange)
      report_bad(tally + cells, n - i);
    else
      counters.add(kernels::cell_index(t, p, num_classes));
  }
  counters.flush();
}

template <class T, bool kShared>
__global__ void threshold_histogram_kernel(const T* __restrict__ scores, ClassMap target,
                                           const T* __restrict__ thresholds, int64_t batch,
                                           int32_t num_channels, int64_t n, int32_t num_thresholds,
                                           int32_t num_classes, int64_t ignore_index,
                                           Count* histogram, Count* status) {
  WSIS_DYNAMIC_SHARED(unsigned, local);
  const Counters<kShared> counters{local, histogram,
                                   num_classes * num_channels * (num_thresholds + 1)};
  counters.clear();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t pixels = batch * n;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels;
       i += stride) {
    const int32_t t = kernels::class_code(load_class(target, i), num_classes, ignore_index);
    if (t == kIgnored) continue;
    if (t == kOutOfRange) {
      report_bad(status, pixels - i);
      continue;
    }
    const int64_t image = i / n;
    const T* score = scores + image * num_channels * n + (i - image * n);
    T best = kernels::kLowest;
    int32_t channel = 0;
    for (int32_t k = 0; k < num_channels; ++k) kernels::take_better(score[k * n], k, best, channel);
    const int32_t bucket = kernels::bucket_of(thresholds, num_thresholds, best);
    counters.add(kernels::histogram_index(t, channel, bucket, num_channels, num_thresholds));
  }
  counters.flush();
}

// One thread per (target class, channel): its row of the histogram into the curve.
__global__ void spread_kernel(const Count* histogram, const int64_t* class_ids,
                              int32_t num_channels, int32_t num_thresholds, int32_t num_classes,
                              Count* curve) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= num_classes * num_channels) return;
  kernels::spread_row(histogram + static_cast<int64_t>(row) * (num_thresholds + 1),
                      row / num_channels, static_cast<int32_t>(class_ids[row % num_channels]),
                      num_classes, num_thresholds,
                      [curve](int64_t cell, Count count) { atomicAdd(&curve[cell], count); });
}

}  // namespace

void confusion_matrix(ClassMap pred, ClassMap target, int64_t n, int32_t num_classes,
                      int64_t ignore_index, int64_t* tally, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const int64_t bytes = static_cast<int64_t>(num_classes) * num_classes * sizeof(unsigned);
  const bool shared = bytes <= kSharedBytes;
  auto* kernel = shared ? &confusion_matrix_kernel<true> : &confusion_matrix_kernel<false>;
  WSIS_LAUNCH(kernel, grid_size(n, kThreads), kThreads, shared ? bytes : 0,
              reinterpret_cast<cudaStream_t>(stream), pred, target, n, num_classes, ignore_index,
              reinterpret_cast<Count*>(tally));
  check(cudaGetLastError(), "confusion_matrix");
}

template <class T>
void threshold_curve(const T* scores, ClassMap target, const T* thresholds,
                     const int64_t* class_ids, int64_t batch, int32_t num_channels, int64_t n,
                     int32_t num_thresholds, int32_t num_classes, int64_t ignore_index,
                     int64_t* histogram, int64_t* tally, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  auto* counts = reinterpret_cast<Count*>(histogram);
  auto* curve = reinterpret_cast<Count*>(tally);
  const int64_t rows = static_cast<int64_t>(num_classes) * num_channels;
  const int64_t bytes = rows * (num_thresholds + 1) * sizeof(unsigned);
  const bool shared = bytes <= kSharedBytes;
  auto* kernel =
      shared ? &threshold_histogram_kernel<T, true> : &threshold_histogram_kernel<T, false>;
  WSIS_LAUNCH(kernel, grid_size(batch * n, kThreads), kThreads, shared ? bytes : 0, queue, scores,
              target, thresholds, batch, num_channels, n, num_thresholds, num_classes, ignore_index,
              counts, curve + static_cast<int64_t>(num_thresholds) * num_classes * num_classes);
  check(cudaGetLastError(), "threshold_histogram");
  WSIS_LAUNCH(&spread_kernel, grid_size(rows, kThreads, rows), kThreads, 0, queue, counts,
              class_ids, num_channels, num_thresholds, num_classes, curve);
  check(cudaGetLastError(), "threshold_curve");
}

template void threshold_curve(const float*, ClassMap, const float*, const int64_t*, int64_t,
                              int32_t, int64_t, int32_t, int32_t, int64_t, int64_t*, int64_t*, int,
                              uintptr_t);
template void threshold_curve(const double*, ClassMap, const double*, const int64_t*, int64_t,
                              int32_t, int64_t, int32_t, int32_t, int64_t, int64_t*, int64_t*, int,
                              uintptr_t);

}  // namespace wsis::cuda
