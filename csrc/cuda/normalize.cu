// A thread merges kRows pixels of one column: it keeps the two source rows it is between, mixed
// horizontally, in registers, so that a pass costs a few loads per column and not four per pixel.
// Both launches form the merged values anew, which is cheaper than storing and reading them: the
// maps of the passes stay in the first caches, the scores go to memory once.
#include "cuda/normalize.h"

#include "cuda/block.h"
#include "cuda/launch.h"

namespace wsis::cuda {
namespace {

using kernels::Affine;
using kernels::Extrema;
using kernels::Tap;

constexpr int kThreads = 128;  // columns of a tile
constexpr int kRows = 16;      // rows of a tile

struct Tiles {
  int64_t across, down;
  explicit Tiles(Frame frame)
      : across((frame.columns + kThreads - 1) / kThreads), down((frame.rows + kRows - 1) / kRows) {}
  int64_t count() const { return across * down; }
};

// A tile of a plane: which, and the source rows of its rows on every grid.
template <class T>
struct Tile {
  int64_t plane;
  int32_t x, y, index;
  Tap<T>* taps;  // [passes, kRows], shared
};

// Rows and columns beyond the frame repeat the last: they change no extremum and are not written.
template <class T>
__device__ Tile<T> make_tile(const Passes<T>& passes, Frame frame, int32_t across, int32_t tiles,
                             Tap<T>* taps) {
  const int64_t plane = blockIdx.x / tiles;
  const int32_t index = static_cast<int32_t>(blockIdx.x - plane * tiles);
  const int32_t y = index / across * kRows;
  const int32_t x = index % across * kThreads + static_cast<int32_t>(threadIdx.x);
  for (int i = threadIdx.x; i < passes.count * kRows; i += kThreads) {
    const int32_t row = y + i % kRows < frame.rows ? y + i % kRows : frame.rows - 1;
    taps[i] = kernels::tap<T>(row, passes.pass[i / kRows].h, frame.height);
  }
  __syncthreads();
  return {plane, x, y, index, taps};
}

// The merged values of kRows pixels below each other.
template <class T, bool kFlipMax>
__device__ void merge_rows(const Passes<T>& passes, bool positive_each, Frame frame,
                           const Tile<T>& tile, T weight, T* total) {
  const int32_t x = tile.x < frame.columns ? tile.x : frame.columns - 1;
  T plain[kFlipMax ? kRows : 1];
#pragma unroll
  for (int k = 0; k < kRows; ++k) total[k] = T(0);
  for (int32_t m = 0; m < passes.count; ++m) {
    const auto& pass = passes.pass[m];
    const T* maps = pass.maps + tile.plane * pass.h * pass.w;
    const Tap<T> column = kernels::tap<T>(x, pass.w, frame.width);
    const int32_t left = pass.flip ? pass.w - 1 - column.first : column.first;
    const int32_t right = pass.flip ? pass.w - 1 - column.second : column.second;
    const auto mixed_row = [&](int32_t row) {
      const T* from = maps + static_cast<int64_t>(row) * pass.w;
      const T a = positive_each ? kernels::positive_finite(from[left]) : from[left];
      const T b = positive_each ? kernels::positive_finite(from[right]) : from[right];
      return kernels::mix(a, b, column.weight);
    };
    int32_t above = -1, below = -1;
    T top = T(0), bottom = T(0);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const Tap<T> tap = tile.taps[m * kRows + k];
      if (tap.first != above) {
        top = tap.first == below ? bottom : mixed_row(tap.first);
        bottom = tap.second == tap.first ? top : mixed_row(tap.second);
        above = tap.first;
        below = tap.second;
      }
      const T value = kernels::mix(top, bottom, tap.weight);
      if constexpr (kFlipMax) {
        if (m % 2 == 0)
          plain[k] = value;
        else
          total[k] += kernels::positive(kernels::greater(plain[k], value)) +
                      kernels::poisoned(value);
      } else {
        total[k] += value;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) total[k] *= weight;
}

template <class T, bool kFlipMax>
__global__ void __launch_bounds__(kThreads)
    merge_extrema_kernel(Passes<T> passes, bool positive_each, Frame frame, int32_t across,
                         int32_t tiles, const T* __restrict__ weights, T* __restrict__ partial) {
  WSIS_DYNAMIC_SHARED(Tap<T>, taps);
  __shared__ Extrema<T> slots[kThreads / kWarp];
  const T weight = weights ? weights[blockIdx.x / tiles] : T(1);
  if (weight == T(0)) return;  // for all threads of the block
  const Tile<T> tile = make_tile(passes, frame, across, tiles, taps);
  T values[kRows];
  merge_rows<T, kFlipMax>(passes, positive_each, frame, tile, weight, values);
  Extrema<T> mine = kernels::no_extrema<T>();
  T poison = T(0);
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    mine = {kernels::lesser(mine.low, values[k]), kernels::greater(mine.high, values[k])};
    poison += kernels::poisoned(values[k]);
  }
  mine.high += poison;
  const Extrema<T> all = join_block<kThreads>(mine, slots);
  if (threadIdx.x == 0) {
    partial[2 * static_cast<int64_t>(blockIdx.x)] = all.low;
    partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = all.high;
  }
}

template <class T, bool kFlipMax>
__global__ void __launch_bounds__(kThreads)
    merge_scores_kernel(Passes<T> passes, bool positive_each, kernels::Norm norm, Frame frame,
                        int32_t across, int32_t tiles, T eps, const T* __restrict__ weights,
                        int32_t num_classes, int32_t skip, const T* __restrict__ partial,
                        T* __restrict__ scores) {
  WSIS_DYNAMIC_SHARED(Tap<T>, taps);
  __shared__ Extrema<T> slots[kThreads / kWarp];
  const Tile<T> tile = make_tile(passes, frame, across, tiles, taps);
  const T weight = weights ? weights[tile.plane] : T(1);
  Extrema<T> plane{T(0), T(0)};
  if (weight != T(0)) {
    plane = kernels::no_extrema<T>();
    for (int32_t i = threadIdx.x; i < tiles; i += kThreads) {
      const T* pair = partial + 2 * (tile.plane * tiles + i);
      plane = kernels::join(plane, Extrema<T>{pair[0], pair[1]});
    }
    plane = join_block<kThreads>(plane, slots);
  }
  const Affine<T> affine = kernels::affine_of(norm, plane, eps);
  T values[kRows];
  if (weight != T(0)) {
    merge_rows<T, kFlipMax>(passes, positive_each, frame, tile, weight, values);
  } else {
#pragma unroll
    for (int k = 0; k < kRows; ++k) values[k] = T(0);
  }
  if (tile.x >= frame.columns) return;
  const int64_t channel = tile.plane + (tile.plane / num_classes + 1) * skip;
  T* out = scores + (channel * frame.rows + tile.y) * frame.columns + tile.x;
#pragma unroll
  for (int k = 0; k < kRows; ++k)
    if (tile.y + k < frame.rows)
      out[static_cast<int64_t>(k) * frame.columns] = kernels::score_of(values[k], affine);
}

}  // namespace

int64_t merge_tiles(Frame frame) { return Tiles(frame).count(); }

template <class T>
void normalize_cams(const Passes<T>& passes, Merge merge, Frame frame, T eps, const T* weights,
                    int64_t batch, int32_t num_classes, int32_t skip, T* partial, T* scores,
                    int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const Tiles tiles(frame);
  const auto across = static_cast<int32_t>(tiles.across), count = int32_t(tiles.count());
  const int64_t blocks = batch * num_classes * tiles.count();
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::invalid_argument("maps must have fewer than 2^31 tiles");
  const size_t shared = passes.count * kRows * sizeof(Tap<T>);
  const auto grid = static_cast<unsigned>(blocks);
  auto* extrema =
      merge.flip_max ? &merge_extrema_kernel<T, true> : &merge_extrema_kernel<T, false>;
  WSIS_LAUNCH(extrema, grid, kThreads, shared, queue, passes, merge.positive_each, frame, across,
              count, weights, partial);
  check(cudaGetLastError(), "merge_extrema");
  auto* write = merge.flip_max ? &merge_scores_kernel<T, true> : &merge_scores_kernel<T, false>;
  WSIS_LAUNCH(write, grid, kThreads, shared, queue, passes, merge.positive_each, merge.norm, frame,
              across, count, eps, weights, num_classes, skip, partial, scores);
  check(cudaGetLastError(), "merge_scores");
}

template void normalize_cams(const Passes<float>&, Merge, Frame, float, const float*, int64_t,
                             int32_t, int32_t, float*, float*, int, uintptr_t);
template void normalize_cams(const Passes<double>&, Merge, Frame, double, const double*, int64_t,
                             int32_t, int32_t, double*, double*, int, uintptr_t);

}  // namespace wsis::cuda
