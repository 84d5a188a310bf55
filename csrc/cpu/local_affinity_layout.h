// Planes with a border of their own, and where the taps of a row lie in them.
#pragma once

#include <algorithm>

#include "cpu/local_affinity.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace wsis::cpu {

using kernels::kDirections;
using kernels::kMaxTaps;
using kernels::Taps;

inline int64_t tiles_of(int64_t width) { return (width + kTile - 1) / kTile; }

// Planes whose rows have room for the border on both sides. The pixels of a row start at a multiple
// of a vector; a last tile that is not full may write beyond the width, but not into the left border
// of the next row.
struct Padded {
  int32_t width, height, border;
  int64_t stride, plane, lead;

  Padded(const AffinityCall& call, const Taps& taps) : width(call.width), height(call.height) {
    border = *std::max_element(taps.dx, taps.dx + taps.count);
    const int64_t tiles = tiles_of(width);
    // One column more than the borders: VARM's forward difference looks to the right of a tap.
    const int64_t needed = std::max<int64_t>(width + 2 * border + 1, tiles * kTile + border);
    stride = (tiles_of(needed) | 1) * kTile;
    // An odd number of tiles per row, and planes 8 tiles apart modulo 64, spread the rows and planes
    // that are read together over the 64 sets of a first-level cache (with a power of two an
    // iteration took twice as long).
    const int64_t rows = tiles_of(height * stride);
    plane = (rows + (8 - rows % 64 + 64) % 64) * kTile;
    lead = tiles_of(border) * kTile;
  }
  int64_t size(int64_t planes) const { return lead + planes * plane + 2 * kTile + border; }

  template <class T>
  void fill_border(T* row, T left, T right) const {
    std::fill(row - border, row, left);
    std::fill(row + width, row + (stride - border), right);
  }
  // The border repeated, or 0.
  template <class T>
  void close_row(T* row, bool repeated) const {
    fill_border(row, repeated ? row[0] : T(0), repeated ? row[width - 1] : T(0));
  }
};

inline Taps taps_of(const AffinityCall& call) {
  return kernels::make_taps(call.dilations, call.num_dilations, call.height, call.width);
}

// For row y, where the row of every tap starts, relative to the plane, moved by the tap's column.
inline void tap_offsets(const Taps& taps, const Padded& layout, int32_t y, int32_t below,
                        int64_t* offsets) {
  for (int32_t d = 0; d < taps.count; ++d)
    for (int k = 0; k < kDirections; ++k) {
      const int32_t row = y + kernels::step_y(k) * taps.dy[d] + below;
      offsets[d * kDirections + k] = kernels::clamp_index(row, layout.height) * layout.stride +
                                     kernels::step_x(k) * taps.dx[d];
    }
}

template <class T>
void copy_padded(const T* planes, int64_t count, const Padded& layout, bool repeated, int parts,
                 T* padded) {
  parallel_for(count * layout.height, parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* to = padded + layout.lead + row / layout.height * layout.plane +
              row % layout.height * layout.stride;
      std::copy_n(planes + row * layout.width, layout.width, to);
      layout.close_row(to, repeated);
    }
  });
}

template <class V, class T>
WSIS_INLINE V lane_numbers() {
  V lanes{};
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i) lanes[i] = static_cast<T>(i);
  return lanes;
}

}  // namespace wsis::cpu
