// What the pages of random walks and of stencil affinities share.
#pragma once

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "kernels/random_walk.h"

namespace wsis {

constexpr int64_t kMostPixels = 1 << 26;

// `offsets`: dy and dx of each, one after the other.
inline kernels::Offsets check_offsets(const std::vector<int64_t>& offsets, int64_t height,
                                      int64_t width) {
  require(offsets.size() % 2 == 0 && offsets.size() / 2 <= kernels::kMaxOffsets,
          "offsets must be at most 512 pairs");
  for (int64_t o : offsets)
    require(o > -INT16_MAX && o < INT16_MAX, "offsets must be less than 32767 away");
  require(height >= 0 && width >= 0 && height < kMostPixels && width < kMostPixels &&
              height * width < kMostPixels,
          "there must be fewer than 2^26 pixels");
  return kernels::make_offsets(offsets.data(), static_cast<int64_t>(offsets.size() / 2), height,
                               width);
}

inline int32_t check_parts(int64_t parts) {
  require(parts >= 1 && parts <= INT32_MAX, "parts must be positive");
  return static_cast<int32_t>(parts);
}

// Blocks of 128 pixels along x, maps, channels or offsets along y.
inline void check_grid(int64_t batch, int64_t height, int64_t width, int64_t rows) {
  require(batch * ((height * width + 127) / 128) <= INT32_MAX && rows <= 65535,
          "there are too many images or channels for one launch");
}

}  // namespace wsis
