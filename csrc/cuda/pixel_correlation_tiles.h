// Tiles of pixel correlation: a block owns kSide pixels, the columns of a tile, and walks over all
// pixels of the image, kSide rows at a time.
#pragma once

#include "cuda/launch.h"
#include "cuda/pixel_correlation.h"

namespace wsis::cuda {

using kernels::Similarity;

constexpr int kThreads = 256;
constexpr int kAcross = 16;  // threads along a side of the tile
constexpr int kStep = 16;    // factors of a product that are in shared memory at once

// As large as 48 KiB of shared memory allow.
template <class T>
constexpr int kSide = sizeof(T) == 4 ? 64 : 32;
template <class T>
constexpr int kOwn = kSide<T> / kAcross;  // rows and columns of a thread
template <class T>
constexpr int kGroups = kThreads / kSide<T>;  // threads per owned pixel

struct Shape {
  int32_t classes, depth, pixels, tiles;  // tiles of an image

  __device__ int64_t image() const { return blockIdx.x / tiles; }
  __device__ int32_t tile() const { return blockIdx.x % tiles; }
};

template <class T>
Shape shape_of(const Correlation& call) {
  return {call.classes, call.depth, call.pixels, (call.pixels + kSide<T> - 1) / kSide<T>};
}

inline unsigned blocks_of(int64_t batch, int64_t tiles) {
  if (batch * tiles > INT32_MAX)
    throw std::invalid_argument("there must be fewer than 2^31 tiles of pixels");
  return static_cast<unsigned>(batch * tiles);
}

template <class T>
struct alignas(16) Factors {
  T rows[kStep][kSide<T>], columns[kStep][kSide<T>];
};

// sums[r][v] += sum_k row(k, p) * column(k, q) for the pixels p, q of this thread. The functions
// give 0 outside the image; a barrier is passed before shared memory is written.
template <class T, class Row, class Column>
__device__ void multiply(Factors<T>& factors, int32_t depth, Row row, Column column,
                         T (&sums)[kOwn<T>][kOwn<T>]) {
  const int down = threadIdx.x / kAcross * kOwn<T>, across = threadIdx.x % kAcross * kOwn<T>;
  for (int32_t first = 0; first < depth; first += kStep) {
    __syncthreads();
    for (int e = threadIdx.x; e < kStep * kSide<T>; e += kThreads) {
      const int k = e / kSide<T>, p = e % kSide<T>;
      const bool inside = first + k < depth;
      factors.rows[k][p] = inside ? row(first + k, p) : T(0);
      factors.columns[k][p] = inside ? column(first + k, p) : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      T left[kOwn<T>], right[kOwn<T>];
#pragma unroll
      for (int r = 0; r < kOwn<T>; ++r) {
        left[r] = factors.rows[k][down + r];
        right[r] = factors.columns[k][across + r];
      }
#pragma unroll
      for (int r = 0; r < kOwn<T>; ++r)
#pragma unroll
        for (int v = 0; v < kOwn<T>; ++v) sums[r][v] += left[r] * right[v];
    }
  }
}

// S of a thread's pairs.
template <class T, Similarity kSimilarity>
__device__ void similarities(Factors<T>& factors, const T* units, const Shape& shape, int32_t other,
                             T inverse, T (&values)[kOwn<T>][kOwn<T>]) {
  const auto unit = [&](int32_t k, int32_t pixel) {
    return pixel < shape.pixels ? units[static_cast<int64_t>(k) * shape.pixels + pixel] : T(0);
  };
#pragma unroll
  for (int r = 0; r < kOwn<T>; ++r)
#pragma unroll
    for (int v = 0; v < kOwn<T>; ++v) values[r][v] = T(0);
  multiply(
      factors, shape.depth, [&](int32_t k, int p) { return unit(k, other * kSide<T> + p); },
      [&](int32_t k, int p) { return unit(k, shape.tile() * kSide<T> + p); }, values);
#pragma unroll
  for (int r = 0; r < kOwn<T>; ++r)
#pragma unroll
    for (int v = 0; v < kOwn<T>; ++v)
      values[r][v] = kernels::similarity<kSimilarity>(values[r][v], inverse);
}

template <class T>
struct alignas(16) Tile {
  T at[kSide<T>][kSide<T>];  // [other, own]

  __device__ void write(const T (&values)[kOwn<T>][kOwn<T>]) {
    const int down = threadIdx.x / kAcross * kOwn<T>, across = threadIdx.x % kAcross * kOwn<T>;
#pragma unroll
    for (int r = 0; r < kOwn<T>; ++r)
#pragma unroll
      for (int v = 0; v < kOwn<T>; ++v) at[down + r][across + v] = values[r][v];
  }
};

// sums[s] += sum_p tile(p, own) * source[group + s * kGroups][p], for kCount rows of source.
template <class T, int kCount>
__device__ void spread(const Tile<T>& tile, const T (*source)[kSide<T>], T* sums) {
  const int own = threadIdx.x % kSide<T>, group = threadIdx.x / kSide<T>;
#pragma unroll 1
  for (int p = 0; p < kSide<T>; p += 4) {
    T weights[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) weights[q] = tile.at[p + q][own];
#pragma unroll
    for (int s = 0; s < kCount; ++s)
#pragma unroll
      for (int q = 0; q < 4; ++q) sums[s] += weights[q] * source[group + s * kGroups<T>][p + q];
  }
}

}  // namespace wsis::cuda
