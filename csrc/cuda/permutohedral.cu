#include "cuda/permutohedral.h"

#include "cuda/launch.h"

namespace wsis::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr uint64_t kEmpty = ~uint64_t{0};
constexpr int kLayoutBits = 63;  // keys are sorted as int64, and kEmpty is none

// ---- the table: open addressing, filled by one compare-and-swap of a whole key -----------------

__device__ int64_t home(const Table& table, uint64_t key) {
  return static_cast<int64_t>(kernels::mix(key) >> 32) & (table.slots - 1);
}

// The slot of a key, new or not; -1 if the table is too full.
__device__ int64_t insert(const Table& table, uint64_t key, bool* is_new) {
  int64_t slot = home(table, key);
  for (int64_t probe = 0; probe < table.probes; ++probe) {
    const uint64_t found = atomicCAS(reinterpret_cast<unsigned long long*>(table.keys + slot),
                                     static_cast<unsigned long long>(kEmpty),
                                     static_cast<unsigned long long>(key));
    *is_new = found == kEmpty;
    if (found == kEmpty || found == key) return slot;
    slot = (slot + 1) & (table.slots - 1);
  }
  return -1;
}

// The slot of a key, or -1. No insertion at the same time.
__device__ int64_t find(const Table& table, uint64_t key) {
  int64_t slot = home(table, key);
  while (table.keys[slot] != kEmpty) {
    if (table.keys[slot] == key) return slot;
    slot = (slot + 1) & (table.slots - 1);
  }
  return -1;
}

// ---- the layout of keys ------------------------------------------------------------------------

// Smallest and largest value of each channel, a share of the pixels per block; infinite if one of
// them is not finite.
__global__ void __launch_bounds__(kTile)
    range_kernel(Points points, int64_t pixels, int64_t batch, float* __restrict__ ranges) {
  __shared__ float lows[kTile / kWarp], highs[kTile / kWarp];
  const auto* image = static_cast<const float*>(points.image);
  const int32_t c = blockIdx.y;
  const int64_t step = points.channels_last ? points.channels : 1;
  float low = INFINITY, high = -INFINITY;
  bool finite = true;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x; i < batch * pixels;
       i += static_cast<int64_t>(gridDim.x) * kTile) {
    const int64_t b = i / pixels, n = i % pixels;
    const float value =
        image[b * points.channels * pixels + n * step + (points.channels_last ? c : c * pixels)];
    finite = finite && value - value == 0;
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  if (!finite) {
    low = -INFINITY;
    high = INFINITY;
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const float other_low = __shfl_xor_sync(kAllLanes, low, lanes);
    const float other_high = __shfl_xor_sync(kAllLanes, high, lanes);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  if (threadIdx.x % kWarp == 0) {
    lows[threadIdx.x / kWarp] = low;
    highs[threadIdx.x / kWarp] = high;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kTile / kWarp; ++warp) {
    low = lows[warp] < low ? lows[warp] : low;
    high = highs[warp] > high ? highs[warp] : high;
  }
  ranges[(c * gridDim.x + blockIdx.x) * 2] = low;
  ranges[(c * gridDim.x + blockIdx.x) * 2 + 1] = high;
}

// One warp: clears the counters and lays out the keys. The image's number comes above the layout's
// bits, so that one table and one sort serve the whole batch.
__global__ void layout_kernel(Points points, Tiling tiling, int64_t batch, int32_t range_blocks,
                              const float* __restrict__ ranges, LatticeLayout* __restrict__ layout,
                              int32_t* __restrict__ counters) {
  float lows[kMostFeatures], highs[kMostFeatures];
  for (int64_t i = threadIdx.x; i < kCounters + batch; i += kWarp) counters[i] = 0;
  for (int32_t c = 0; c < points.channels; ++c) {
    float low = points.is_uint8 ? 0.0f : INFINITY, high = points.is_uint8 ? 255.0f : -INFINITY;
    for (int32_t block = threadIdx.x; block < range_blocks; block += kWarp) {
      low = fminf(low, ranges[(c * range_blocks + block) * 2]);
      high = fmaxf(high, ranges[(c * range_blocks + block) * 2 + 1]);
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      low = fminf(low, __shfl_xor_sync(kAllLanes, low, lanes));
      high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, lanes));
    }
    lows[points.spatial + c] = low / points.width[points.spatial + c];
    highs[points.spatial + c] = high / points.width[points.spatial + c];
  }
  __syncwarp();
  if (threadIdx.x != 0) return;
  if (points.spatial) {
    lows[0] = lows[1] = 0;
    highs[0] = static_cast<float>(tiling.width - 1) / points.width[0];
    highs[1] = static_cast<float>(tiling.height - 1) / points.width[1];
  }
  for (int32_t i = 0; i < points.dims(); ++i)
    if (!(lows[i] > -INFINITY && highs[i] < INFINITY)) counters[0] = kNotFinite;
  if (counters[0] != kGood) return;
  int bits = kernels::make_layout(lows, highs, points.dims(), layout);
  for (int64_t images = 1; images < batch; images *= 2) ++bits;
  if (bits > kLayoutBits) counters[0] = kTooWide;
}

