#include "cuda/launch.h"
#include "cuda/normalize.h"

namespace wsis::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    background_kernel(kernels::Background kind, T value, const T* __restrict__ weights, T absent,
                      int64_t pixels, int32_t num_classes, int64_t n, T* scores) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels;
       i += stride) {
    const int64_t image = i / n;
    T* out = scores + image * (num_classes + 1) * n + (i - image * n);
    T best = static_cast<T>(-INFINITY);
    if (kind != kernels::Background::kConstant)
      for (int32_t k = 0; k < num_classes; ++k) {
        const bool is_absent = weights && weights[image * num_classes + k] == T(0);
        best = kernels::greater(best, is_absent ? absent : out[(k + 1) * n]);
      }
    *out = kernels::background_of(kind, best, value);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    share_kernel(const T* __restrict__ gradient, const T* __restrict__ scores, int64_t pixels,
                 int32_t num_classes, int64_t n, T* __restrict__ shares) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels;
       i += stride) {
    const int64_t image = i / n, first = image * num_classes * n + (i - image * n);
    const T* g = gradient + first + image * n;
    const T* y = scores + first + (image + 1) * n;
    T best = static_cast<T>(-INFINITY), ties = T(1);
    for (int32_t k = 0; k < num_classes; ++k) {
      const T score = y[k * n];
      ties = score > best ? T(1) : score == best ? ties + T(1) : ties;
      best = kernels::greater(best, score);
    }
    const T part = g[0] / ties;
    for (int32_t k = 0; k < num_classes; ++k)
      shares[first + k * n] = g[(k + 1) * n] - (y[k * n] == best ? part : T(0));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    labels_kernel(const T* __restrict__ scores, const T* __restrict__ weights,
                  const int64_t* __restrict__ boxes, int64_t pixels, int32_t num_classes,
                  int32_t rows, int32_t columns, T low, T high, int64_t ignore_index,
                  int64_t* __restrict__ labels) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t n = static_cast<int64_t>(rows) * columns;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels;
       i += stride) {
    const int64_t image = i / n;
    const int32_t pixel = static_cast<int32_t>(i - image * n);
    const int32_t y = pixel / columns, x = pixel % columns;
    const int64_t* box = boxes ? boxes + 4 * image : nullptr;
    if (box && !(y >= box[0] && y < box[1] && x >= box[2] && x < box[3])) {
      labels[i] = ignore_index;
      continue;
    }
    T best = static_cast<T>(-INFINITY);
    int32_t channel = 0;
    for (int32_t k = 0; k < num_classes; ++k) {
      const T weight = weights ? weights[image * num_classes + k] : T(1);
      const T score =
          weight == T(0) ? T(0) : weight * scores[(image * num_classes + k) * n + pixel];
      channel = score > best ? k : channel;
      best = kernels::greater(best, score);
    }
    labels[i] = kernels::label_of(best, channel, low, high, ignore_index);
  }
}

}  // namespace

template <class T>
void add_background(kernels::Background kind, T value, const T* weights, T absent, int64_t batch,
                    int32_t num_classes, int64_t n, T* scores, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  WSIS_LAUNCH((&background_kernel<T>), grid_size(batch * n, kThreads), kThreads, 0,
              reinterpret_cast<cudaStream_t>(stream), kind, value, weights, absent, batch * n,
              num_classes, n, scores);
  check(cudaGetLastError(), "add_background");
}

template <class T>
void share_background(const T* gradient, const T* scores, int64_t batch, int32_t num_classes,
                      int64_t n, T* shares, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  WSIS_LAUNCH((&share_kernel<T>), grid_size(batch * n, kThreads), kThreads, 0,
              reinterpret_cast<cudaStream_t>(stream), gradient, scores, batch * n, num_classes,
              n, shares);
  check(cudaGetLastError(), "share_background");
}

template <class T>
void cams_to_labels(const T* scores, const T* weights, const int64_t* boxes, int64_t batch,
                    int32_t num_classes, int32_t rows, int32_t columns, LabelRule rule,
                    int64_t* labels, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const int64_t pixels = batch * rows * columns;
  WSIS_LAUNCH((&labels_kernel<T>), grid_size(pixels, kThreads), kThreads, 0,
              reinterpret_cast<cudaStream_t>(stream), scores, weights, boxes, pixels, num_classes,
              rows, columns, static_cast<T>(rule.low), static_cast<T>(rule.high),
              rule.ignore_index, labels);
  check(cudaGetLastError(), "cams_to_labels");
}

#define WSIS_INSTANTIATE(T)                                                                       \
  template void add_background(kernels::Background, T, const T*, T, int64_t, int32_t, int64_t,    \
                               T*, int, uintptr_t);                                               \
  template void share_background(const T*, const T*, int64_t, int32_t, int64_t, T*, int,          \
                                 uintptr_t);                                                      \
  template void cams_to_labels(const T*, const T*, const int64_t*, int64_t, int32_t, int32_t,     \
                               int32_t, LabelRule, int64_t*, int, uintptr_t);
WSIS_INSTANTIATE(float)
WSIS_INSTANTIATE(double)

}  // namespace wsis::cuda
