// The order in which the lattice walks over pixels: tiles of up to 64, row by row inside a tile.
//
// The pixels of a tile share most of their vertices, so a tile keeps its own short list of them, and
// all arrays per pixel lie in this order. Points that are no pixels are an image of one row.
#pragma once

#include <algorithm>
#include <cstdint>

namespace wsis::cpu {

constexpr int32_t kTilePixels = 64;

struct Tile {
  int32_t y, x, height, width;
  int64_t first;  // pixels before this tile
  int32_t pixels() const { return height * width; }
};

struct Tiles {
  int32_t height, width;            // of the image
  int32_t tile_height, tile_width;  // of a whole tile: 8 x 8, flatter for flat images
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
    Tile tile;
    tile.y = static_cast<int32_t>(index / across) * tile_height;
    tile.x = static_cast<int32_t>(index % across) * tile_width;
    tile.height = std::min(tile_height, height - tile.y);
    tile.width = std::min(tile_width, width - tile.x);
    tile.first = int64_t{tile.y} * width + int64_t{tile.x} * tile.height;
    return tile;
  }
};

}  // namespace wsis::cpu
