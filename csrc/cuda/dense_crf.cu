#include "cuda/dense_crf.h"

#include "cuda/launch.h"
#include "kernels/dense_crf.h"

namespace wsis::cuda {
namespace {

constexpr unsigned kAllLanes = ~0u;

// One pass over the pixels: what goes in, what is done, what comes out.
template <class T>
struct Pass {
  const T* values;  // [B, C, N], or null: 0
  T sign;           // multiplied with values
  bool slice, softmax, splat;
  T* probs;
  uint8_t* few_labels;
  int32_t* labels;
  Tiling tiling;
  int32_t classes, quads;
};

// Fours of channels of a pixel next to each other in shared memory. One four between two pixels
// keeps threads that walk over pixels out of each other's banks.
template <int kGroup>
constexpr int kStride = kGroup == 1 ? 1 : kGroup + 1;

// A thread's own pixel, all channels of a chunk: planes are read and written in whole lines.
template <class T, int kGroup>
__device__ void load_chunk(const Pass<T>& pass, int32_t pixel, int32_t chunk, Quad<T>* tile) {
  const int64_t plane = pass.tiling.pixels();
  const int64_t from = static_cast<int64_t>(blockIdx.y) * pass.classes * plane + pixel;
  const bool given = pass.values && pixel >= 0;
  for (int q = 0; q < kGroup; ++q) {
    Quad<T> quad;
    for (int k = 0; k < 4; ++k) {
      const int32_t c = (chunk * kGroup + q) * 4 + k;
      quad.value[k] = c >= pass.classes ? (pass.softmax ? T(-INFINITY) : T(0))
                      : given           ? pass.sign * pass.values[from + c * plane]
                                        : T(0);
    }
    tile[threadIdx.x * kStride<kGroup> + q] = quad;
  }
}

template <class T, int kGroup>
__device__ void store_chunk(const Pass<T>& pass, int32_t pixel, int32_t chunk,
                            const Quad<T>* tile) {
  const int64_t plane = pass.tiling.pixels();
  T* to = pass.probs + static_cast<int64_t>(blockIdx.y) * pass.classes * plane + pixel;
  for (int q = 0; q < kGroup; ++q) {
    const Quad<T> quad = tile[threadIdx.x * kStride<kGroup> + q];
    for (int k = 0; k < 4; ++k) {
      const int32_t c = (chunk * kGroup + q) * 4 + k;
      if (c < pass.classes) to[c * plane] = quad.value[k];
    }
  }
}

// The tile's number in a lattice.
__device__ int64_t tile_of(const LatticeView& lattice, const Tiling& tiling) {
  return blockIdx.x + (lattice.shared ? 0 : static_cast<int64_t>(blockIdx.y) * tiling.tiles);
}

__device__ int64_t factor_at(const LatticeView& lattice, const Tiling& tiling, int32_t pixel) {
  return pixel + (lattice.shared ? 0 : static_cast<int64_t>(blockIdx.y) * tiling.pixels());
}

// Adds what all terms say of pixel i of the tile: four channels.
template <class T>
__device__ void slice(const Pass<T>& pass, const Terms<T>& terms, int32_t i, int32_t quad,
                      Quad<T>& logits) {
  for (int32_t k = 0; k < terms.count; ++k) {
    const Pairwise<T>& term = terms.term[k];
    const LatticeView& lattice = term.lattice;
    const int64_t tile = tile_of(lattice, pass.tiling), base = tile * lattice.corners * kTile + i;
    const int64_t copy = lattice.shared ? blockIdx.y : 0;
    const int32_t* rows = lattice.rows + lattice.first[tile];
    const Quad<T>* values = term.result() + copy * (lattice.vertices + 1) * pass.quads + quad;
    Quad<T> sum{};
    for (int32_t r = 0; r < lattice.corners; ++r) {
      const T weight = lattice.weights[base + r * kTile];
      const int64_t row = rows[lattice.local[base + r * kTile]];
      const Quad<T> value = values[row * pass.quads];
#pragma unroll
      for (int c = 0; c < 4; ++c) sum.value[c] += weight * value.value[c];
    }
    const int32_t pixel = pass.tiling.pixel(blockIdx.x, i);
    const T after = term.after && pixel >= 0
                        ? T(term.after[factor_at(lattice, pass.tiling, pixel)])
                        : T(1);
#pragma unroll
    for (int c = 0; c < 4; ++c) logits.value[c] += after * sum.value[c];
  }
}

// The tile's pixels to one partial row per vertex of its list.
template <class T, int kGroup>
__device__ void splat(const Pass<T>& pass, const Terms<T>& terms, int32_t quad,
                      const Quad<T>* tile) {
  for (int32_t k = 0; k < terms.count; ++k) {
    const Pairwise<T>& term = terms.term[k];
    const LatticeView& lattice = term.lattice;
    const int64_t number = tile_of(lattice, pass.tiling);
    const int64_t base = number * lattice.corners * kTile;
    const int64_t copy = lattice.shared ? blockIdx.y : 0;
    const int32_t first = lattice.first[number], count = lattice.first[number + 1] - first;
    const int32_t all = pass.tiling.inside(blockIdx.x) * lattice.corners;
    for (int32_t e = threadIdx.x / kGroup; e < count; e += kTile / kGroup) {
      const int32_t end = e + 1 < count ? lattice.starts[first + e + 1] : all;
      Quad<T> sum{};
      for (int32_t at = lattice.starts[first + e]; at < end; ++at) {
        const int32_t corner = lattice.order[base + at], i = corner % kTile;
        T weight = lattice.weights[base + corner];
        if (term.before)
          weight *= term.before[factor_at(lattice, pass.tiling, pass.tiling.pixel(blockIdx.x, i))];
        const Quad<T> value = tile[i * kStride<kGroup> + threadIdx.x % kGroup];
#pragma unroll
        for (int c = 0; c < 4; ++c) sum.value[c] += weight * value.value[c];
      }
      if (quad < pass.quads)
        term.partial[(copy * lattice.entries + first + e) * pass.quads + quad] = sum;
    }
  }
}

template <class T>
__device__ T highest_of(const Quad<T>& quad) {
  return kernels::larger(kernels::larger(quad.value[0], quad.value[1]),
                         kernels::larger(quad.value[2], quad.value[3]));
}

template <class T, int kGroup>
__device__ T highest_of_group(T value) {
  for (int lanes = kGroup / 2; lanes > 0; lanes /= 2)
    value = kernels::larger(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

template <class T, int kGroup>
__device__ T sum_of_group(T value) {
  for (int lanes = kGroup / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// One block per tile and image (blockIdx.y). kGroup threads work on a pixel, four channels each, so
// they read a row of the lattice side by side; a thread has kGroup pixels of the tile. kMany: the
// channels come in chunks, and the softmax takes its sum in a pass of its own.
template <class T, int kGroup, bool kMany>
__global__ void __launch_bounds__(kTile) pixels_kernel(Pass<T> pass, Terms<T> terms) {
  WSIS_DYNAMIC_SHARED(Quad<T>, tile);
  constexpr int kPixels = kTile / kGroup;  // at a time
  const int32_t pixel = pass.tiling.pixel(blockIdx.x, threadIdx.x);
  const int32_t own = threadIdx.x % kGroup, chunks = kMany ? (pass.quads + kGroup - 1) / kGroup : 1;
  T highest[kMany ? kGroup : 1], total[kMany ? kGroup : 1];
  if (kMany && pass.softmax) {
#pragma unroll
    for (int step = 0; step < kGroup; ++step) highest[step] = -INFINITY, total[step] = 0;
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      load_chunk<T, kGroup>(pass, pixel, chunk, tile);
      __syncthreads();
      const int32_t quad = chunk * kGroup + own;
      if (quad < pass.quads) {
#pragma unroll
        for (int step = 0; step < kGroup; ++step) {
          const int32_t i = step * kPixels + threadIdx.x / kGroup;
          Quad<T> logits = tile[i * kStride<kGroup> + own];
          if (pass.slice) slice(pass, terms, i, quad, logits);
          const T next = kernels::larger(highest[step], highest_of(logits));
          total[step] *= kernels::unnormalised(highest[step], next);
          for (int c = 0; c < 4; ++c) total[step] += kernels::unnormalised(logits.value[c], next);
          highest[step] = next;
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int step = 0; step < kGroup; ++step) {
      const T most = highest_of_group<T, kGroup>(highest[step]);
      total[step] = sum_of_group<T, kGroup>(total[step] *
                                            kernels::unnormalised(highest[step], most));
      highest[step] = most;
    }
  }
  T best = -INFINITY;
  int32_t label = 0;
  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    load_chunk<T, kGroup>(pass, pixel, chunk, tile);
    __syncthreads();
    const int32_t quad = chunk * kGroup + own;
#pragma unroll
    for (int step = 0; step < kGroup; ++step) {
      const int32_t i = step * kPixels + threadIdx.x / kGroup;
      Quad<T> logits = tile[i * kStride<kGroup> + own];
      if (pass.slice && quad < pass.quads) slice(pass, terms, i, quad, logits);
      if (pass.softmax) {
        const T most =
            kMany ? highest[kMany ? step : 0] : highest_of_group<T, kGroup>(highest_of(logits));
        T sum = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          logits.value[c] = kernels::unnormalised(logits.value[c], most);
          sum += logits.value[c];
        }
        const T inverse = T(1) / (kMany ? total[kMany ? step : 0] : sum_of_group<T, kGroup>(sum));
#pragma unroll
        for (int c = 0; c < 4; ++c) logits.value[c] *= inverse;
      }
      tile[i * kStride<kGroup> + own] = logits;
    }
    __syncthreads();
    if (pass.probs && pixel >= 0) store_chunk<T, kGroup>(pass, pixel, chunk, tile);
    if (pass.few_labels || pass.labels) {
      const int32_t from = chunk * kGroup * 4;
      for (int32_t c = 0; c < kGroup * 4 && from + c < pass.classes; ++c) {
        const T value = tile[threadIdx.x * kStride<kGroup> + c / 4].value[c % 4];
        if (value > best) best = value, label = from + c;
      }
    }
    if (pass.splat) splat<T, kGroup>(pass, terms, quad, tile);
    if (kMany) __syncthreads();
  }
  const int64_t at = static_cast<int64_t>(blockIdx.y) * pass.tiling.pixels() + pixel;
  if (pass.few_labels && pixel >= 0) pass.few_labels[at] = static_cast<uint8_t>(label);
  if (pass.labels && pixel >= 0) pass.labels[at] = label;
}

template <class T, int kGroup, bool kMany>
void launch(const Pass<T>& pass, const Terms<T>& terms, int64_t batch, cudaStream_t queue) {
  const dim3 grid(pass.tiling.tiles, static_cast<unsigned>(batch));
  WSIS_LAUNCH((&pixels_kernel<T, kGroup, kMany>), grid, kTile,
              kTile * kStride<kGroup> * sizeof(Quad<T>), queue, pass, terms);
  check(cudaGetLastError(), "dense_crf");
}

// As many threads a pixel as its channels need; a tile of 8 fours of doubles would not fit.
template <class T>
void run(const Pass<T>& pass, const Terms<T>& terms, int64_t batch, cudaStream_t queue) {
  constexpr int kMost = sizeof(T) == sizeof(float) ? 8 : 4;
  if (pass.quads > kMost) return launch<T, kMost, true>(pass, terms, batch, queue);
  if (pass.quads > 4) return launch<T, kMost, false>(pass, terms, batch, queue);
  if (pass.quads > 2) return launch<T, 4, false>(pass, terms, batch, queue);
  if (pass.quads > 1) return launch<T, 2, false>(pass, terms, batch, queue);
  launch<T, 1, false>(pass, terms, batch, queue);
}

template <class T>
Pass<T> first_pass(const FieldCall<T>& call) {
  Pass<T> pass{};
  pass.values = call.start ? call.start : call.unary;
  pass.sign = call.start ? T(1) : T(-1);
  pass.softmax = !call.start;
  pass.tiling = call.tiling;
  pass.classes = call.classes;
  pass.quads = (call.classes + 3) / 4;
  return pass;
}

}  // namespace

template <class T>
void mean_field(const FieldCall<T>& call, const Terms<T>& terms, int64_t iterations,
                int64_t shared_bytes, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  Pass<T> pass = first_pass(call);
  for (int64_t iteration = 0; iteration <= iterations; ++iteration) {
    if (iteration > 0) {
      blur_rows(terms, call.batch, call.classes, false, shared_bytes, stream);
      pass.values = call.unary;
      pass.sign = -1;
      pass.slice = pass.softmax = true;
    }
    pass.splat = iteration < iterations;
    if (!pass.splat) {
      pass.probs = call.probs;
      pass.few_labels = call.few_labels;
      pass.labels = call.labels;
    }
    run(pass, terms, call.batch, queue);
  }
}

template <class T>
void lattice_filter(const FieldCall<T>& call, const Terms<T>& terms, bool reverse,
                    int64_t shared_bytes, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  Pass<T> pass = first_pass(call);
  pass.splat = true;
  run(pass, terms, call.batch, queue);
  blur_rows(terms, call.batch, call.classes, reverse, shared_bytes, stream);
  pass.values = nullptr;
  pass.splat = false;
  pass.slice = true;
  pass.probs = call.probs;
  run(pass, terms, call.batch, queue);
}

#define WSIS_FOR(T)                                                                           \
  template void mean_field(const FieldCall<T>&, const Terms<T>&, int64_t, int64_t, int,       \
                           uintptr_t);                                                        \
  template void lattice_filter(const FieldCall<T>&, const Terms<T>&, bool, int64_t, int, uintptr_t);
WSIS_FOR(float)
WSIS_FOR(double)
#undef WSIS_FOR

}  // namespace wsis::cuda
