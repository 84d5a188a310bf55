#include "cuda/pixel_correlation_tiles.h"

namespace wsis::cuda {
namespace {

// ---- pixel by pixel ----------------------------------------------------------------------------

constexpr int kPixelThreads = 128;

// A pixel of a grid with one thread each, blocks image by image; `size` pixels an image.
struct Pixel {
  int64_t image;
  int32_t index;
  bool inside;

  __device__ Pixel(int32_t size, int32_t blocks) {
    image = blockIdx.x / blocks;
    index = static_cast<int32_t>(blockIdx.x % blocks) * kPixelThreads + threadIdx.x;
    inside = index < size;
  }
};

template <class T>
__global__ void __launch_bounds__(kPixelThreads)
    units_kernel(const T* __restrict__ features, Shape shape, int32_t blocks, double eps,
                 T* __restrict__ units, T* __restrict__ norms) {
  const Pixel i(shape.pixels, blocks);
  if (!i.inside) return;
  const int64_t first = i.image * shape.depth * shape.pixels + i.index;
  double squares = 0;  // of features beyond 1e19, too
  for (int32_t k = 0; k < shape.depth; ++k) {
    const double f = features[first + static_cast<int64_t>(k) * shape.pixels];
    squares += f * f;
  }
  const double norm = sqrt(squares);
  const T scale = static_cast<T>(1 / (norm + eps));
  norms[i.image * shape.pixels + i.index] = static_cast<T>(norm);
  for (int32_t k = 0; k < shape.depth; ++k) {
    const int64_t at = first + static_cast<int64_t>(k) * shape.pixels;
    units[at] = features[at] * scale;
  }
}

// terms: h, t, a, 1.
template <class T>
__global__ void __launch_bounds__(kPixelThreads)
    terms_kernel(const T* __restrict__ gradient, const T* __restrict__ cams,
                 const T* __restrict__ saved, Shape shape, int32_t blocks, T share,
                 T* __restrict__ terms) {
  const Pixel i(shape.pixels, blocks);
  if (!i.inside) return;
  const int64_t n = shape.pixels, count = shape.classes;
  const T* in = gradient + i.image * count * n + i.index;
  const T* map = cams + i.image * count * n + i.index;
  const T* out = saved + i.image * (count + 1) * n + i.index;
  T* to = terms + i.image * 2 * (count + 1) * n + i.index;
  const T scale = out[count * n] * share;
  T sum = 0;
  for (int64_t c = 0; c < count; ++c) {
    const T h = in[c * n] * scale;
    sum -= h * out[c * n];
    to[c * n] = h;
    to[(count + 1 + c) * n] = map[c * n];
  }
  to[count * n] = sum;
  to[(2 * count + 1) * n] = T(1);
}

// From the gradient to unit features, in place, that to features.
template <class T>
__global__ void __launch_bounds__(kPixelThreads)
    features_kernel(const T* __restrict__ units, const T* __restrict__ norms, Shape shape,
                    int32_t blocks, double eps, T* __restrict__ features_gradient) {
  const Pixel i(shape.pixels, blocks);
  if (!i.inside) return;
  const int64_t first = i.image * shape.depth * shape.pixels + i.index;
  const T norm = norms[i.image * shape.pixels + i.index];
  T dot = 0;
  for (int32_t k = 0; k < shape.depth; ++k) {
    const int64_t at = first + static_cast<int64_t>(k) * shape.pixels;
    dot += features_gradient[at] * units[at];
  }
  dot = kernels::along_feature(dot, norm);
  const T scale = static_cast<T>(1 / (static_cast<double>(norm) + eps));
  for (int32_t k = 0; k < shape.depth; ++k) {
    const int64_t at = first + static_cast<int64_t>(k) * shape.pixels;
    features_gradient[at] = features_gradient[at] * scale - units[at] * dot;
  }
}

// ---- tile by tile ------------------------------------------------------------------------------

// Weighted sums of kChannels - 1 maps, and in channel 0 of the weights. Forward: maps are the cams,
// of which the mean is taken; backward: maps are h, added to the gradient as they are.
template <class T, Similarity kSimilarity, int kChannels, bool kForward>
__global__ void __launch_bounds__(kThreads)
    maps_kernel(const T* __restrict__ units, const T* __restrict__ maps, int64_t maps_stride,
                Shape shape, T inverse, T sum_eps, T share, T* __restrict__ saved,
                T* __restrict__ result) {
  constexpr int kCount = kChannels / kGroups<T>;
  __shared__ Factors<T> factors;
  __shared__ Tile<T> tile;
  __shared__ T source[kChannels][kSide<T>];
  const int64_t n = shape.pixels;
  const int32_t first = static_cast<int32_t>(blockIdx.y) * (kChannels - 1);
  const int32_t count = min(kChannels - 1, shape.classes - first);
  units += shape.image() * shape.depth * n;
  maps += shape.image() * maps_stride + first * n;
  T sums[kCount] = {};
  for (int32_t other = 0; other < shape.tiles; ++other) {
    T values[kOwn<T>][kOwn<T>];
    similarities<T, kSimilarity>(factors, units, shape, other, inverse, values);
    __syncthreads();
    tile.write(values);
    for (int e = threadIdx.x; e < kChannels * kSide<T>; e += kThreads) {
      const int channel = e / kSide<T>;
      const int32_t pixel = other * kSide<T> + e % kSide<T>;
      T value = 0;
      if (pixel < shape.pixels && channel <= count)
        value = channel == 0 ? T(1) : maps[(channel - 1) * n + pixel];
      source[channel][e % kSide<T>] = value;
    }
    __syncthreads();
    spread<T, kCount>(tile, source, sums);
  }
  const int own = threadIdx.x % kSide<T>, group = threadIdx.x / kSide<T>;
  __syncthreads();
  if (group == 0) source[0][own] = T(1) / (sums[0] + sum_eps);
  __syncthreads();
  const int32_t pixel = shape.tile() * kSide<T> + own;
  if (pixel >= shape.pixels) return;
  result += shape.image() * shape.classes * n + pixel;
  if (kForward) {
    saved += shape.image() * (shape.classes + 1) * n + pixel;
    if (group == 0 && first == 0) saved[shape.classes * n] = source[0][own];
  }
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const int channel = group + s * kGroups<T>;
    if (channel == 0 || channel > count) continue;
    const int64_t at = (first + channel - 1) * n;
    if (kForward) {
      const T mean = sums[s] * source[0][own];
      saved[at] = mean;
      result[at] += share * mean;
    } else {
      result[at] += sums[s];
    }
  }
}

constexpr int kUnits = 128;  // that a block adds up in registers, 32 a thread

// Gradient to kUnits unit features from blockIdx.y * kUnits on.
template <class T, Similarity kSimilarity>
__global__ void __launch_bounds__(kThreads)
    units_gradient_kernel(const T* __restrict__ units, const T* __restrict__ terms, Shape shape,
                          T inverse, T* __restrict__ units_gradient) {
  constexpr int kCount = kStep / kGroups<T>;
  __shared__ Factors<T> factors;
  __shared__ Tile<T> tile;
  const int64_t n = shape.pixels;
  const int32_t half = shape.classes + 1, first = static_cast<int32_t>(blockIdx.y) * kUnits;
  units += shape.image() * shape.depth * n;
  terms += shape.image() * 2 * half * n;
  const auto term = [&](int32_t k, int32_t pixel) {
    return pixel < shape.pixels ? terms[k * n + pixel] : T(0);
  };
  T sums[kUnits / kStep][kCount] = {};
  for (int32_t other = 0; other < shape.tiles; ++other) {
    T values[kOwn<T>][kOwn<T>], pairs[kOwn<T>][kOwn<T>] = {};
    similarities<T, kSimilarity>(factors, units, shape, other, inverse, values);
    multiply(
        factors, 2 * half, [&](int32_t k, int p) { return term(k, other * kSide<T> + p); },
        [&](int32_t k, int p) {
          return term(k < half ? k + half : k - half, shape.tile() * kSide<T> + p);
        },
        pairs);
#pragma unroll
    for (int r = 0; r < kOwn<T>; ++r)
#pragma unroll
      for (int v = 0; v < kOwn<T>; ++v)
        values[r][v] = kernels::pair_gradient<kSimilarity>(values[r][v], pairs[r][v], inverse);
    tile.write(values);
#pragma unroll
    for (int step = 0; step < kUnits / kStep; ++step) {
      const int32_t begin = first + step * kStep;
      if (begin >= shape.depth) break;
      __syncthreads();
      for (int e = threadIdx.x; e < kStep * kSide<T>; e += kThreads) {
        const int32_t k = begin + e / kSide<T>, pixel = other * kSide<T> + e % kSide<T>;
        factors.rows[e / kSide<T>][e % kSide<T>] =
            k < shape.depth && pixel < shape.pixels ? units[k * n + pixel] : T(0);
      }
      __syncthreads();
      spread<T, kCount>(tile, factors.rows, sums[step]);
    }
  }
  const int own = threadIdx.x % kSide<T>, group = threadIdx.x / kSide<T>;
  const int32_t pixel = shape.tile() * kSide<T> + own;
  if (pixel >= shape.pixels) return;
  units_gradient += shape.image() * shape.depth * n + pixel;
#pragma unroll
  for (int step = 0; step < kUnits / kStep; ++step)
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      const int32_t k = first + step * kStep + group + s * kGroups<T>;
      if (k < shape.depth) units_gradient[k * n] = sums[step][s];
    }
}

