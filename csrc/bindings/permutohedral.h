// The arrays of a lattice of one image, as Python hands them over.
#pragma once

#include <pybind11/stl.h>

#include <vector>

#include "bindings/bindings.h"
#include "cpu/permutohedral.h"

namespace wsis {

constexpr int64_t kMostPoints = int64_t{1} << 30;

// slots, weights, entries [N, d + 1], first [T + 1], rows, counts [V], lines [d + 1, M],
// cuts [d + 1, chunks, 2]; see cpu/permutohedral.h.
using LatticeArrays = std::vector<Array>;

inline void check_size(int64_t height, int64_t width) {
  require(height >= 1 && width >= 1 && height < kMostPoints && width < kMostPoints &&
              height * width <= kMostPoints,
          "height and width must be positive and their product at most 2^30");
}

// Checks shapes, not what the numbers point at: only the builder makes them.
inline cpu::Lattice lattice_of(const LatticeArrays& arrays, int64_t height, int64_t width) {
  check_size(height, width);
  require(arrays.size() == 8, "a lattice must have 8 arrays");
  require(arrays[6].shape.size() == 2 && arrays[4].shape.size() == 1 && arrays[6].shape[0] >= 2 &&
              arrays[6].shape[0] <= kernels::kMaxDims + 1,
          "lines must be [d + 1, M] and rows [V]");
  const cpu::Tiles tiles(static_cast<int32_t>(height), static_cast<int32_t>(width));
  const int64_t corners = arrays[6].shape[0], listed = arrays[4].shape[0];
  const std::vector<int64_t> by_corner{tiles.pixels(), corners};
  expect(arrays[0], "slots", Device::kCpu, {DType::kInt16}, by_corner);
  expect(arrays[1], "weights", Device::kCpu, {DType::kFloat32}, by_corner);
  expect(arrays[2], "entries", Device::kCpu, {DType::kInt16}, by_corner);
  expect(arrays[3], "first", Device::kCpu, {DType::kInt32}, {tiles.count() + 1});
  expect(arrays[4], "rows", Device::kCpu, {DType::kInt32}, {listed});
  expect(arrays[5], "counts", Device::kCpu, {DType::kInt16}, {listed});
  expect(arrays[6], "lines", Device::kCpu, {DType::kInt32}, arrays[6].shape);
  const int32_t dims = static_cast<int32_t>(corners - 1);
  expect(arrays[7], "cuts", Device::kCpu, {DType::kInt32},
         {corners, cpu::chunks_for(arrays[6].shape[1], dims), 2});
  require(arrays[3].data<const int32_t>()[tiles.count()] == listed, "first must end with V");
  return {arrays[0].data<const int16_t>(),  arrays[1].data<const float>(),
          arrays[2].data<const int16_t>(),  arrays[3].data<const int32_t>(),
          arrays[4].data<const uint32_t>(), arrays[5].data<const int16_t>(),
          arrays[6].data<const uint32_t>(), arrays[7].data<const int32_t>(), arrays[6].shape[1],
          dims, tiles};
}

// A factor of each pixel, or null.
inline const float* factors_of(const std::optional<Array>& array, const char* name, int64_t pixels) {
  if (!array) return nullptr;
  expect(*array, name, Device::kCpu, {DType::kFloat32}, {pixels});
  return array->data<const float>();
}

inline int32_t check_parts(int64_t parts) {
  require(parts >= 1 && parts <= 1024, "parts must be in [1, 1024]");
  return static_cast<int32_t>(parts);
}

}  // namespace wsis
