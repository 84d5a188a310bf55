// What a thread of local affinity and propagation works on: its pixel, the places of its taps, and
// weights that come from memory or are computed anew.
#pragma once

#include "cuda/launch.h"
#include "cuda/local_affinity.h"

namespace wsis::cuda {

using kernels::kDirections;
using kernels::Kind;
using kernels::Position;
using kernels::Taps;

constexpr int kThreads = 128;
constexpr int kExtra = 4;      // of stats, after the channels

// Four weights, read and written at once.
template <class T>
struct alignas(16) Four {
  T value[4];
};

struct Pixel {
  int64_t image;
  int32_t y, x, index;  // index in its plane
  bool inside;
};

// One thread per pixel, blocks image by image.
__device__ inline Pixel my_pixel(int32_t height, int32_t width, int32_t blocks) {
  const int64_t index = static_cast<int64_t>(blockIdx.x % blocks) * blockDim.x + threadIdx.x;
  const int32_t i = static_cast<int32_t>(index < height * width ? index : 0);
  return {blockIdx.x / blocks, i / width, i % width, i, index < height * width};
}

// Where the taps of a pixel lie in a plane; for each dilation two rows and two columns.
template <int kDilations>
struct Near {
  int32_t row, column, rows[kDilations][2], columns[kDilations][2];

  __device__ Near(const Taps& taps, int32_t y, int32_t x, int32_t height, int32_t width)
      : row(y * width), column(x) {
#pragma unroll
    for (int d = 0; d < kDilations; ++d) {
      rows[d][0] = kernels::clamp_index(y - taps.dy[d], height) * width;
      rows[d][1] = kernels::clamp_index(y + taps.dy[d], height) * width;
      columns[d][0] = kernels::clamp_index(x - taps.dx[d], width);
      columns[d][1] = kernels::clamp_index(x + taps.dx[d], width);
    }
  }
  __device__ int32_t operator[](int p) const {
    const int d = p / kDirections, dy = kernels::step_y(p % kDirections);
    const int dx = kernels::step_x(p % kDirections);
    return (dy == 0 ? row : rows[d][dy > 0]) + (dx == 0 ? column : columns[d][dx > 0]);
  }
};

// Any weight of any pixel from the image and its stats, tap by tap.
template <class T, Kind kKind>
struct Recomputed {
  const T* image;  // [B, K, H, W]
  const T* stats;  // [B, K + 4, H, W]
  Position<T> position;
  Taps taps;
  int32_t channels, height, width;
  T share;  // 1 / channels

  __device__ int64_t size() const { return static_cast<int64_t>(height) * width; }
  __device__ const T* first_plane(int64_t b) const { return image + b * channels * size(); }

  __device__ int32_t neighbour(int32_t y, int32_t x, int p, int32_t below, int32_t right) const {
    const int d = p / kDirections, k = p % kDirections;
    return kernels::clamp_index(y + kernels::step_y(k) * taps.dy[d] + below, height) * width +
           kernels::clamp_index(x + kernels::step_x(k) * taps.dx[d] + right, width);
  }
  // Mean distance over the channels; `own` is the pixel's first value of stats.
  __device__ T away(const T* plane, const T* own, int32_t y, int32_t x, int p) const {
    const int32_t there = neighbour(y, x, p, 0, 0);
    T sum = 0;
    for (int32_t c = 0; c < channels; ++c, plane += size())
      sum += kernels::distance<kKind>(plane[there], plane[y * width + x], own[c * size()]);
    return sum * share;
  }
  // Mean variation over the channels.
  __device__ T variation(const T* plane, int32_t y, int32_t x, int p) const {
    const int32_t there = neighbour(y, x, p, 0, 0), below = neighbour(y, x, p, 1, 0);
    const int32_t right = neighbour(y, x, p, 0, 1);
    const T rows = y + 1 < height ? T(1) : T(0), columns = x + 1 < width ? T(1) : T(0);
    T sum = 0;
    for (int32_t c = 0; c < channels; ++c, plane += size())
      sum += kernels::variation(plane[there], plane[below], plane[right], rows, columns);
    return sum * share;
  }
  // Weight of tap p of pixel (y, x).
  __device__ T operator()(int64_t b, int32_t y, int32_t x, int p) const {
    const T* own = stats + b * (channels + kExtra) * size() + y * width + x;
    const T* rest = own + channels * size();
    const T* plane = first_plane(b);
    const T distance = away(plane, own, y, x, p);
    T weight = kernels::exp_nonpositive(rest[0] - distance) * rest[size()];
    if constexpr (kKind == Kind::kPar) weight += position[p];
    if constexpr (kKind == Kind::kVarm)
      weight -= kernels::exp_nonpositive(variation(plane, y, x, p) - rest[2 * size()]) *
                rest[3 * size()];
    return weight;
  }
  // Largest exponent of the variation and the factor of its softmax.
  __device__ void soften_variation(const T* plane, int32_t y, int32_t x, T& highest,
                                   T& factor) const {
    const int count = taps.count * kDirections;
    highest = variation(plane, y, x, 0);
#pragma unroll 1
    for (int p = 1; p < count; ++p) {
      const T value = variation(plane, y, x, p);
      highest = highest < value ? value : highest;
    }
    T sum = 0;
#pragma unroll 1
    for (int p = 0; p < count; ++p)
      sum += kernels::exp_nonpositive(variation(plane, y, x, p) - highest);
    factor = T(1) / sum * kernels::kSecondShare<T>;
  }
};

// Weights read from memory.
template <class T>
struct Packed {
  const T* data;  // [B, P / 4, H, W, 4]
  int32_t taps, height, width;

  __device__ T operator()(int64_t b, int32_t y, int32_t x, int p) const {
    const int64_t four = (b * taps + p) / 4 * height * width + y * width + x;
    return data[four * 4 + p % 4];
  }
};

inline Taps taps_of(const AffinityCall& call) {
  return kernels::make_taps(call.dilations, call.num_dilations, call.height, call.width);
}

inline int32_t blocks_of(const Images& images) {
  return (images.height * images.width + kThreads - 1) / kThreads;
}

template <class T, Kind kKind>
Recomputed<T, kKind> recomputed(const T* image, const T* stats, int32_t channels,
                                const AffinityCall& call) {
  Recomputed<T, kKind> from{image,    stats,       {},         taps_of(call),
                            channels, call.height, call.width, T(1) / static_cast<T>(channels)};
  if (kKind == Kind::kPar)
    from.position = kernels::make_position<T>(call.position, call.num_dilations);
  return from;
}

// Calls body with the kind as a type.
template <Kind kKind>
struct KindIs {
  static constexpr Kind kValue = kKind;
};
template <class Body>
void with_kind(Kind kind, Body body) {
  if (kind == Kind::kPamr) body(KindIs<Kind::kPamr>());
  if (kind == Kind::kPar) body(KindIs<Kind::kPar>());
  if (kind == Kind::kVarm) body(KindIs<Kind::kVarm>());
}

}  // namespace wsis::cuda
