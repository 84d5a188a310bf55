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

// Masks of a vector (or a scalar) of T.
template <class T>
using IntegerLike = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class V, class T>
struct MaskOf {
  using type = Vector<IntegerLike<T>, sizeof(V)>;
};
template <class T>
struct MaskOf<T, T> {
  using type = IntegerLike<T>;
};
template <class V, class T>
using BitsOf = typename MaskOf<V, T>::type;

template <class V, class Bits>
WSIS_INLINE V masked(V value, Bits mask) {
  return kernels::bit_cast<V>(kernels::bit_cast<Bits>(value) & mask);
}

// A vector whose lanes all hold the sum (largest) of the lanes of another.
template <class V, class Op>
WSIS_INLINE V over_lanes(V v, Op op) {
  if constexpr (sizeof(V) == sizeof(typename kernels::Element<V>::Scalar)) {
    return v;
  } else {
    constexpr int kCount = kLanes<V, typename kernels::Element<V>::Scalar>;
    if constexpr (kCount == 8) {
      v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
      v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
      return op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
    } else if constexpr (kCount == 4) {
      v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
      return op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
    } else {
      static_assert(kCount == 2, "rows are made of vectors of 2, 4 or 8");
      return op(v, __builtin_shufflevector(v, v, 1, 0));
    }
  }
}

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