// ---- launches ----------------------------------------------------------------------------------

inline int32_t pixel_blocks(const Shape& shape) {
  return (shape.pixels + kPixelThreads - 1) / kPixelThreads;
}

template <class T>
void find_units(const T* features, const Shape& shape, const Correlation& call, cudaStream_t queue,
                T* units, T* norms) {
  WSIS_LAUNCH((&units_kernel<T>), blocks_of(call.batch, pixel_blocks(shape)), kPixelThreads, 0,
              queue, features, shape, pixel_blocks(shape), call.eps, units, norms);
  check(cudaGetLastError(), "units");
}

template <class T, Similarity kSimilarity, int kChannels, bool kForward>
void sum_maps(const T* units, const T* maps, int64_t maps_stride, const Shape& shape,
              const Correlation& call, cudaStream_t queue, T* saved, T* result) {
  const unsigned groups = (call.classes + kChannels - 2) / (kChannels - 1);
  const dim3 grid(blocks_of(call.batch, shape.tiles), groups, 1);
  WSIS_LAUNCH((&maps_kernel<T, kSimilarity, kChannels, kForward>), grid, kThreads, 0, queue, units,
              maps, maps_stride, shape, static_cast<T>(call.inverse), static_cast<T>(call.sum_eps),
              static_cast<T>(call.share), saved, result);
  check(cudaGetLastError(), "maps");
}