// ---- tiles -------------------------------------------------------------------------------------

template <class T>
__device__ float channel(const Points& points, int64_t b, int32_t c, int64_t n, int64_t pixels) {
  const auto* image = static_cast<const T*>(points.image) + b * points.channels * pixels;
  return static_cast<float>(image[points.channels_last ? n * points.channels + c : c * pixels + n]);
}

// Ascending by key and, where keys are equal, by corner: no two elements are equal.
__device__ void sort_tile(uint64_t* keys, uint16_t* corners, int32_t count) {
  for (int32_t size = 2; size <= count; size *= 2)
    for (int32_t reach = size / 2; reach > 0; reach /= 2) {
      for (int32_t pair = threadIdx.x; pair < count / 2; pair += kTile) {
        const int32_t a = ((pair & ~(reach - 1)) << 1) | (pair & (reach - 1)), b = a + reach;
        const uint64_t first = keys[a], second = keys[b];
        const uint16_t left = corners[a], right = corners[b];
        const bool falling = first > second || (first == second && left > right);
        if (falling == ((a & size) == 0)) {
          keys[a] = second;
          keys[b] = first;
          corners[a] = right;
          corners[b] = left;
        }
      }
      __syncthreads();
    }
}

// Sum of the values of the threads before this one; `total` is that of all.
__device__ int32_t sum_before(int32_t value, int32_t* of_warp, int32_t* total) {
  const int lane = threadIdx.x % kWarp;
  int32_t sum = value;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  if (lane == kWarp - 1) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  int32_t before = sum - value;
  *total = 0;
  for (int warp = 0; warp < kTile / kWarp; ++warp) {
    if (warp < static_cast<int>(threadIdx.x) / kWarp) before += of_warp[warp];
    *total += of_warp[warp];
  }
  return before;
}

