#include "cuda/gated_crf.h"

#include "cuda/launch.h"

namespace wsis::cuda {
namespace {

using cpu::WindowCall;
using kernels::WindowKernels;

constexpr int kThreads = 128;
// Values whose sums a thread holds in registers. Every group computes the weights again, so the
// larger group takes the 21 classes of VOC and a mask at once.
constexpr int kFew = 8, kMany = 24;

// One thread per pixel and group of values. Threads of a warp are neighbours in a row: their reads
// of one tap are neighbours too, and the next tap finds nearly the same lines in the cache.
template <class T, int kValues>
__global__ void __launch_bounds__(kThreads)
    window_filter_kernel(const T* __restrict__ values, const T* __restrict__ features,
                         WindowKernels<T> kernels, WindowCall call, int32_t blocks, int32_t groups,
                         T* __restrict__ result) {
  const int64_t pixels = static_cast<int64_t>(call.height) * call.width;
  const int64_t index = static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  if (index >= pixels) return;
  const int64_t b = blockIdx.x / blocks / groups;
  const int32_t first = static_cast<int32_t>(blockIdx.x / blocks % groups) * kValues;
  const int32_t y = static_cast<int32_t>(index / call.width);
  const int32_t x = static_cast<int32_t>(index % call.width);
  const int32_t count = call.values - first < kValues ? call.values - first : kValues;
  const T* own = features + b * call.features * pixels + index;
  const T* from = values + (b * call.values + first) * pixels + index;
  T sum[kValues] = {};
  const int32_t top = y < call.radius ? -y : -call.radius;
  const int32_t left = x < call.radius ? -x : -call.radius;
  for (int32_t dy = top; dy <= call.radius && y + dy < call.height; ++dy)
    for (int32_t dx = left; dx <= call.radius && x + dx < call.width; ++dx) {
      if (dy == 0 && dx == 0) continue;
      const int64_t offset = static_cast<int64_t>(dy) * call.width + dx;
      const T weight =
          kernels::window_weight<T>(kernels, own, own + offset, pixels, dy * dy + dx * dx);
#pragma unroll
      for (int g = 0; g < kValues; ++g)
        if (g < count) sum[g] += weight * from[g * pixels + offset];
    }
  T* to = result + (b * call.values + first) * pixels + index;
#pragma unroll
  for (int g = 0; g < kValues; ++g)
    if (g < count) to[g * pixels] = sum[g];
}

template <class T, int kValues>
void launch(const T* values, const T* features, const WindowKernels<T>& kernels,
            const WindowCall& call, T* result, cudaStream_t queue) {
  const auto pixels = static_cast<int64_t>(call.height) * call.width;
  const auto blocks = static_cast<int32_t>((pixels + kThreads - 1) / kThreads);
  const int32_t groups = (call.values + kValues - 1) / kValues;
  WSIS_LAUNCH((&window_filter_kernel<T, kValues>),
              static_cast<unsigned>(call.batch * groups * blocks), kThreads, 0, queue, values,
              features, kernels, call, blocks, groups, result);
}

}  // namespace

template <class T>
void window_filter(const T* values, const T* features, const WindowKernels<T>& kernels,
                   const WindowCall& call, T* result, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  if (call.values <= kFew)
    launch<T, kFew>(values, features, kernels, call, result, queue);
  else
    launch<T, kMany>(values, features, kernels, call, result, queue);
  check(cudaGetLastError(), "window_filter");
}

template void window_filter(const float*, const float*, const WindowKernels<float>&,
                            const WindowCall&, float*, int, uintptr_t);
template void window_filter(const double*, const double*, const WindowKernels<double>&,
                            const WindowCall&, double*, int, uintptr_t);

}  // namespace wsis::cuda
