// Moving values between pixels and lattice vertices; what the filter and the mean field share.
//
// Values of a vertex, and of a pixel of a tile, are rows of `stride` channels side by side: 1, or a
// multiple of 8, so that a row is a few whole vectors. The rows of a tile's vertices are copied into
// a short table first, which stays in the first-level cache while the tile's pixels read it.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/permutohedral.h"
#include "cpu/simd.h"
#include "kernels/dense_crf.h"

#define WSIS_LAMBDA_INLINE __attribute__((always_inline))

namespace wsis::cpu {

inline int32_t stride_for(int32_t channels) { return channels == 1 ? 1 : (channels + 7) / 8 * 8; }

// Wider vectors than 32 bytes do not pay: rows of 24 channels would be cut unevenly.
template <class T, int kBytes>
using RowVector = Vector<T, (kBytes < 32 ? kBytes : 32)>;

template <class V, class T>
constexpr int kLanes = static_cast<int>(sizeof(V) / sizeof(T));

template <class V, class Integer>
struct BitsOf {
  using type = Vector<Integer, sizeof(V)>;
};
template <class Integer>
struct BitsOf<float, Integer> {
  using type = Integer;
};
template <class Integer>
struct BitsOf<double, Integer> {
  using type = Integer;
};

// Calls body(count, first) for groups of at most kGroup of the `vectors` vectors of a row, which are
// kept in registers together.
constexpr int kGroup = 6;
template <class Body>
WSIS_INLINE void for_groups(int32_t vectors, Body body) {
  int32_t first = 0;
  for (; vectors - first > kGroup; first += kGroup) body(std::integral_constant<int, kGroup>{}, first);
  switch (vectors - first) {
    case 1:
      return body(std::integral_constant<int, 1>{}, first);
    case 2:
      return body(std::integral_constant<int, 2>{}, first);
    case 3:
      return body(std::integral_constant<int, 3>{}, first);
    case 4:
      return body(std::integral_constant<int, 4>{}, first);
    case 5:
      return body(std::integral_constant<int, 5>{}, first);
    default:
      return body(std::integral_constant<int, 6>{}, first);
  }
}

// One tile of a lattice.
struct TileOf {
  const int16_t *slots, *entries, *counts;
  const float* weights;
  const uint32_t* rows;
  int32_t listed, pixels, corners;  // corners of a pixel: d + 1

  TileOf(const Lattice& lattice, int64_t index, const Tile& tile)
      : corners(lattice.dims + 1) {
    const int64_t at = tile.first * corners;
    slots = lattice.slots + at;
    entries = lattice.entries + at;
    weights = lattice.weights + at;
    rows = lattice.rows + lattice.first[index];
    counts = lattice.counts + lattice.first[index];
    listed = lattice.first[index + 1] - lattice.first[index];
    pixels = tile.pixels();
  }
};

inline int32_t longest_list(const Lattice& lattice) {
  int32_t most = 0;
  for (int64_t t = 0; t < lattice.tiles.count(); ++t)
    most = std::max(most, lattice.first[t + 1] - lattice.first[t]);
  return most;
}

// Memory of one thread for a tile.
template <class T>
struct TileBuffers {
  T* pixels;  // [64, stride]
  T* rows;    // [longest list, stride]
  T* weights;  // [64 (d + 1)]