// One block per tile, one thread per pixel: where it lies, then the tile's list. Equal keys meet in
// the block's sort, so that a vertex is inserted once per tile and not once per pixel.
template <class T, int kDims>
__global__ void __launch_bounds__(kTile)
    tiles_kernel(Points points, Tiling tiling, const LatticeLayout* __restrict__ layout,
                 Table table, TileArrays tiles, int32_t capacity, int32_t image_bits,
                 int32_t* counters) {
  constexpr int kMost = kDims ? kDims : kMostFeatures;
  WSIS_DYNAMIC_SHARED(uint64_t, keys);
  __shared__ int32_t of_warp[kTile / kWarp];
  auto* corners = reinterpret_cast<uint16_t*>(keys + capacity);
  if (counters[0] != kGood) return;
  const int32_t d = kDims ? kDims : points.dims(), pairs = (d + 1) * kTile;
  const int64_t b = blockIdx.x / tiling.tiles;
  const auto tile = static_cast<int32_t>(blockIdx.x % tiling.tiles);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * pairs;
  const int32_t pixel = tiling.pixel(tile, threadIdx.x);
  {
    float features[kMost], corner[kMost + 1], rank[kMost + 1], weight[kMost + 1];
    int32_t axis_of_rank[kMost + 1];
    if (pixel >= 0) {
      for (int32_t i = 0; i < d; ++i) {
        const float value = i >= points.spatial
                                ? channel<T>(points, b, i - points.spatial, pixel, tiling.pixels())
                            : i == 0 ? static_cast<float>(tiling.column(tile, threadIdx.x))
                                     : static_cast<float>(tiling.row(tile, threadIdx.x));
        features[i] = value / points.width[i];
      }
      kernels::embed<kDims, float>(features, points.scale, d, corner, rank, weight);
      for (int32_t i = 0; i <= d; ++i) axis_of_rank[static_cast<int32_t>(rank[i])] = i;
    }
    uint64_t key = kEmpty;
    if (pixel >= 0) {
      int32_t coordinates[kMost + 1];
      for (int32_t i = 0; i < d; ++i) coordinates[i] = static_cast<int32_t>(corner[i]);
      key = layout->pack(coordinates, d) | static_cast<uint64_t>(b) << (kLayoutBits - image_bits);
    }
    for (int32_t r = 0; r <= d; ++r) {
      if (pixel >= 0 && r > 0) key = layout->next_corner(key, axis_of_rank[d - r + 1]);
      keys[r * kTile + threadIdx.x] = key;
      corners[r * kTile + threadIdx.x] = static_cast<uint16_t>(r * kTile + threadIdx.x);
      tiles.weights[base + r * kTile + threadIdx.x] = pixel >= 0 ? weight[r] : 0.0f;
    }
  }
  for (int32_t k = pairs + threadIdx.x; k < capacity; k += kTile) {
    keys[k] = kEmpty;
    corners[k] = static_cast<uint16_t>(k);
  }
  __syncthreads();
  sort_tile(keys, corners, capacity);

  const int32_t share = capacity / kTile, from = threadIdx.x * share;
  const auto is_head = [&](int32_t k) {
    return keys[k] != kEmpty && (k == 0 || keys[k] != keys[k - 1]);
  };
  int32_t heads = 0, total;
  for (int32_t k = from; k < from + share; ++k) heads += is_head(k);
  int32_t entry = sum_before(heads, of_warp, &total) - 1;
  for (int32_t k = from; k < from + share; ++k) {
    if (is_head(k)) {
      ++entry;
      bool is_new = false;
      const int64_t slot = insert(table, keys[k], &is_new);
      if (slot < 0) atomicMax(counters + 1, 1);
      if (is_new) atomicAdd(counters + kCounters + b, 1);
      tiles.slots[base + entry] = static_cast<int32_t>(slot);
      tiles.starts[base + entry] = static_cast<uint16_t>(k);
    }
    if (corners[k] >= pairs) continue;
    tiles.local[base + corners[k]] = static_cast<uint16_t>(keys[k] == kEmpty ? 0 : entry);
    tiles.order[base + k] = corners[k];
  }
  if (threadIdx.x != 0) return;
  tiles.counts[blockIdx.x] = total;
  atomicAdd(counters + 2, total);
}

// ---- vertices ----------------------------------------------------------------------------------

__global__ void collect_kernel(Table table, int64_t vertices, int32_t* cursor,
                               int64_t* __restrict__ keys) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       slot < table.slots; slot += stride) {
    if (table.keys[slot] == kEmpty) continue;
    const int32_t place = atomicAdd(cursor, 1);
    if (place < vertices) keys[place] = static_cast<int64_t>(table.keys[slot]);
  }
}

// A vertex has the number of its key in the sorted list, plus 1.
__global__ void number_kernel(Table table, const int64_t* __restrict__ keys, int64_t vertices,
                              int32_t* __restrict__ numbers) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (v >= vertices) return;
  numbers[find(table, static_cast<uint64_t>(keys[v]))] = static_cast<int32_t>(v + 1);
}

// One block per tile: its list, now by number, to its place among all.
__global__ void __launch_bounds__(kTile)
    rows_kernel(int32_t pairs, const int32_t* __restrict__ first,
                const int32_t* __restrict__ counts, const int32_t* __restrict__ slots,
                const uint16_t* __restrict__ tile_starts, const int32_t* __restrict__ numbers,
                int32_t* __restrict__ rows, uint16_t* __restrict__ starts) {
  const int64_t base = static_cast<int64_t>(blockIdx.x) * pairs;
  for (int32_t e = threadIdx.x; e < counts[blockIdx.x]; e += kTile) {
    rows[first[blockIdx.x] + e] = numbers[slots[base + e]];
    starts[first[blockIdx.x] + e] = tile_starts[base + e];
  }
}