// Asks for the rows of a tile that comes soon.
template <class T>
WSIS_INLINE void prefetch_rows(const Lattice& lattice, int64_t tile, const T* table, int32_t stride) {
  for (int32_t i = lattice.first[tile]; i < lattice.first[tile + 1]; ++i) {
    const char* row = reinterpret_cast<const char*>(table + int64_t{lattice.rows[i] & ~kFlag} * stride);
    for (size_t at = 0; at < stride * sizeof(T); at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// Where the values of the pixel of each entry begin, for tiles of any size.
inline void fill_offsets(int32_t corners, int32_t stride, int32_t* offsets) {
  for (int32_t p = 0; p < kTilePixels; ++p)
    for (int32_t r = 0; r < corners; ++r) *offsets++ = p * stride;
}

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

// A square of numbers, vectors of `rows` becoming columns. Halves are exchanged at growing distance.
template <class V>
WSIS_INLINE void transpose(V* rows) {
  constexpr int kCount = kLanes<V, typename kernels::Element<V>::Scalar>;
  const auto exchange = [&](int distance, auto low, auto high) WSIS_LAMBDA_INLINE {
    for (int i = 0; i < kCount; ++i) {
      if (i & distance) continue;
      const V a = rows[i], b = rows[i + distance];
      rows[i] = low(a, b);
      rows[i + distance] = high(a, b);
    }
  };
#define WSIS_SHUFFLE(...) [](V a, V b) WSIS_LAMBDA_INLINE { return __builtin_shufflevector(a, b, __VA_ARGS__); }
  if constexpr (kCount == 8) {
    exchange(1, WSIS_SHUFFLE(0, 8, 2, 10, 4, 12, 6, 14), WSIS_SHUFFLE(1, 9, 3, 11, 5, 13, 7, 15));
    exchange(2, WSIS_SHUFFLE(0, 1, 8, 9, 4, 5, 12, 13), WSIS_SHUFFLE(2, 3, 10, 11, 6, 7, 14, 15));
    exchange(4, WSIS_SHUFFLE(0, 1, 2, 3, 8, 9, 10, 11), WSIS_SHUFFLE(4, 5, 6, 7, 12, 13, 14, 15));
  } else if constexpr (kCount == 4) {
    exchange(1, WSIS_SHUFFLE(0, 4, 2, 6), WSIS_SHUFFLE(1, 5, 3, 7));
    exchange(2, WSIS_SHUFFLE(0, 1, 4, 5), WSIS_SHUFFLE(2, 3, 6, 7));
  } else {
    static_assert(kCount == 2, "rows are made of vectors of 2, 4 or 8");
    exchange(1, WSIS_SHUFFLE(0, 2), WSIS_SHUFFLE(1, 3));
  }
#undef WSIS_SHUFFLE
}

// planes [channels, N] -> the tile's rows, times `sign`; further channels become `rest`.
template <class V, class T>
WSIS_INLINE void load_tile(const T* planes, const Tiles& tiles, const Tile& tile, int32_t channels,
                           int32_t stride, T sign, T rest, T* rows) {
  constexpr int32_t kWidth = kLanes<V, T>;
  const int64_t plane = tiles.pixels();
  for (int32_t first = 0; first < stride; first += kWidth)
    for (int32_t y = 0; y < tile.height; ++y) {
      const T* from = planes + first * plane + (int64_t{tile.y} + y) * tiles.width + tile.x;
      T* to = rows + y * tile.width * stride + first;
      int32_t x = 0;
      if constexpr (kWidth > 1)
        for (; x + kWidth <= tile.width; x += kWidth, from += kWidth) {
          V block[kWidth];
          for (int32_t c = 0; c < kWidth; ++c)
            block[c] = first + c < channels ? load<V>(from + c * plane) * sign : V{} + rest;
          transpose(block);
          for (int32_t i = 0; i < kWidth; ++i, to += stride) store(to, block[i]);
        }
      for (; x < tile.width; ++x, ++from, to += stride)
        for (int32_t c = 0; c < kWidth; ++c)
          to[c] = first + c < channels ? from[c * plane] * sign : rest;
    }
}

template <class V, class T>
WSIS_INLINE void store_tile(const T* rows, const Tiles& tiles, const Tile& tile, int32_t channels,
                            int32_t stride, T* planes) {
  constexpr int32_t kWidth = kLanes<V, T>;
  const int64_t plane = tiles.pixels();
  for (int32_t first = 0; first < channels; first += kWidth)
    for (int32_t y = 0; y < tile.height; ++y) {
      T* to = planes + first * plane + (int64_t{tile.y} + y) * tiles.width + tile.x;
      const T* from = rows + y * tile.width * stride + first;
      int32_t x = 0;
      if constexpr (kWidth > 1)
        for (; x + kWidth <= tile.width; x += kWidth, to += kWidth) {
          V block[kWidth];
          for (int32_t i = 0; i < kWidth; ++i, from += stride) block[i] = load<V>(from);
          transpose(block);
          for (int32_t c = 0; c < kWidth && first + c < channels; ++c) store(to + c * plane, block[c]);
        }
      for (; x < tile.width; ++x, ++to, from += stride)
        for (int32_t c = 0; c < kWidth && first + c < channels; ++c) to[c * plane] = from[c];
    }
}

// A tile's weights, times its pixels' factors (row-major in the image) if there are any. Written to
// `weights` unless they can stay where they are; returns where they are.
template <class T>
WSIS_INLINE const T* load_weights(const TileOf& of, const Tiles& tiles, const Tile& tile,
                                  const float* factors, T* weights) {
  if (!factors) {
    if constexpr (std::is_same_v<T, float>) return of.weights;
    for (int32_t e = 0; e < of.pixels * of.corners; ++e) weights[e] = static_cast<T>(of.weights[e]);
    return weights;
  }
  const float* from = of.weights;
  T* to = weights;
  for (int32_t y = 0; y < tile.height; ++y) {
    const float* factor = factors + (int64_t{tile.y} + y) * tiles.width + tile.x;
    for (int32_t x = 0; x < tile.width; ++x)
      for (int32_t r = 0; r < of.corners; ++r)
        *to++ = static_cast<T>(*from++) * static_cast<T>(factor[x]);
  }
  return weights;
}

// ---- between a tile and the vertices -----------------------------------------------------------

// The two directions are functors of their own, called once per tile: inlined into one function,
// their loops would run out of registers for addresses.

// pixels += slice of the table, whose channels are multiplied with factors [stride].
template <class T>
struct SliceTile {
  const TileOf& of;
  const T *table, *factors, *weights;
  int32_t stride;
  T *rows, *pixels;  // rows: room for the tile's vertices

  template <int kBytes>
  WSIS_INLINE void run() const {
    stride == 1 ? slice<T>() : slice<RowVector<T, kBytes>>();
  }

  template <class V>
  WSIS_INLINE void slice() const {
    for_groups(stride / kLanes<V, T>, [&](auto group, int32_t first) WSIS_LAMBDA_INLINE {
      constexpr int kVectors = decltype(group)::value;
      copy_rows<V, kVectors>(first * kLanes<V, T>);
      if (of.corners == 3)
        add_rows<V, kVectors, 3>(first * kLanes<V, T>);
      else if (of.corners == 6)
        add_rows<V, kVectors, 6>(first * kLanes<V, T>);
      else
        add_rows<V, kVectors, 0>(first * kLanes<V, T>);
    });
  }

  template <class V, int kVectors>
  WSIS_INLINE void copy_rows(int32_t at) const {
    constexpr int kWidth = kLanes<V, T>;
    V factor[kVectors];
    for (int g = 0; g < kVectors; ++g) factor[g] = load<V>(factors + at + g * kWidth);
    const uint32_t* row = of.rows;
    T* to = rows + at;
    for (const uint32_t* end = row + of.listed; row != end; ++row, to += stride) {
      const T* from = table + int64_t{*row & ~kFlag} * stride + at;
      for (int g = 0; g < kVectors; ++g)
        store(to + g * kWidth, load<V>(from + g * kWidth) * factor[g]);
    }
  }

  template <class V, int kVectors, int kCorners>
  WSIS_INLINE void add_rows(int32_t at) const {
    constexpr int kWidth = kLanes<V, T>;
    const int32_t corners = kCorners ? kCorners : of.corners;
    const int16_t* slot = of.slots;
    const T *weight = weights, *base = rows + at;
    T* to = pixels + at;
    for (int32_t p = of.pixels; p > 0; --p, to += stride, slot += corners, weight += corners) {
      V sum[kVectors];
      for (int g = 0; g < kVectors; ++g) sum[g] = load<V>(to + g * kWidth);
      for (int32_t r = 0; r < corners; ++r) {
        const T* row = base + slot[r] * stride;
        for (int g = 0; g < kVectors; ++g) sum[g] += load<V>(row + g * kWidth) * weight[r];
      }
      for (int g = 0; g < kVectors; ++g) store(to + g * kWidth, sum[g]);
    }
  }
};

// Adds a tile's pixels to its vertices. What lies in a row that no earlier tile has is left out,
// which saves clearing the table. Vertices below `own` belong to another thread: their rows are put
// at `side`, one after the other, to be added later; `aside` becomes the end of that.
template <class T>
struct SplatTile {
  const TileOf& of;
  const T *pixels, *weights;
  int32_t stride;
  const int32_t* offsets;  // see fill_offsets()
  uint32_t own;
  T *table, *side, **aside;

  template <int kBytes>
  WSIS_INLINE void run() const {
    stride == 1 ? splat<T>() : splat<RowVector<T, kBytes>>();
  }

  template <class V>
  WSIS_INLINE void splat() const {
    for_groups(stride / kLanes<V, T>, [&](auto group, int32_t first) WSIS_LAMBDA_INLINE {
      own == 0 ? add<V, decltype(group)::value, true>(first * kLanes<V, T>)
               : add<V, decltype(group)::value, false>(first * kLanes<V, T>);
    });
  }

  template <class V, int kVectors, bool kAllOwn>
  WSIS_INLINE void add(int32_t at) const {
    using Bits = BitsOf<V, T>;
    constexpr int kWidth = kLanes<V, T>;
    const T* values = pixels + at;
    const int16_t* entry = of.entries;
    T* aside_at = side + at;
    for (int32_t v = 0; v < of.listed; ++v) {
      V sum[kVectors] = {};
      for (int32_t i = of.counts[v]; i > 0; --i, ++entry) {
        const T* from = values + offsets[*entry];
        const T weight = weights[*entry];
        for (int g = 0; g < kVectors; ++g) sum[g] += load<V>(from + g * kWidth) * weight;
      }
      const uint32_t row = of.rows[v] & ~kFlag;
      if (!kAllOwn && row < own) {
        for (int g = 0; g < kVectors; ++g) store(aside_at + g * kWidth, sum[g]);
        aside_at += stride;
        continue;
      }
      // Masked, not branched over: nobody could predict it.
      const Bits old = Bits{} - (of.rows[v] & kFlag ? 0 : 1);
      T* to = table + int64_t{row} * stride + at;
      for (int g = 0; g < kVectors; ++g)
        store(to + g * kWidth, masked(load<V>(to + g * kWidth), old) + sum[g]);
    }
    *aside = aside_at - at;
  }
};

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
    using Bits = BitsOf<V, T>;
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
          const V after = masked(next[g], same);
          store(to + g * kWidth, here[g] + (before[g] + after) * T(0.5));
          before[g] = masked(here[g], same);
          here[g] = next[g];
        }
        to = from;
      }
    });
  }
};

template <class T>
void blur(const Lattice& lattice, int32_t stride, bool reverse, int32_t parts, T* table) {
  for (int32_t i = 0; i <= lattice.dims; ++i) {
    const int32_t axis = reverse ? lattice.dims - i : i;
    const uint32_t* lines = lattice.lines + axis * lattice.vertices;
    const int64_t count = lattice.ends[axis];
    // Starting a thread costs more than blurring some thousand rows.
    const int64_t most = 1 + count * stride / (1 << 17);
    parallel_for(count, static_cast<int>(std::min<int64_t>(parts, most)), [&](int, int64_t begin, int64_t end) {
      while (begin < end && !(lines[begin] & kFlag)) ++begin;  // whole lines
      while (end < count && !(lines[end] & kFlag)) ++end;
      if (begin < end) dispatch(BlurLines<T>{table, stride, lines, begin, end});
    });
  }
}

}  // namespace wsis::cpu
