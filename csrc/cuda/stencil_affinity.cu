#include "cuda/stencil_affinity.h"

#include "cuda/stencil.h"

namespace wsis::cuda {
namespace {

using kernels::Offsets;

// The pair of a thread: pixel i and offset blockIdx.y of all planes.
struct Pair {
  StencilPixel i;
  int64_t at;         // of its affinity
  int32_t dy, dx;     // 0 if the offset reaches no pixel
  bool partner;       // inside the image

  __device__ Pair(const Grid& grid, const Offsets& offsets) : i(grid), dy(0), dx(0) {
    const auto plane = static_cast<int32_t>(blockIdx.y);
    at = (i.image * grid.planes + plane) * grid.size() + i.index;
    bool found = false;
    for (int32_t k = plane < offsets.count ? plane : offsets.count - 1; k >= 0 && !found; --k)
      if (offsets.plane[k] == plane) {
        found = true;
        dy = offsets.dy[k];
        dx = offsets.dx[k];
      }
    partner = found && grid.contains(i.y + dy, i.x + dx);
  }
};

template <class T>
__global__ void __launch_bounds__(kStencilThreads)
    pairs_kernel(const T* __restrict__ features, Grid grid, Offsets offsets, int32_t channels,
                 T* __restrict__ affinity) {
  const Pair pair(grid, offsets);
  if (!pair.i.inside) return;
  T value = 0;
  if (pair.partner) {
    const T* own = features + pair.i.image * channels * grid.size() + pair.i.index;
    const T* other = own + (pair.dy * grid.width + pair.dx);
    T sum = 0;
    for (int32_t c = 0; c < channels; ++c, own += grid.size(), other += grid.size())
      sum += kernels::absolute(*own - *other);
    value = kernels::exp_nonpositive(-sum * (T(1) / static_cast<T>(channels)));
  }
  affinity[pair.at] = value;
}

// Channel blockIdx.y.
template <class T>
__global__ void __launch_bounds__(kStencilThreads)
    pairs_backward_kernel(const T* __restrict__ gradient, const T* __restrict__ features,
                          const T* __restrict__ affinity, Grid grid, Offsets offsets,
                          int32_t channels, T* __restrict__ features_gradient) {
  const StencilPixel i(grid);
  if (!i.inside) return;
  const int64_t own = (i.image * channels + blockIdx.y) * grid.size() + i.index;
  const int64_t pairs = i.image * grid.planes * grid.size() + i.index;
  const T share = T(-1) / static_cast<T>(channels), feature = features[own];
  T sum = 0;
  for (int32_t k = 0; k < offsets.count; ++k) {
    const int32_t dy = offsets.dy[k], dx = offsets.dx[k], away = dy * grid.width + dx;
    const int64_t at = pairs + int64_t{offsets.plane[k]} * grid.size();
    if (grid.contains(i.y + dy, i.x + dx))
      sum += kernels::toward(gradient[at] * affinity[at] * share, feature - features[own + away]);
    if (grid.contains(i.y - dy, i.x - dx))
      sum -= kernels::toward(gradient[at - away] * affinity[at - away] * share,
                             features[own - away] - feature);
  }
  features_gradient[own] = sum;
}

template <class T>
__global__ void __launch_bounds__(kStencilThreads)
    paths_kernel(const T* __restrict__ edge, Grid grid, Offsets offsets,
                 uint8_t* __restrict__ chosen, T* __restrict__ affinity) {
  const Pair pair(grid, offsets);
  if (!pair.i.inside) return;
  T value = 0;
  int32_t taken = 0;
  if (pair.partner) {
    const T* own = edge + pair.i.image * grid.size() + pair.i.index;
    T largest = 0;
    bool first = true;
    kernels::for_path(pair.dy, pair.dx, [&](int32_t y, int32_t x, int32_t cell) {
      const T one = own[y * grid.width + x];
      if (!first && !kernels::is_larger(one, largest)) return;
      first = false;
      largest = one;
      taken = cell;
    });
    value = T(1) - largest;
  }
  affinity[pair.at] = value;
  chosen[pair.at] = static_cast<uint8_t>(taken);
}

// A pixel looks at all pairs on whose path it may lie.
template <class T>
__global__ void __launch_bounds__(kStencilThreads)
    paths_backward_kernel(const T* __restrict__ gradient, const uint8_t* __restrict__ chosen,
                          Grid grid, Offsets offsets, T* __restrict__ edge_gradient) {
  const StencilPixel i(grid);
  if (!i.inside) return;
  T sum = 0;
  for (int32_t k = 0; k < offsets.count; ++k) {
    const int32_t dy = offsets.dy[k], dx = offsets.dx[k];
    const int64_t plane = (i.image * grid.planes + offsets.plane[k]) * grid.size();
    kernels::for_path(dy, dx, [&](int32_t down, int32_t right, int32_t cell) {
      const int32_t y = i.y - down, x = i.x - right;  // the pair's first pixel
      if (!grid.contains(y, x) || !grid.contains(y + dy, x + dx)) return;
      const int64_t at = plane + y * grid.width + x;
      if (chosen[at] == cell) sum -= gradient[at];
    });
  }
  edge_gradient[i.image * grid.size() + i.index] = sum;
}

struct Launch {
  DeviceGuard guard;
  Grid grid;
  cudaStream_t stream;
  unsigned blocks;