constexpr int kFew = 32, kMany = 64;  // channels, the sum among them

template <class T, bool kForward>
void sum_maps(const T* units, const T* maps, int64_t maps_stride, const Shape& shape,
              const Correlation& call, cudaStream_t queue, T* saved, T* result) {
  const bool few = call.classes < kFew, relu = call.similarity == Similarity::kRelu;
  auto* launch = few ? relu ? &sum_maps<T, Similarity::kRelu, kFew, kForward>
                            : &sum_maps<T, Similarity::kSoftmax, kFew, kForward>
                 : relu ? &sum_maps<T, Similarity::kRelu, kMany, kForward>
                        : &sum_maps<T, Similarity::kSoftmax, kMany, kForward>;
  launch(units, maps, maps_stride, shape, call, queue, saved, result);
}

}  // namespace

template <class T>
void pixel_correlation(const T* cams, const T* features, const Correlation& call,
                       const Queue& queue, T* units, T* norms, T* saved, T* result) {
  const DeviceGuard guard(queue.device);
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  const Shape shape = shape_of<T>(call);
  find_units(features, shape, call, stream, units, norms);
  sum_maps<T, true>(units, cams, int64_t{call.classes} * call.pixels, shape, call, stream, saved,
                    result);
}

template <class T>
void pixel_correlation_backward(const T* gradient, const T* cams, const T* features, const T* saved,
                                const Correlation& call, const Queue& queue, T* units, T* norms,
                                T* terms, T* cams_gradient, T* features_gradient) {
  const DeviceGuard guard(queue.device);
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  const Shape shape = shape_of<T>(call);
  const int32_t blocks = pixel_blocks(shape);
  const unsigned grid = blocks_of(call.batch, blocks);
  find_units(features, shape, call, stream, units, norms);
  WSIS_LAUNCH((&terms_kernel<T>), grid, kPixelThreads, 0, stream, gradient, cams, saved, shape,
              blocks, static_cast<T>(call.share), terms);
  check(cudaGetLastError(), "terms");
  if (cams_gradient)
    sum_maps<T, false>(units, terms, 2 * (int64_t{call.classes} + 1) * call.pixels, shape, call,
                       stream, nullptr, cams_gradient);
  if (!features_gradient || call.depth == 0) return;
  auto* kernel = call.similarity == Similarity::kRelu
                     ? &units_gradient_kernel<T, Similarity::kRelu>
                     : &units_gradient_kernel<T, Similarity::kSoftmax>;
  const unsigned groups = (call.depth + kUnits - 1) / kUnits;
  WSIS_LAUNCH(kernel, dim3(blocks_of(call.batch, shape.tiles), groups, 1), kThreads, 0, stream,
              units, terms, shape, static_cast<T>(call.inverse), features_gradient);
  check(cudaGetLastError(), "units_gradient");
  WSIS_LAUNCH((&features_kernel<T>), grid, kPixelThreads, 0, stream, units, norms, shape, blocks,
              call.eps, features_gradient);
  check(cudaGetLastError(), "features");
}

#define WSIS_INSTANTIATE(T)                                                                       \
  template void pixel_correlation(const T*, const T*, const Correlation&, const Queue&, T*, T*,   \
                                  T*, T*);                                                        \
  template void pixel_correlation_backward(const T*, const T*, const T*, const T*,                \
                                           const Correlation&, const Queue&, T*, T*, T*, T*, T*);
WSIS_INSTANTIATE(float)
WSIS_INSTANTIATE(double)
#undef WSIS_INSTANTIATE

}  // namespace wsis::cuda