  static int64_t size(int32_t stride, int32_t longest, int32_t corners) {
    return round_up(int64_t{kTilePixels} * stride) + round_up(int64_t{longest} * stride) +
           round_up(int64_t{kTilePixels} * corners);
  }
  TileBuffers(T* memory, int32_t stride, int32_t longest) {
    pixels = memory;
    rows = pixels + round_up(int64_t{kTilePixels} * stride);
    weights = rows + round_up(int64_t{longest} * stride);
  }
  static int64_t round_up(int64_t elements) { return (elements + 15) / 16 * 16; }
};

// ---- planes ------------------------------------------------------------------------------------

// planes [channels, N] -> the tile's rows, times `sign`; further channels become `rest`.
template <class T>
WSIS_INLINE void load_tile(const T* planes, const Tiles& tiles, const Tile& tile, int32_t channels,
                           int32_t stride, T sign, T rest, T* rows) {
  const int64_t plane = tiles.pixels();
  for (int32_t c = 0; c < channels; ++c) {
    const T* from = planes + c * plane + int64_t{tile.y} * tiles.width + tile.x;
    T* to = rows + c;
    for (int32_t y = 0; y < tile.height; ++y, from += tiles.width)
      for (int32_t x = 0; x < tile.width; ++x, to += stride) *to = sign * from[x];
  }
  for (int32_t p = 0; p < tile.pixels(); ++p)
    for (int32_t c = channels; c < stride; ++c) rows[p * stride + c] = rest;
}

template <class T>
WSIS_INLINE void store_tile(const T* rows, const Tiles& tiles, const Tile& tile, int32_t channels,
                            int32_t stride, T* planes) {
  const int64_t plane = tiles.pixels();
  for (int32_t c = 0; c < channels; ++c) {
    T* to = planes + c * plane + int64_t{tile.y} * tiles.width + tile.x;
    const T* from = rows + c;
    for (int32_t y = 0; y < tile.height; ++y, to += tiles.width)
      for (int32_t x = 0; x < tile.width; ++x, from += stride) to[x] = *from;
  }
}

// A tile's weights, times its pixels' factors (row-major in the image) if there are any.
template <class T>
WSIS_INLINE void load_weights(const TileOf& of, const Tiles& tiles, const Tile& tile,
                              const float* factors, T* weights) {
  if (!factors) {
    for (int32_t e = 0; e < of.pixels * of.corners; ++e) weights[e] = static_cast<T>(of.weights[e]);
    return;
  }
  const float* from = of.weights;
  for (int32_t y = 0; y < tile.height; ++y) {
    const float* factor = factors + (int64_t{tile.y} + y) * tiles.width + tile.x;
    for (int32_t x = 0; x < tile.width; ++x)
      for (int32_t r = 0; r < of.corners; ++r)
        *weights++ = static_cast<T>(*from++) * static_cast<T>(factor[x]);
  }
}

// ---- between a tile and the vertices -----------------------------------------------------------

// pixels += slice of the table, whose channels are multiplied with factors [stride].
template <class V, class T>
WSIS_INLINE void slice_tile(const TileOf& of, const T* table, const T* factors, const T* weights,
                            int32_t stride, T* rows, T* pixels) {
  constexpr int kWidth = kLanes<V, T>;
  for_groups(stride / kWidth, [&](auto group, int32_t first) WSIS_LAMBDA_INLINE {
    constexpr int kVectors = decltype(group)::value;
    const int32_t at = first * kWidth;
    V factor[kVectors];
    for (int g = 0; g < kVectors; ++g) factor[g] = load<V>(factors + at + g * kWidth);
    for (int32_t v = 0; v < of.listed; ++v) {
      const T* from = table + int64_t{of.rows[v] & ~kFlag} * stride + at;
      for (int g = 0; g < kVectors; ++g)
        store(rows + v * stride + at + g * kWidth, load<V>(from + g * kWidth) * factor[g]);
    }
    const auto all = [&](auto constant) WSIS_LAMBDA_INLINE {
      const int32_t corners = decltype(constant)::value ? decltype(constant)::value : of.corners;
      const int16_t* slot = of.slots;
      const T* weight = weights;
      T* to = pixels + at;
      for (int32_t p = 0; p < of.pixels; ++p, to += stride, slot += corners, weight += corners) {
        V sum[kVectors];
        for (int g = 0; g < kVectors; ++g) sum[g] = load<V>(to + g * kWidth);
        for (int32_t r = 0; r < corners; ++r) {
          const T* row = rows + slot[r] * stride + at;
          for (int g = 0; g < kVectors; ++g) sum[g] += load<V>(row + g * kWidth) * weight[r];
        }
        for (int g = 0; g < kVectors; ++g) store(to + g * kWidth, sum[g]);
      }
    };
    if (of.corners == 3)
      all(std::integral_constant<int, 3>{});
    else if (of.corners == 6)
      all(std::integral_constant<int, 6>{});
    else
      all(std::integral_constant<int, 0>{});
  });
}

// Adds a tile's pixels to its vertices. A row that no earlier tile has is stored, which saves
// clearing the table. Vertices below `own` belong to another thread: their rows are put at `side`,
// one after the other, to be added later; returns where that ends.
template <class V, class T>
WSIS_INLINE T* splat_tile(const TileOf& of, const T* pixels, const T* weights, int32_t stride,
                          uint32_t own, T* table, T* side) {
  constexpr int kWidth = kLanes<V, T>;
  int32_t offset[kTilePixels * (kernels::kMaxDims + 1)];
  for (int32_t p = 0, e = 0; p < of.pixels; ++p)
    for (int32_t r = 0; r < of.corners; ++r, ++e) offset[e] = p * stride;
  T* end = side;
  for_groups(stride / kWidth, [&](auto group, int32_t first) WSIS_LAMBDA_INLINE {
    constexpr int kVectors = decltype(group)::value;
    const int32_t at = first * kWidth;
    const T* values = pixels + at;
    const int16_t* entry = of.entries;
    T* aside = side + at;
    for (int32_t v = 0; v < of.listed; ++v) {
      V sum[kVectors] = {};
      for (int32_t i = of.counts[v]; i > 0; --i, ++entry) {
        const T* from = values + offset[*entry];
        for (int g = 0; g < kVectors; ++g) sum[g] += load<V>(from + g * kWidth) * weights[*entry];
      }
      const uint32_t row = of.rows[v] & ~kFlag;
      T* to = table + int64_t{row} * stride + at;
      if (row < own) {
        for (int g = 0; g < kVectors; ++g) store(aside + g * kWidth, sum[g]);
        aside += stride;
      } else if (of.rows[v] & kFlag) {
        for (int g = 0; g < kVectors; ++g) store(to + g * kWidth, sum[g]);
      } else {
        for (int g = 0; g < kVectors; ++g) store(to + g * kWidth, load<V>(to + g * kWidth) + sum[g]);
      }
    }
    end = aside - at;
  });
  return end;
}

// ---- threads -----------------------------------------------------------------------------------

// The first vertex that belongs to the thread which walks over a part of the tiles.
inline uint32_t first_own(const Lattice& lattice, int32_t part, int32_t parts) {
  const int64_t tiles = lattice.tiles.count();
  for (int64_t i = lattice.first[tiles * part / parts]; i < lattice.first[tiles]; ++i)
    if (lattice.rows[i] & kFlag) return lattice.rows[i] & ~kFlag;
  return static_cast<uint32_t>(lattice.vertices);
}

// Rows that a part puts aside.
inline int64_t aside(const Lattice& lattice, int32_t part, int32_t parts) {
  const int64_t tiles = lattice.tiles.count();
  const uint32_t own = first_own(lattice, part, parts);
  int64_t count = 0;
  for (int64_t i = lattice.first[tiles * part / parts]; i < lattice.first[tiles * (part + 1) / parts];
       ++i)
    count += (lattice.rows[i] & ~kFlag) < own;
  return count;
}

// Adds what the parts put aside (at `sides`, of each part), in the order of the tiles: the sums are those of one thread.
template <class T>
void add_aside(const Lattice& lattice, int32_t stride, const std::vector<const T*>& sides, T* table) {
  const int32_t parts = static_cast<int32_t>(sides.size());
  const int64_t tiles = lattice.tiles.count();
  if (parts == 1) return;
  parallel_for(lattice.vertices, parts, [&](int, int64_t begin, int64_t end) {
    for (int32_t part = 1; part < parts; ++part) {
      const T* from = sides[part];
      const uint32_t own = first_own(lattice, part, parts);
      for (int64_t i = lattice.first[tiles * part / parts];
           i < lattice.first[tiles * (part + 1) / parts]; ++i) {
        const int64_t row = lattice.rows[i] & ~kFlag;
        if (row >= own) continue;
        if (row >= begin && row < end) {
          T* to = table + row * stride;
          for (int32_t c = 0; c < stride; ++c) to[c] += from[c];
        }
        from += stride;
      }
    }
  });
}

// ---- blur --------------------------------------------------------------------------------------

// v + (previous + next) / 2 along lines of vertices, in place: every row is read and written once.
template <class T>
struct BlurLines {
  T* table;
  int32_t stride;
  const uint32_t* lines;
  int64_t begin, end;

