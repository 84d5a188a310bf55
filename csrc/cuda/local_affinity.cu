#include "cuda/local_affinity_pixels.h"

namespace wsis::cuda {
namespace {

template <class T, Kind kKind, class Neighbour>
__device__ T inverse_of(const T* plane, int32_t centre, int count, int32_t dilations,
                        Neighbour neighbour) {
  kernels::Spread<T> spread(plane[neighbour(0)]);
#pragma unroll
  for (int p = 1; p < count; ++p) spread.add(plane[neighbour(p)]);
  if (kKind == Kind::kPamr) spread.add(plane[centre], static_cast<T>(dilations));
  return kernels::inverse_scale<kKind>(
      spread.deviation(kKind == Kind::kPamr ? count + dilations : count));
}

// The fast path: all taps of a pixel in registers.
template <Kind kKind>
__global__ void __launch_bounds__(kThreads, 2)
    local_affinity_kernel(Recomputed<float, kKind> from, int32_t blocks,
                          Four<float>* __restrict__ packed) {
  using T = float;
  constexpr int kCount = kFast * kDirections;
  const Pixel i = my_pixel(from.height, from.width, blocks);
  if (!i.inside) return;
  const Near<kFast> near(from.taps, i.y, i.x, from.height, from.width);
  const T* plane = from.first_plane(i.image);
  T values[kCount];
#pragma unroll
  for (int p = 0; p < kCount; ++p) values[p] = 0;
  for (int32_t c = 0; c < from.channels; ++c, plane += from.size()) {
    const T inverse = inverse_of<T, kKind>(plane, i.index, kCount, kFast,
                                           [&](int p) { return near[p]; });
    const T centre = plane[i.index];
#pragma unroll
    for (int p = 0; p < kCount; ++p)
      values[p] += kernels::distance<kKind>(plane[near[p]], centre, inverse);
  }
  T lowest = values[0] * from.share, sum = 0;
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    values[p] *= from.share;
    lowest = kernels::smaller(lowest, values[p]);
  }
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    values[p] = kernels::exp_nonpositive(lowest - values[p]);
    sum += values[p];
  }
  const T factor = T(1) / sum;
  T highest = 0, second = 0;
  if constexpr (kKind == Kind::kVarm)
    from.soften_variation(from.first_plane(i.image), i.y, i.x, highest, second);
#pragma unroll
  for (int f = 0; f < kCount / 4; ++f) {
    Four<T> four;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      T weight = values[4 * f + k] * factor;
      if constexpr (kKind == Kind::kPar) weight += from.position[4 * f + k];
      if constexpr (kKind == Kind::kVarm)
        weight -= kernels::exp_nonpositive(
                      from.variation(from.first_plane(i.image), i.y, i.x, 4 * f + k) - highest) *
                  second;
      four.value[k] = weight;
    }
    packed[(i.image * (kCount / 4) + f) * from.size() + i.index] = four;
  }
}

// What Recomputed reads.
template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads)
    stats_kernel(Recomputed<T, kKind> from, int32_t blocks, T* stats) {
  const Pixel i = my_pixel(from.height, from.width, blocks);
  if (!i.inside) return;
  const int count = from.taps.count * kDirections;
  const T* plane = from.first_plane(i.image);
  T* own = stats + i.image * (from.channels + kExtra) * from.size() + i.index;
  for (int32_t c = 0; c < from.channels; ++c)
    own[c * from.size()] =
        inverse_of<T, kKind>(plane + c * from.size(), i.index, count, from.taps.count,
                             [&](int p) { return from.neighbour(i.y, i.x, p, 0, 0); });
  T lowest = from.away(plane, own, i.y, i.x, 0), sum = 0;
  for (int p = 1; p < count; ++p)
    lowest = kernels::smaller(lowest, from.away(plane, own, i.y, i.x, p));
  for (int p = 0; p < count; ++p)
    sum += kernels::exp_nonpositive(lowest - from.away(plane, own, i.y, i.x, p));
  T* rest = own + from.channels * from.size();
  rest[0] = lowest;
  rest[from.size()] = T(1) / sum;
  T highest = 0, second = 0;
  if constexpr (kKind == Kind::kVarm) from.soften_variation(plane, i.y, i.x, highest, second);
  rest[2 * from.size()] = highest;
  rest[3 * from.size()] = second;
}

template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Recomputed<T, kKind> from, int32_t blocks, T* packed) {
  const Pixel i = my_pixel(from.height, from.width, blocks);
  if (!i.inside) return;
  const int count = from.taps.count * kDirections;
  for (int p = 0; p < count; ++p)
    packed[((i.image * count + p) / 4 * from.size() + i.index) * 4 + p % 4] =
        from(i.image, i.y, i.x, p);
}

}  // namespace

template <class T>
void local_affinity(const T* image, const AffinityCall& call, const Images& images, T* stats,
                    T* packed) {
  const DeviceGuard guard(images.device);
  const auto queue = reinterpret_cast<cudaStream_t>(images.stream);
  const int32_t blocks = blocks_of(images);
  const auto grid = static_cast<unsigned>(blocks * images.batch);
  with_kind(call.kind, [&](auto kind) {
    constexpr Kind kKind = decltype(kind)::kValue;
    const auto from = recomputed<T, kKind>(image, stats, images.planes, call);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (packed && has_fast_path<T>(call)) {
        WSIS_LAUNCH((&local_affinity_kernel<kKind>), grid, kThreads, 0, queue, from, blocks,
                    reinterpret_cast<Four<T>*>(packed));
        return check(cudaGetLastError(), "local_affinity");
      }
    }
    if (stats) {
      WSIS_LAUNCH((&stats_kernel<T, kKind>), grid, kThreads, 0, queue, from, blocks, stats);
      check(cudaGetLastError(), "local_affinity");
      if (packed)
        WSIS_LAUNCH((&pack_kernel<T, kKind>), grid, kThreads, 0, queue, from, blocks, packed);
    }
    check(cudaGetLastError(), "local_affinity");
  });
}

template void local_affinity(const float*, const AffinityCall&, const Images&, float*, float*);
template void local_affinity(const double*, const AffinityCall&, const Images&, double*, double*);

}  // namespace wsis::cuda
