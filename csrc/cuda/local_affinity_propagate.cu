#include "cuda/local_affinity_pixels.h"

namespace wsis::cuda {
namespace {

constexpr int kGroup = 8;  // planes summed together where weights are not in registers

template <class T>
struct Step {
  const T* source;        // [B, N, H, W]
  T* target;              // [B, N, H, W]
  const int32_t* counts;  // [B] or null
  int32_t planes, height, width;
  bool last;  // only the result has its unused planes cleared

  __device__ int64_t size() const { return static_cast<int64_t>(height) * width; }
  __device__ int32_t used(int64_t b) const {
    return counts ? min(max(counts[b], 0), planes) : planes;
  }
  __device__ void clear(int64_t b, int32_t index) const {
    if (!last) return;
    for (int32_t n = used(b); n < planes; ++n) target[(b * planes + n) * size() + index] = 0;
  }
};

// The fast path: weights are read once, whatever the number of planes.
__global__ void __launch_bounds__(kThreads, 3)
    propagate_kernel(Step<float> step, const Four<float>* __restrict__ packed, Taps taps,
                     int32_t blocks) {
  using T = float;
  constexpr int kCount = kFast * kDirections;
  const Pixel i = my_pixel(step.height, step.width, blocks);
  if (!i.inside) return;
  T weights[kCount];
#pragma unroll
  for (int f = 0; f < kCount / 4; ++f) {
    const Four<T> four = packed[(i.image * (kCount / 4) + f) * step.size() + i.index];
#pragma unroll
    for (int k = 0; k < 4; ++k) weights[4 * f + k] = four.value[k];
  }
  const Near<kFast> near(taps, i.y, i.x, step.height, step.width);
  const int32_t used = step.used(i.image);
  const T* __restrict__ source = step.source + i.image * step.planes * step.size();
  T* target = step.target + i.image * step.planes * step.size() + i.index;
  for (int32_t n = 0; n < used; ++n, source += step.size(), target += step.size()) {
    T sum = 0;
#pragma unroll
    for (int p = 0; p < kCount; ++p) sum += weights[p] * source[near[p]];
    *target = sum;
  }
  step.clear(i.image, i.index);
}

// Everything else. The transpose gathers, too: pixel q receives from all pixels whose step ends in
// it, in a fixed order.
template <class T, bool kTransposed, class Weights>
__global__ void __launch_bounds__(kThreads)
    propagate_general_kernel(Step<T> step, Weights weights, Taps taps, int32_t blocks) {
  const Pixel i = my_pixel(step.height, step.width, blocks);
  if (!i.inside) return;
  const int count = taps.count * kDirections;
  const int32_t used = step.used(i.image);
  for (int32_t first = 0; first < used; first += kGroup) {
    const int64_t offset = (i.image * step.planes + first) * step.size();
    const T* source = step.source + offset;
    T sums[kGroup] = {};
    const auto add = [&](T weight, int32_t index) {
#pragma unroll
      for (int g = 0; g < kGroup; ++g)
        if (first + g < used) sums[g] += weight * source[g * step.size() + index];
    };
    for (int p = 0; p < count; ++p) {
      const int32_t dy = kernels::step_y(p % kDirections) * taps.dy[p / kDirections];
      const int32_t dx = kernels::step_x(p % kDirections) * taps.dx[p / kDirections];
      if constexpr (kTransposed) {
        const int32_t first_y = kernels::first_source(i.y, dy);
        const int32_t first_x = kernels::first_source(i.x, dx);
        const int32_t rows = kernels::last_source(i.y, dy, step.height) - first_y + 1;
        const int32_t columns = kernels::last_source(i.x, dx, step.width) - first_x + 1;
        // One loop, not two: what diverges less is kept in fewer registers.
        for (int32_t k = 0; k < (columns > 0 ? rows * columns : 0); ++k) {
          const int32_t y = first_y + k / columns, x = first_x + k % columns;
          add(weights(i.image, y, x, p), y * step.width + x);
        }
      } else {
        add(weights(i.image, i.y, i.x, p),
            kernels::clamp_index(i.y + dy, step.height) * step.width +
                kernels::clamp_index(i.x + dx, step.width));
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
      if (first + g < used) step.target[offset + g * step.size() + i.index] = sums[g];
  }
  step.clear(i.image, i.index);
}

// Iterations between two buffers such that the last one ends in the result; `launch(step)` each.
template <class T, class Launch>
void iterate(const T* masks, const int32_t* counts, int32_t iterations, const Images& images,
             T* scratch, T* result, Launch launch) {
  const T* source = masks;
  for (int32_t left = iterations; left > 0; --left) {
    T* target = left % 2 == 1 ? result : scratch;
    launch(Step<T>{source, target, counts, images.planes, images.height, images.width, left == 1});
    check(cudaGetLastError(), "propagate");
    source = target;
  }
}

}  // namespace

template <class T>
void propagate(const T* masks, const T* packed, const int32_t* counts, int32_t iterations,
               bool transposed, const AffinityCall& call, const Images& images, T* scratch,
               T* result) {
  const DeviceGuard guard(images.device);
  const auto queue = reinterpret_cast<cudaStream_t>(images.stream);
  const int32_t blocks = blocks_of(images);
  const auto grid = static_cast<unsigned>(blocks * images.batch);
  const Taps taps = taps_of(call);
  const Packed<T> weights{packed, taps.count * kDirections, images.height, images.width};
  iterate(masks, counts, iterations, images, scratch, result, [&](const Step<T>& step) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (!transposed && has_fast_path<T>(call)) {
        WSIS_LAUNCH(&propagate_kernel, grid, kThreads, 0, queue, step,
                    reinterpret_cast<const Four<T>*>(packed), taps, blocks);
        return;
      }
    }
    auto* kernel = transposed ? &propagate_general_kernel<T, true, Packed<T>>
                              : &propagate_general_kernel<T, false, Packed<T>>;
    WSIS_LAUNCH(kernel, grid, kThreads, 0, queue, step, weights, taps, blocks);
  });
}

template <class T>
void propagate_lean(const T* masks, const T* image, const T* stats, int32_t channels,
                    const int32_t* counts, int32_t iterations, bool transposed,
                    const AffinityCall& call, const Images& images, T* scratch, T* result) {
  const DeviceGuard guard(images.device);
  const auto queue = reinterpret_cast<cudaStream_t>(images.stream);
  const int32_t blocks = blocks_of(images);
  const auto grid = static_cast<unsigned>(blocks * images.batch);
  const Taps taps = taps_of(call);
  with_kind(call.kind, [&](auto kind) {
    constexpr Kind kKind = decltype(kind)::kValue;
    using Weights = Recomputed<T, kKind>;
    const Weights weights = recomputed<T, kKind>(image, stats, channels, call);
    auto* kernel = transposed ? &propagate_general_kernel<T, true, Weights>
                              : &propagate_general_kernel<T, false, Weights>;
    iterate(masks, counts, iterations, images, scratch, result, [&](const Step<T>& step) {
      WSIS_LAUNCH(kernel, grid, kThreads, 0, queue, step, weights, taps, blocks);
    });
  });
}

#define WSIS_INSTANTIATE(T)                                                                       \
  template void propagate(const T*, const T*, const int32_t*, int32_t, bool, const AffinityCall&, \
                          const Images&, T*, T*);                                                 \
  template void propagate_lean(const T*, const T*, const T*, int32_t, const int32_t*, int32_t,    \
                               bool, const AffinityCall&, const Images&, T*, T*);
WSIS_INSTANTIATE(float)
WSIS_INSTANTIATE(double)
#undef WSIS_INSTANTIATE

}  // namespace wsis::cuda