// One thread per row and axis: [d + 1, M + 1, 2], 0 where there is no vertex. A neighbour has the
// same image bits, because the layout leaves room for neighbours.
__global__ void neighbours_kernel(const LatticeLayout* __restrict__ layout, Table table,
                                  const int64_t* __restrict__ keys, int64_t vertices,
                                  const int32_t* __restrict__ numbers,
                                  int2* __restrict__ neighbours) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (v > vertices) return;
  int2 both = make_int2(0, 0);
  if (v > 0) {
    const uint64_t step = layout->step(static_cast<int32_t>(blockIdx.y));
    const int64_t next = find(table, static_cast<uint64_t>(keys[v - 1]) + step);
    const int64_t previous = find(table, static_cast<uint64_t>(keys[v - 1]) - step);
    both = make_int2(next < 0 ? 0 : numbers[next], previous < 0 ? 0 : numbers[previous]);
  }
  neighbours[blockIdx.y * (vertices + 1) + v] = both;
}

unsigned blocks_for(int64_t n) { return static_cast<unsigned>((n + kTile - 1) / kTile); }

}  // namespace

void build_tiles(const Points& points, const Tiling& tiling, int64_t batch, float* ranges,
                 LatticeLayout* layout, Table table, TileArrays tiles, int32_t* counters,
                 int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const bool search = points.channels > 0 && !points.is_uint8;
  const unsigned range_blocks =
      search ? grid_size(batch * tiling.pixels(), 4 * kTile, kRangeBlocks) : 0;
  if (search)
    WSIS_LAUNCH(&range_kernel, dim3(range_blocks, points.channels), kTile, 0, queue, points,
                tiling.pixels(), batch, ranges);
  WSIS_LAUNCH(&layout_kernel, 1, kWarp, 0, queue, points, tiling, batch,
              static_cast<int32_t>(range_blocks), ranges, layout, counters);
  check(cudaMemsetAsync(table.keys, 0xff, table.slots * sizeof(uint64_t), queue), "build_tiles");
  int32_t capacity = kTile, image_bits = 0;
  while (capacity < (points.dims() + 1) * kTile) capacity *= 2;
  while ((int64_t{1} << image_bits) < batch) ++image_bits;
  const auto launch = [&](auto kernel) {
    WSIS_LAUNCH(kernel, static_cast<unsigned>(batch * tiling.tiles), kTile,
                capacity * (sizeof(uint64_t) + sizeof(uint16_t)), queue, points, tiling, layout,
                table, tiles, capacity, image_bits, counters);
  };
  const auto by_dims = [&](auto type) {
    using T = decltype(type);
    if (points.dims() == 2) return launch(&tiles_kernel<T, 2>);
    if (points.dims() == 3) return launch(&tiles_kernel<T, 3>);
    if (points.dims() == 5) return launch(&tiles_kernel<T, 5>);
    launch(&tiles_kernel<T, 0>);
  };
  points.is_uint8 ? by_dims(uint8_t{}) : by_dims(float{});
  check(cudaGetLastError(), "build_tiles");
}

void collect_keys(Table table, int64_t vertices, int32_t* cursor, int64_t* keys, int device,
                  uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  check(cudaMemsetAsync(cursor, 0, sizeof(int32_t), queue), "collect_keys");
  WSIS_LAUNCH(&collect_kernel, grid_size(table.slots, kTile), kTile, 0, queue, table, vertices,
              cursor, keys);
  check(cudaGetLastError(), "collect_keys");
}

void number_vertices(const LatticeLayout* layout, Table table, const int64_t* keys,
                     int64_t vertices, int32_t dims, int64_t tiles, const int32_t* first,
                     const int32_t* counts, const int32_t* slots, const uint16_t* tile_starts,
                     int32_t* numbers, int32_t* rows, uint16_t* starts, int32_t* neighbours,
                     int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  WSIS_LAUNCH(&number_kernel, blocks_for(vertices), kTile, 0, queue, table, keys, vertices,
              numbers);
  WSIS_LAUNCH(&rows_kernel, static_cast<unsigned>(tiles), kTile, 0, queue, (dims + 1) * kTile,
              first, counts, slots, tile_starts, numbers, rows, starts);
  WSIS_LAUNCH(&neighbours_kernel, dim3(blocks_for(vertices + 1), dims + 1), kTile, 0, queue,
              layout, table, keys, vertices, numbers, reinterpret_cast<int2*>(neighbours));
  check(cudaGetLastError(), "number_vertices");
}

}  // namespace wsis::cuda
