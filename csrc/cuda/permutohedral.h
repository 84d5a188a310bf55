// The permutohedral lattice on CUDA: how it lies in memory, and its builder.
//
// Pixels are cut into tiles of 256, one block of threads each. A tile's corners, sorted by key, are
// a list of the vertices that the tile touches and, for each, of the corners that lie on it. So
// every sum has one order, nobody adds by atomics, and of the per-pixel values only one row per
// tile and vertex ("partial") leaves the block.
#pragma once

#include "kernels/permutohedral.h"

namespace wsis::cuda {

constexpr int kTile = 256;        // pixels of a tile, threads of its block
constexpr int kMostCorners = 16;  // of a pixel: the sort of a tile has to fit into shared memory
constexpr int kMostFeatures = kMostCorners - 1;
constexpr int kCounters = 3;  // status, overflow, entries; then the vertices of each image
constexpr int kRangeBlocks = 64;

using LatticeLayout = kernels::KeyLayout<uint64_t>;

// What the first counter says.
enum Status : int32_t { kGood, kNotFinite, kTooWide };

// Tiles of 16 x 16 pixels, or of 256 in a row for points that are no image.
struct Tiling {
  int32_t height, width, shift;  // a tile is 2^shift pixels wide
  int32_t columns, tiles;        // tiles of a row and of an image

  WSIS_HD int64_t pixels() const { return static_cast<int64_t>(height) * width; }
  WSIS_HD int32_t row(int32_t tile, int32_t i) const {
    return tile / columns * (kTile >> shift) + (i >> shift);
  }
  WSIS_HD int32_t column(int32_t tile, int32_t i) const {
    return (tile % columns << shift) + (i & ((1 << shift) - 1));
  }
  // The pixel's number in its image, or -1 outside.
  WSIS_HD int32_t pixel(int32_t tile, int32_t i) const {
    const int32_t y = row(tile, i), x = column(tile, i);
    return y < height && x < width ? y * width + x : -1;
  }
  // Pixels of a tile that lie in the image.
  WSIS_HD int32_t inside(int32_t tile) const {
    const int32_t down = height - row(tile, 0), right = width - column(tile, 0);
    const int32_t wide = 1 << shift, high = kTile >> shift;
    return (down < high ? down : high) * (right < wide ? right : wide);
  }
};

inline Tiling make_tiling(int64_t height, int64_t width) {
  Tiling tiling{};
  tiling.height = static_cast<int32_t>(height);
  tiling.width = static_cast<int32_t>(width);
  tiling.shift = height == 1 ? 8 : 4;
  const int32_t wide = 1 << tiling.shift, high = kTile >> tiling.shift;
  tiling.columns = (tiling.width + wide - 1) / wide;
  tiling.tiles = tiling.columns * ((tiling.height + high - 1) / high);
  return tiling;
}

// Where features come from: the place of a pixel, if there are widths for it, then the channels of
// an image, each divided by its width. Free features are channels of width 1.
struct Points {
  const void* image;   // [B, channels, N] or [B, N, channels]; uint8 or float32
  int32_t channels;
  int32_t spatial;     // 2: x and y come first; or 0
  bool is_uint8, channels_last;
  float width[kMostFeatures], scale[kMostFeatures];

  WSIS_HD int32_t dims() const { return channels + spatial; }
};

// What a build makes, by tile t of all images, corner r and pixel i of the tile.
struct TileArrays {
  float* weights;    // [t, d + 1, 256] barycentric
  uint16_t* local;   // [t, d + 1, 256] the corner's vertex, in the tile's list
  uint16_t* order;   // [t, (d + 1) * 256] corners r * 256 + i by vertex
  uint16_t* starts;  // [t, (d + 1) * 256] where in `order` a vertex of the tile's list begins
  int32_t* slots;    // [t, (d + 1) * 256] of the tile's vertices, in the table
  int32_t* counts;   // [t] length of the tile's list
};

struct Table {
  uint64_t* keys;    // [slots], a power of two
  int64_t slots;
  int64_t probes;    // before the table counts as full
};

// Four launches, or three if no image of floats has to be searched for its range. `ranges`
// [channels, kRangeBlocks, 2] is scratch for this; `counters` [kCounters + batch].
void build_tiles(const Points& points, const Tiling& tiling, int64_t batch, float* ranges,
                 LatticeLayout* layout, Table table, TileArrays tiles, int32_t* counters,
                 int device, uintptr_t stream);

// One launch (and two memsets). The keys of the table, in any order, into `keys` [M].
void collect_keys(Table table, int64_t vertices, int32_t* cursor, int64_t* keys, int device,
                  uintptr_t stream);

// Three launches. `keys` [M] are sorted: vertex v has row v + 1, row 0 is no vertex. `numbers`
// [slots] is scratch; `first` [tiles + 1] the place of a tile's list among all.
void number_vertices(const LatticeLayout* layout, Table table, const int64_t* keys,
                     int64_t vertices, int32_t dims, int64_t tiles, const int32_t* first,
                     const int32_t* counts, const int32_t* slots, const uint16_t* tile_starts,
                     int32_t* numbers, int32_t* rows, uint16_t* starts, int32_t* neighbours,
                     int device, uintptr_t stream);

}  // namespace wsis::cuda
