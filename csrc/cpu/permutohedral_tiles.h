// The order in which the lattice walks over pixels: tiles of up to 128, row by row inside a tile, tiles
// row by row inside blocks of 8 x 8 tiles.
//
// The pixels of a tile share vertices, so a tile keeps its own short list of them, and all arrays per
// pixel lie in this order. Vertices are numbered in it too, so those of a block lie close together
// in memory, and most neighbours of a vertex come from its own block. Points that are no pixels are
// an image of one row.
#pragma once

#include <algorithm>
#include <cstdint>

namespace wsis::cpu {

constexpr int32_t kTilePixels = 128;

struct Tile {
  int32_t y, x, height, width;
  int64_t first;  // pixels before this tile
  int32_t pixels() const { return height * width; }
};

struct Tiles {
  int32_t height, width;            // of the image
  int32_t tile_height, tile_width;  // of a whole tile: 8 x 16, flatter for flat images
  int32_t down, across;

  Tiles(int32_t image_height, int32_t image_width) : height(image_height), width(image_width) {
    tile_height = height > 4 ? 8 : height > 2 ? 4 : std::max(height, 1);
    tile_width = kTilePixels / tile_height;
    down = (height + tile_height - 1) / tile_height;
    across = (width + tile_width - 1) / tile_width;
  }
  int64_t count() const { return int64_t{down} * across; }
  int64_t pixels() const { return int64_t{height} * width; }
  Tile operator[](int64_t index) const {
    constexpr int32_t kBlock = 8;  // tiles
    const int64_t band_size = int64_t{kBlock} * across;
    const auto band = static_cast<int32_t>(index / band_size);
    auto rest = static_cast<int32_t>(index % band_size);
    const int32_t rows = std::min(kBlock, down - band * kBlock);
    const int32_t block = rest / (rows * kBlock);
    rest -= block * rows * kBlock;
    const int32_t columns = std::min(kBlock, across - block * kBlock);
    Tile tile;
    const int32_t top = band * kBlock * tile_height, left = block * kBlock * tile_width;
    tile.y = top + rest / columns * tile_height;
    tile.x = left + rest % columns * tile_width;
    tile.height = std::min(tile_height, height - tile.y);
    tile.width = std::min(tile_width, width - tile.x);
    const int64_t block_height = std::min(kBlock * tile_height, height - top);
    const int64_t block_width = std::min(kBlock * tile_width, width - left);
    tile.first = int64_t{top} * width + left * block_height + (tile.y - top) * block_width +
                 int64_t{tile.x - left} * tile.height;
    return tile;
  }
};

}  // namespace wsis::cpu