  Launch(const StencilCall& call, int device, uintptr_t queue)
      : guard(device),
        grid(call.height, call.width, call.planes),
        stream(reinterpret_cast<cudaStream_t>(queue)),
        blocks(static_cast<unsigned>(call.batch * grid.blocks)) {}

  dim3 times(int32_t count) const { return dim3(blocks, static_cast<unsigned>(count), 1); }
};

}  // namespace

template <class T>
void pair_affinity(const T* features, const StencilCall& call, int device, uintptr_t stream,
                   T* affinity) {
  const Launch launch(call, device, stream);
  WSIS_LAUNCH((&pairs_kernel<T>), launch.times(call.planes), kStencilThreads, 0, launch.stream,
              features, launch.grid, call.offsets, call.channels, affinity);
  check(cudaGetLastError(), "pairs");
}

template <class T>
void pair_affinity_backward(const T* gradient, const T* features, const T* affinity,
                            const StencilCall& call, int device, uintptr_t stream,
                            T* features_gradient) {
  const Launch launch(call, device, stream);
  WSIS_LAUNCH((&pairs_backward_kernel<T>), launch.times(call.channels), kStencilThreads, 0,
              launch.stream, gradient, features, affinity, launch.grid, call.offsets,
              call.channels, features_gradient);
  check(cudaGetLastError(), "pairs backward");
}

template <class T>
void path_affinity(const T* edge, const StencilCall& call, int device, uintptr_t stream,
                   uint8_t* chosen, T* affinity) {
  const Launch launch(call, device, stream);
  WSIS_LAUNCH((&paths_kernel<T>), launch.times(call.planes), kStencilThreads, 0, launch.stream,
              edge, launch.grid, call.offsets, chosen, affinity);
  check(cudaGetLastError(), "paths");
}

template <class T>
void path_affinity_backward(const T* gradient, const uint8_t* chosen, const StencilCall& call,
                            int device, uintptr_t stream, T* edge_gradient) {
  const Launch launch(call, device, stream);
  WSIS_LAUNCH((&paths_backward_kernel<T>), launch.blocks, kStencilThreads, 0, launch.stream,
              gradient, chosen, launch.grid, call.offsets, edge_gradient);
  check(cudaGetLastError(), "paths backward");
}

#define WSIS_INSTANTIATE(T)                                                                      \
  template void pair_affinity(const T*, const StencilCall&, int, uintptr_t, T*);                 \
  template void pair_affinity_backward(const T*, const T*, const T*, const StencilCall&, int,    \
                                       uintptr_t, T*);                                           \
  template void path_affinity(const T*, const StencilCall&, int, uintptr_t, uint8_t*, T*);       \
  template void path_affinity_backward(const T*, const uint8_t*, const StencilCall&, int,        \
                                       uintptr_t, T*);
WSIS_INSTANTIATE(float)
WSIS_INSTANTIATE(double)
#undef WSIS_INSTANTIATE

}  // namespace wsis::cuda
