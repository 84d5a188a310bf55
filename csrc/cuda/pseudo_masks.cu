#include "cuda/launch.h"
#include "cuda/pseudo_masks.h"
#include "kernels/confusion.h"
#include "kernels/pseudo_masks.h"

namespace wsis::cuda {
namespace {

using kernels::kBackground;
using kernels::Lerp;
using kernels::Range;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;

// Numbers of the classes that are in the image, ascending, into shared memory; returns how many.
// Warp 0 does it, 32 classes a step; everybody waits.
__device__ int32_t list_present(const uint8_t* present, int32_t classes, int32_t room,
                                int32_t* list) {
  __shared__ int32_t total;
  if (threadIdx.x < kWarp) {
    int32_t found = 0;
    for (int32_t base = 0; base < classes; base += kWarp) {
      const int32_t k = base + threadIdx.x;
      const bool is_here = k < classes && present[k] != 0;
      const unsigned votes = __ballot_sync(kAllLanes, is_here);
      const int32_t place = found + __popc(votes & ((1u << threadIdx.x) - 1));
      if (is_here && place < room) list[place] = k;
      found += __popc(votes);
    }
    if (threadIdx.x == 0) total = found < room ? found : room;
  }
  __syncthreads();
  return total;
}

// One block per image row: sum over the box of the largest score of the present classes. Lanes add
// up in a fixed order, so the sum is the same every time.
template <class T>
__global__ void row_sums_kernel(const T* __restrict cams, const uint8_t* __restrict present,
                                const int64_t* __restrict box, PseudoSizes sizes,
                                double* __restrict sums) {
  WSIS_DYNAMIC_SHARED(int32_t, list);
  __shared__ double of_warp[kThreads / kWarp];
  const int64_t b = blockIdx.y, y = blockIdx.x;
  const int32_t found =
      list_present(present + b * sizes.classes, sizes.classes, sizes.classes, list);
  const Range rows = kernels::cut(box + b * 4, sizes.height);
  const Range columns = kernels::cut(box + b * 4 + 2, sizes.width);
  const int64_t plane = static_cast<int64_t>(sizes.height) * sizes.width;
  double sum = 0;
  if (found > 0 && y >= rows.begin && y < rows.end) {
    const T* row = cams + b * sizes.classes * plane + y * sizes.width;
    for (int64_t x = columns.begin + threadIdx.x; x < columns.end; x += blockDim.x) {
      T best = kernels::kLowest;
      for (int32_t p = 0; p < found; ++p) {
        const T value = row[list[p] * plane + x];
        best = value > best ? value : best;
      }
      sum += best;
    }
  }
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += of_warp[warp];
    sums[b * sizes.height + y] = total;
  }
}

// One warp per image: the mean from the sums of its rows.
template <class T>
__global__ void mean_kernel(const double* __restrict sums, const int64_t* __restrict box,
                            PseudoSizes sizes, T* __restrict unit) {
  const int64_t b = blockIdx.x;
  double sum = 0;
  for (int32_t y = threadIdx.x; y < sizes.height; y += kWarp) sum += sums[b * sizes.height + y];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
  if (threadIdx.x != 0) return;
  const Range rows = kernels::cut(box + b * 4, sizes.height);
  const Range columns = kernels::cut(box + b * 4 + 2, sizes.width);
  const int64_t pixels =
      static_cast<int64_t>(rows.end - rows.begin) * (columns.end - columns.begin);
  unit[b] = static_cast<T>(sum / static_cast<double>(max(pixels, int64_t{1})));
}

// One thread per reduced pixel. The scores are interpolated three times (largest, sum, result)
// instead of being kept: a class costs four loads that hit the first-level cache, where storing
// them would double the traffic to memory.
template <class T>
__global__ void stack_kernel(const T* __restrict cams, const uint8_t* __restrict present,
                             const T* __restrict unit, T high, T low, PseudoSizes sizes,
                             T* __restrict stack, int32_t* __restrict counts,
                             int32_t* __restrict ids) {
  WSIS_DYNAMIC_SHARED(int32_t, list);
  const int64_t b = blockIdx.y;
  const int32_t found = list_present(present + b * sizes.classes, sizes.classes, sizes.room, list);
  const int32_t half = found + 1;
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) counts[b] = found ? 2 * half : 0;
    for (int32_t i = threadIdx.x; i <= sizes.room; i += blockDim.x)
      ids[b * (sizes.room + 1) + i] = i > 0 && i <= found ? list[i - 1] + 1 : kBackground;
  }
  const int32_t reduced = sizes.reduced_height * sizes.reduced_width;
  const int32_t pixel = blockIdx.x * blockDim.x + threadIdx.x;
  if (found == 0 || pixel >= reduced) return;

  const Lerp<T> y = kernels::lerp_at<T>(pixel / sizes.reduced_width, sizes.height,
                                        sizes.reduced_height);
  const Lerp<T> x = kernels::lerp_at<T>(pixel % sizes.reduced_width, sizes.width,
                                        sizes.reduced_width);
  const int64_t plane = static_cast<int64_t>(sizes.height) * sizes.width;
  const T* image = cams + b * sizes.classes * plane;
  T best = kernels::kLowest;
  for (int32_t p = 0; p < found; ++p) {
    const T value = kernels::sample(image + list[p] * plane, sizes.width, y, x);
    best = value > best ? value : best;
  }
  T total = 0;
  for (int32_t p = 0; p < found; ++p) {
    const T value = kernels::sample(image + list[p] * plane, sizes.width, y, x);
    total += kernels::exp_nonpositive(value - best);
  }
  const T scale = unit ? unit[b] : T(1);
  const auto at_high = kernels::shares(kernels::threshold(high, scale), best, total);
  const auto at_low = kernels::shares(kernels::threshold(low, scale), best, total);
  T* highs = stack + b * 2 * (sizes.room + 1) * reduced + pixel;
  T* lows = highs + static_cast<int64_t>(half) * reduced;
  highs[0] = at_high.background;
  lows[0] = at_low.background;
  for (int32_t p = 0; p < found; ++p) {
    const T value = kernels::sample(image + list[p] * plane, sizes.width, y, x);
    const T share = kernels::exp_nonpositive(value - best);
    highs[static_cast<int64_t>(p + 1) * reduced] = share * at_high.factor;
    lows[static_cast<int64_t>(p + 1) * reduced] = share * at_low.factor;
  }
}

