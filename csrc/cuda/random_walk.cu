#include "cuda/random_walk.h"

#include "cuda/stencil.h"

namespace wsis::cuda {
namespace {

using kernels::Offsets;

// Which directions a pixel receives from: its own affinities (to i + offset), and those of others.
struct Directions {
  bool own, others;
};

// P, 0 where the partner lies outside, and 1 / s.
template <class T>
__global__ void __launch_bounds__(kStencilThreads)
    powers_kernel(const T* __restrict__ affinity, Grid grid, Offsets offsets, bool symmetric,
                  int32_t exponent, T* __restrict__ powers, T* __restrict__ inverse) {
  const StencilPixel i(grid);
  if (!i.inside) return;
  const int64_t first = i.image * grid.planes * grid.size() + i.index;
  double sum = 1;
  for (int32_t k = 0; k < offsets.count; ++k) {
    const int64_t at = first + int64_t{offsets.plane[k]} * grid.size();
    const int32_t dy = offsets.dy[k], dx = offsets.dx[k];
    T own = 0;
    if (grid.contains(i.y + dy, i.x + dx)) own = kernels::power(affinity[at], exponent);
    powers[at] = own;
    if (symmetric) sum += own;
    if (grid.contains(i.y - dy, i.x - dx))
      sum += kernels::power(affinity[at - (dy * grid.width + dx)], exponent);
  }
  inverse[i.image * grid.size() + i.index] = static_cast<T>(1 / sum);
}

// v_0 of a transposed walk.
template <class T>
__global__ void __launch_bounds__(kStencilThreads)
    scale_kernel(const T* __restrict__ maps, const T* __restrict__ inverse, Grid grid,
                 int32_t count, T* __restrict__ scaled) {
  const StencilPixel i(grid);
  if (!i.inside) return;
  const T factor = inverse[i.image * grid.size() + i.index];
  const int64_t first = i.image * count * grid.size() + i.index;
  for (int32_t c = 0; c < count; ++c) {
    const int64_t at = first + int64_t{c} * grid.size();
    scaled[at] = maps[at] * factor;
  }
}

// One product with T and what follows it.
template <class T>
struct Step {
  const T* now;     // v_k, [B, C, H, W] like all
  const T* before;  // v_{k-1}, or null
  T* after;         // v_{k+1}; may be `before`, as a pixel is read and written by one thread
  T* sum;           // of c_k v_k, or null
  T first, factor;  // c_k if k = 0, and c_{k+1}
  bool start;       // k = 0: the sum begins here
  bool descale;     // the last of a transposed walk: its result is divided by 1 / s
};

template <class T, int kMaps>
__global__ void __launch_bounds__(kStencilThreads)
    step_kernel(const T* __restrict__ powers, const T* __restrict__ inverse, Step<T> step,
                Grid grid, Offsets offsets, Directions from, bool sums_to_one, int32_t count) {
  const StencilPixel i(grid);
  if (!i.inside) return;
  const int32_t map = static_cast<int32_t>(blockIdx.y) * kMaps;
  const int64_t size = grid.size();
  const int64_t first = (i.image * count + map) * size + i.index;
  const T* __restrict__ now = step.now + first;
  T own[kMaps], received[kMaps];
#pragma unroll
  for (int c = 0; c < kMaps; ++c) {
    own[c] = map + c < count ? now[c * size] : T(0);
    received[c] = 0;
  }
  // Differences to the own value: nothing changes, not even by rounding, where all are equal.
  const auto add = [&](T weight, int32_t away) {
#pragma unroll
    for (int c = 0; c < kMaps; ++c)
      if (map + c < count)
        received[c] += weight * (now[c * size + away] - (sums_to_one ? own[c] : T(0)));
  };
  const T* weights = powers + i.image * grid.planes * size + i.index;
  // Loads without branches around them, so that those of several offsets are under way together.
#pragma unroll 4
  for (int32_t k = 0; k < offsets.count; ++k) {
    const T* plane = weights + offsets.plane[k] * size;
    const int32_t dy = offsets.dy[k], dx = offsets.dx[k], away = dy * grid.width + dx;
    // Where there is no such pixel: the own affinity is 0, and the own value differs by 0 from itself
    // (others hand over only in columns that sum to 1).
    if (from.own) add(plane[0], grid.contains(i.y + dy, i.x + dx) ? away : 0);
    if (from.others) {
      const int32_t back = grid.contains(i.y - dy, i.x - dx) ? -away : 0;
      add(plane[back], back);
    }
  }
  const T factor = inverse[i.image * size + i.index];
  const T loss = sums_to_one ? T(0) : T(1) - factor;
#pragma unroll
  for (int c = 0; c < kMaps; ++c) {
    if (map + c >= count) break;
    const int64_t at = first + c * size;
    const T change = received[c] * factor - loss * own[c];
    T value = own[c] + change;
    if (step.before) value = kernels::next_term(own[c], step.before[at], change);
    if (step.sum) {
      step.after[at] = value;
      if (!step.start && step.factor == 0 && !step.descale) continue;
      const T sum = step.start ? step.first * own[c] : step.sum[at];
      value = sum + step.factor * value;
    }
    (step.sum ? step.sum : step.after)[at] = step.descale ? value / factor : value;
  }
}

constexpr int kMany = 4;
// Threads that fill the largest GPU: with fewer pixels a thread has one map, though the weights are
// then read once for each.
constexpr int64_t kEnough = 1 << 17;

}  // namespace

template <class T>
void random_walk(const T* maps, const T* affinity, const Walk& walk, const WalkQueue& queue,
                 T* powers, T* inverse, T* buffers, T* result) {
  const DeviceGuard guard(queue.device);
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  const Grid grid(walk.height, walk.width, walk.planes);
  const auto blocks = static_cast<unsigned>(walk.batch * grid.blocks);
  const int64_t pixels = walk.batch * walk.height * walk.width, size = pixels * walk.maps;
  WSIS_LAUNCH((&powers_kernel<T>), blocks, kStencilThreads, 0, stream, affinity, grid,
              walk.offsets, walk.symmetric, walk.exponent, powers, inverse);
  check(cudaGetLastError(), "powers");
  const T* start = maps;
  if (walk.transposed) {
    WSIS_LAUNCH((&scale_kernel<T>), blocks, kStencilThreads, 0, stream, maps, inverse, grid,
                walk.maps, buffers);
    check(cudaGetLastError(), "scale");
    start = buffers;
  }
  const Directions from{walk.symmetric || walk.transposed, walk.symmetric || !walk.transposed};
  const bool sums_to_one = walk.symmetric || !walk.transposed;
  const int together = pixels >= kEnough ? kMany : 1;
  const dim3 shape(blocks, static_cast<unsigned>((walk.maps + together - 1) / together), 1);
  auto* kernel = together == kMany ? &step_kernel<T, kMany> : &step_kernel<T, 1>;
  const double* c = walk.coefficients;
  for (int64_t k = 0; k < walk.steps; ++k) {
    const bool last = k + 1 == walk.steps;
    Step<T> step{};
    step.now = k == 0 ? start : buffers + k % 2 * size;
    step.after = !c && last ? result : buffers + (k + 1) % 2 * size;
    step.descale = walk.transposed && last;
    if (c) {
      if (k > 0) step.before = k == 1 ? start : step.after;
      step.sum = result;
      step.first = static_cast<T>(c[0]);
      step.factor = static_cast<T>(c[k + 1]);
      step.start = k == 0;
    }
    WSIS_LAUNCH(kernel, shape, kStencilThreads, 0, stream, powers, inverse, step, grid,
                walk.offsets, from, sums_to_one, walk.maps);
    check(cudaGetLastError(), "step of a walk");
  }
}

#define WSIS_INSTANTIATE(T) \
  template void random_walk(const T*, const T*, const Walk&, const WalkQueue&, T*, T*, T*, T*);
WSIS_INSTANTIATE(float)
WSIS_INSTANTIATE(double)
#undef WSIS_INSTANTIATE

}  // namespace wsis::cuda