  template <int kBytes>
  WSIS_INLINE void run() const {
    if (stride == 1)
      blur<T>();
    else
      blur<RowVector<T, kBytes>>();
  }

  template <class V>
  WSIS_INLINE void blur() const {
    using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    using Bits = typename BitsOf<V, Integer>::type;
    constexpr int kWidth = kLanes<V, T>;
    constexpr int64_t kAhead = 12;
    for_groups(stride / kWidth, [&](auto group, int32_t first) WSIS_LAMBDA_INLINE {
      constexpr int kVectors = decltype(group)::value;
      T* base = table + first * kWidth;
      V before[kVectors] = {}, here[kVectors], next[kVectors];
      T* to = base + int64_t{lines[begin] & ~kFlag} * stride;
      for (int g = 0; g < kVectors; ++g) here[g] = load<V>(to + g * kWidth);
      for (int64_t i = begin; i < end; ++i) {
        // The next vertex in memory; it counts if it continues the line.
        const uint32_t line = i + 1 < end ? lines[i + 1] : lines[i] | kFlag;
        T* from = base + int64_t{line & ~kFlag} * stride;
        const Bits same = Bits{} - (line & kFlag ? 0 : 1);
        if (i + kAhead < end) {
          const T* later = base + int64_t{lines[i + kAhead] & ~kFlag} * stride;
          for (int g = 0; g < kVectors; g += 64 / static_cast<int>(sizeof(V)) + (sizeof(V) > 64))
            __builtin_prefetch(later + g * kWidth, 1);
        }
        for (int g = 0; g < kVectors; ++g) {
          next[g] = load<V>(from + g * kWidth);
          const V after = kernels::bit_cast<V>(kernels::bit_cast<Bits>(next[g]) & same);
          store(to + g * kWidth, here[g] + (before[g] + after) * T(0.5));
          before[g] = kernels::bit_cast<V>(kernels::bit_cast<Bits>(here[g]) & same);
          here[g] = next[g];
        }
        to = from;
      }
    });
  }
};

template <class T>
void blur(const Lattice& lattice, int32_t stride, bool reverse, int32_t parts, T* table) {
  const int64_t count = lattice.vertices;
  if (count == 0) return;
  // Starting a thread costs more than blurring some thousand rows.
  parts = static_cast<int32_t>(std::min<int64_t>(parts, 1 + count * stride / (1 << 17)));
  for (int32_t i = 0; i <= lattice.dims; ++i) {
    const uint32_t* lines = lattice.lines + (reverse ? lattice.dims - i : i) * count;
    parallel_for(count, parts, [&](int, int64_t begin, int64_t end) {
      while (begin < end && !(lines[begin] & kFlag)) ++begin;  // whole lines
      while (end < count && !(lines[end] & kFlag)) ++end;
      if (begin < end) dispatch(BlurLines<T>{table, stride, lines, begin, end});
    });
  }
}

}  // namespace wsis::cpu