// One thread per pixel.
template <class T>
__global__ void labels_kernel(const T* __restrict stack, const int32_t* __restrict counts,
                              const int32_t* __restrict ids, const int64_t* __restrict box,
                              int64_t ignore_index, PseudoSizes sizes,
                              int64_t* __restrict masks) {
  const int64_t b = blockIdx.y;
  const int32_t pixels = sizes.height * sizes.width;
  const int32_t pixel = blockIdx.x * blockDim.x + threadIdx.x;
  if (pixel >= pixels) return;
  const int32_t row = pixel / sizes.width, column = pixel % sizes.width;
  const Range rows = kernels::cut(box + b * 4, sizes.height);
  const Range columns = kernels::cut(box + b * 4 + 2, sizes.width);
  int64_t* out = masks + b * pixels + pixel;
  if (row < rows.begin || row >= rows.end || column < columns.begin || column >= columns.end) {
    *out = ignore_index;
    return;
  }
  const int32_t half = counts[b] / 2;
  if (half == 0) {
    *out = kBackground;
    return;
  }
  const int32_t h = sizes.reduced_height, w = sizes.reduced_width;
  const Lerp<T> y = kernels::lerp_at<T>(row, h, sizes.height);
  const Lerp<T> x = kernels::lerp_at<T>(column, w, sizes.width);
  const int64_t reduced = static_cast<int64_t>(h) * w;
  const T* plane = stack + b * 2 * (sizes.room + 1) * reduced;
  int32_t winner[2] = {0, 0};
  for (int32_t& index : winner) {
    T best = kernels::kLowest;
    for (int32_t p = 0; p < half; ++p, plane += reduced)
      kernels::take_better(kernels::sample(plane, w, y, x), p, best, index);
  }
  const int32_t* id = ids + b * (sizes.room + 1);
  *out = kernels::decide(id[winner[0]], id[winner[1]], ignore_index);
}

unsigned blocks_for(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

}  // namespace

template <class T>
void pseudo_unit(const T* cams, const uint8_t* present, const int64_t* box, PseudoSizes sizes,
                 double* scratch, T* unit, int device, uintptr_t stream) {
  if (sizes.batch == 0) return;
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const auto batch = static_cast<unsigned>(sizes.batch);
  if (sizes.height > 0)
    WSIS_LAUNCH(&row_sums_kernel<T>, dim3(sizes.height, batch), kThreads,
                sizes.classes * sizeof(int32_t), queue, cams, present, box, sizes, scratch);
  check(cudaGetLastError(), "pseudo_unit rows");
  WSIS_LAUNCH(&mean_kernel<T>, batch, kWarp, 0, queue, scratch, box, sizes, unit);
  check(cudaGetLastError(), "pseudo_unit");
}

template <class T>
void pseudo_stack(const T* cams, const uint8_t* present, const T* unit, T high, T low,
                  PseudoSizes sizes, T* stack, int32_t* counts, int32_t* ids, int device,
                  uintptr_t stream) {
  if (sizes.batch == 0) return;
  const DeviceGuard guard(device);
  const int64_t reduced = static_cast<int64_t>(sizes.reduced_height) * sizes.reduced_width;
  const dim3 grid(std::max(blocks_for(reduced), 1u), static_cast<unsigned>(sizes.batch));
  WSIS_LAUNCH(&stack_kernel<T>, grid, kThreads, sizes.room * sizeof(int32_t),
              reinterpret_cast<cudaStream_t>(stream), cams, present, unit, high, low, sizes, stack,
              counts, ids);
  check(cudaGetLastError(), "pseudo_stack");
}

template <class T>
void pseudo_labels(const T* stack, const int32_t* counts, const int32_t* ids, const int64_t* box,
                   int64_t ignore_index, PseudoSizes sizes, int64_t* masks, int device,
                   uintptr_t stream) {
  const int64_t pixels = static_cast<int64_t>(sizes.height) * sizes.width;
  if (sizes.batch == 0 || pixels == 0) return;
  const DeviceGuard guard(device);
  WSIS_LAUNCH(&labels_kernel<T>, dim3(blocks_for(pixels), static_cast<unsigned>(sizes.batch)),
              kThreads, 0, reinterpret_cast<cudaStream_t>(stream), stack, counts, ids, box,
              ignore_index, sizes, masks);
  check(cudaGetLastError(), "pseudo_labels");
}

#define WSIS_FOR(T)                                                                               \
  template void pseudo_unit(const T*, const uint8_t*, const int64_t*, PseudoSizes, double*, T*,   \
                            int, uintptr_t);                                                      \
  template void pseudo_stack(const T*, const uint8_t*, const T*, T, T, PseudoSizes, T*, int32_t*, \
                             int32_t*, int, uintptr_t);                                           \
  template void pseudo_labels(const T*, const int32_t*, const int32_t*, const int64_t*, int64_t,  \
                              PseudoSizes, int64_t*, int, uintptr_t);
WSIS_FOR(float)
WSIS_FOR(double)
#undef WSIS_FOR

}  // namespace wsis::cuda
