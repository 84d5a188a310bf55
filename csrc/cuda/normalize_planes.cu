#include "cuda/block.h"
#include "cuda/launch.h"
#include "cuda/normalize.h"

namespace wsis::cuda {
namespace {

using kernels::Affine;
using kernels::Extrema;
using kernels::GradientSums;
using kernels::Norm;

constexpr int kThreads = 256;
constexpr int kItems = 16;  // elements of a thread
constexpr int64_t kChunk = kThreads * kItems;

// A chunk of a plane: block b works on chunk b % chunks of plane b / chunks.
struct Chunk {
  int64_t plane, begin, end, in, out;  // in, out: offsets of the plane in maps and scores

  __device__ Chunk(const Planes& planes, int32_t chunks) {
    plane = blockIdx.x / chunks;
    begin = (blockIdx.x - plane * chunks) * kChunk;
    end = begin + kChunk < planes.n ? begin + kChunk : planes.n;
    const int64_t image = plane / planes.num_classes;
    in = (plane + (image + 1) * planes.skip_in) * planes.n;
    out = (plane + (image + 1) * planes.skip_out) * planes.n;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    plane_extrema_kernel(const T* __restrict__ maps, Planes planes, int32_t chunks,
                         T* __restrict__ partial) {
  __shared__ Extrema<T> slots[kThreads / kWarp];
  const Chunk chunk(planes, chunks);
  Extrema<T> mine = kernels::no_extrema<T>();
  T poison = T(0);
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
    const T x = maps[chunk.in + i];
    mine = {kernels::lesser(mine.low, x), kernels::greater(mine.high, x)};
    poison += kernels::poisoned(kernels::positive(x));
  }
  mine.high += poison;
  const Extrema<T> all = join_block<kThreads>(mine, slots);
  if (threadIdx.x == 0) {
    partial[2 * static_cast<int64_t>(blockIdx.x)] = all.low;
    partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = all.high;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    plane_scores_kernel(const T* __restrict__ maps, Planes planes, Norm norm, T eps,
                        int32_t chunks, const T* __restrict__ partial, T* __restrict__ scores,
                        T* __restrict__ extrema) {
  __shared__ Extrema<T> slots[kThreads / kWarp];
  const Chunk chunk(planes, chunks);
  Extrema<T> plane = kernels::no_extrema<T>();
  for (int32_t i = threadIdx.x; i < chunks; i += kThreads) {
    const T* pair = partial + 2 * (chunk.plane * chunks + i);
    plane = kernels::join(plane, Extrema<T>{pair[0], pair[1]});
  }
  plane = join_block<kThreads>(plane, slots);
  if (threadIdx.x == 0 && chunk.begin == 0) {
    extrema[2 * chunk.plane] = plane.low;
    extrema[2 * chunk.plane + 1] = plane.high;
  }
  const Affine<T> affine = kernels::affine_of(norm, plane, eps);
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads)
    scores[chunk.out + i] = kernels::score_of(maps[chunk.in + i], affine);
}

// What a chunk knows: its sums, and the first positions of the plane's extrema within it.
template <class T>
struct Found {
  GradientSums<T> sums;
  int32_t low, high;
};

template <class T>
__device__ Found<T> join(Found<T> a, Found<T> b) {
  return {{a.sums.shifted + b.sums.shifted, a.sums.scaled + b.sums.scaled},
          a.low < b.low ? a.low : b.low,
          a.high < b.high ? a.high : b.high};
}

template <class T>
__device__ Found<T> from_lane(Found<T> v, int lanes) {
  return {{cuda::from_lane(v.sums.shifted, lanes), cuda::from_lane(v.sums.scaled, lanes)},
          cuda::from_lane(v.low, lanes),
          cuda::from_lane(v.high, lanes)};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gradient_sums_kernel(const T* gradient, const T* __restrict__ maps,
                         const T* __restrict__ extrema, Planes planes, Norm norm, T eps,
                         int32_t chunks, T* __restrict__ partial,
                         int32_t* __restrict__ positions) {
  __shared__ Found<T> slots[kThreads / kWarp];
  const Chunk chunk(planes, chunks);
  const Extrema<T> plane{extrema[2 * chunk.plane], extrema[2 * chunk.plane + 1]};
  const Affine<T> affine = kernels::affine_of(norm, plane, eps);
  Found<T> mine{{T(0), T(0)}, INT32_MAX, INT32_MAX};
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
    const T x = maps[chunk.in + i];
    const int32_t position = static_cast<int32_t>(i);
    const Found<T> here{kernels::gradient_terms(norm, x, gradient[chunk.out + i], affine),
                        x == plane.low ? position : INT32_MAX,
                        x == plane.high ? position : INT32_MAX};
    mine = join(mine, here);
  }
  const Found<T> all = join_block<kThreads>(mine, slots);
  if (threadIdx.x == 0) {
    const int64_t row = 2 * static_cast<int64_t>(blockIdx.x);
    partial[row] = all.sums.shifted;
    partial[row + 1] = all.sums.scaled;
    positions[row] = all.low;
    positions[row + 1] = all.high;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const T* gradient, const T* __restrict__ maps, const T* __restrict__ extrema,
                    Planes planes, Norm norm, T eps, int32_t chunks,
                    const T* __restrict__ partial, const int32_t* __restrict__ positions,
                    T* maps_gradient) {
  __shared__ Found<T> slots[kThreads / kWarp];
  const Chunk chunk(planes, chunks);
  Found<T> found{{T(0), T(0)}, INT32_MAX, INT32_MAX};
  for (int32_t i = threadIdx.x; i < chunks; i += kThreads) {
    const int64_t row = 2 * (chunk.plane * chunks + i);
    const GradientSums<T> sums{partial[row], partial[row + 1]};
    found = join(found, Found<T>{sums, positions[row], positions[row + 1]});
  }
  found = join_block<kThreads>(found, slots);
  const Extrema<T> plane{extrema[2 * chunk.plane], extrema[2 * chunk.plane + 1]};
  const Affine<T> affine = kernels::affine_of(norm, plane, eps);
  const Extrema<T> slopes = kernels::gradient_of_extrema(norm, found.sums, affine.scale);
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
    T slope = kernels::gradient_of(norm, maps[chunk.in + i], gradient[chunk.out + i], affine);
    if (i == found.low && plane.low > T(0)) slope += slopes.low;
    if (i == found.high && plane.high > T(0)) slope += slopes.high;
    maps_gradient[chunk.in + i] = slope;
  }
}

struct Grid {
  int32_t chunks;
  unsigned blocks;

  explicit Grid(const Planes& planes) {
    const int64_t count = plane_chunks(planes.n);
    const int64_t all = planes.batch * planes.num_classes * count;
    if (all > INT32_MAX || planes.n > INT32_MAX)
      throw std::invalid_argument("maps must have fewer than 2^31 positions and chunks");
    chunks = static_cast<int32_t>(count);
    blocks = static_cast<unsigned>(all);
  }
};

}  // namespace

int64_t plane_chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

template <class T>
void norm_planes(const T* maps, Planes planes, Norm norm, T eps, T* partial, T* scores, T* extrema,
                 int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const Grid grid(planes);
  if (grid.blocks == 0) return;
  WSIS_LAUNCH((&plane_extrema_kernel<T>), grid.blocks, kThreads, 0, queue, maps, planes,
              grid.chunks, partial);
  check(cudaGetLastError(), "plane_extrema");
  WSIS_LAUNCH((&plane_scores_kernel<T>), grid.blocks, kThreads, 0, queue, maps, planes, norm, eps,
              grid.chunks, partial, scores, extrema);
  check(cudaGetLastError(), "plane_scores");
}

template <class T>
void norm_planes_backward(const T* gradient, const T* maps, const T* extrema, Planes planes,
                          Norm norm, T eps, T* partial, int32_t* positions, T* maps_gradient,
                          int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const Grid grid(planes);
  if (grid.blocks == 0) return;
  WSIS_LAUNCH((&gradient_sums_kernel<T>), grid.blocks, kThreads, 0, queue, gradient, maps, extrema,
              planes, norm, eps, grid.chunks, partial, positions);
  check(cudaGetLastError(), "gradient_sums");
  WSIS_LAUNCH((&gradient_kernel<T>), grid.blocks, kThreads, 0, queue, gradient, maps, extrema,
              planes, norm, eps, grid.chunks, partial, positions, maps_gradient);
  check(cudaGetLastError(), "gradient");
}

#define WSIS_INSTANTIATE(T)                                                                      \
  template void norm_planes(const T*, Planes, Norm, T, T*, T*, T*, int, uintptr_t);              \
  template void norm_planes_backward(const T*, const T*, const T*, Planes, Norm, T, T*, int32_t*, \
                                     T*, int, uintptr_t);
WSIS_INSTANTIATE(float)
WSIS_INSTANTIATE(double)

}  // namespace wsis::cuda
