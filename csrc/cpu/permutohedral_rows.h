// Moving values between pixels and lattice vertices; what the filter and the mean field share.
//
// The rows of a tile's vertices are copied into a short table first, which stays in the first-level
// cache while the tile's pixels read it.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/crew.h"
#include "cpu/permutohedral.h"
#include "cpu/row_vectors.h"

namespace wsis::cpu {

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

// Asks for the rows of a tile that comes soon, in two tables (one may be null). Tables of short rows
// are small: they stay where they can be read from in time.
template <class T>
WSIS_INLINE void prefetch_rows(const Lattice& lattice, int64_t tile, const T* source,
                               const T* target, int32_t stride) {
  const int32_t bytes = stride * static_cast<int32_t>(sizeof(T));
  if (bytes < 64) return;
  const auto* from = reinterpret_cast<const char*>(source);
  const auto* to = reinterpret_cast<const char*>(target);
  const uint32_t* row = lattice.rows + lattice.first[tile];
  for (const uint32_t* end = lattice.rows + lattice.first[tile + 1]; row != end; ++row) {
    const int64_t offset = int64_t{*row & ~kFlag} * bytes;
    for (int32_t at = 0; at < bytes; at += 64) {
      if (source) __builtin_prefetch(from + offset + at, 0, 2);
      if (target) __builtin_prefetch(to + offset + at, 0, 2);
    }
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
  T* pixels;  // [128, stride]
  T* rows;    // [longest list, stride]
  T* weights;  // [128 (d + 1)]

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

// Some channels of a tile's rows, times factors [stride].
template <class Row, class T>
WSIS_INLINE void copy_rows(Row factor, const TileOf& of, const T* table, const T* factors,
                           int32_t stride, int32_t at, T* rows) {
  factor.read(factors + at);
  const uint32_t* row = of.rows;
  T* to = rows + at;
  for (const uint32_t* end = row + of.listed; row != end; ++row, to += stride) {
    const T* from = table + int64_t{*row & ~kFlag} * stride + at;
    factor.write_product(to, from);
  }
}
template <class T>
struct CopyRows {
  const TileOf& of;
  const T *table, *factors;
  int32_t stride;
  T* rows;

  template <int kBytes>
  WSIS_INLINE void run() const {
    for_pieces<T, kBytes>(stride, [&](auto piece, int32_t at) WSIS_LAMBDA_INLINE {
      copy_rows(piece, of, table, factors, stride, at, rows);
    });
  }
};

// pixels += slice of the table, whose channels are multiplied with factors [stride].
template <class T>
struct SliceTile {
  const TileOf& of;
  const T *table, *factors, *weights;
  int32_t stride;
  T *rows, *pixels;  // rows: room for the tile's vertices

  template <int kBytes>
  WSIS_INLINE void run() const {
    for_pieces<T, kBytes>(stride, [&](auto piece, int32_t at) WSIS_LAMBDA_INLINE {
      copy_rows(piece, of, table, factors, stride, at, rows);
      if (of.corners == 3)
        add_rows<3>(piece, at);
      else if (of.corners == 6)
        add_rows<6>(piece, at);
      else
        add_rows<0>(piece, at);
    });
  }

  template <int kCorners, class Row>
  WSIS_INLINE void add_rows(Row sum, int32_t at) const {
    const int32_t corners = kCorners ? kCorners : of.corners;
    const int32_t step = stride;
    const int16_t* slot = of.slots;
    const T *weight = weights, *base = rows + at;
    T* to = pixels + at;
    for (int32_t p = of.pixels; p > 0; --p, to += step, slot += corners, weight += corners) {
      sum.read(to);
      for (int32_t r = 0; r < corners; ++r) sum.add(base + slot[r] * step, weight[r]);
      sum.write(to);
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
    for_pieces<T, kBytes>(stride, [&](auto piece, int32_t at) WSIS_LAMBDA_INLINE {
      own == 0 ? add<true>(piece, at) : add<false>(piece, at);
    });
  }

  template <bool kAllOwn, class Row>
  WSIS_INLINE void add(Row, int32_t at) const {
    // Copies, as the compiler has to assume that a row that is written may be one of these.
    const int16_t *entry = of.entries, *count = of.counts;
    const int16_t* const end = count + of.listed;
    const uint32_t* row = of.rows;
    const int32_t *offset = offsets, step = stride;
    const T *values = pixels + at, *weight = weights;
    T *aside_at = side + at, *base = table + at;
    const uint32_t from = own;

    const auto put = [&](Row& sum) WSIS_LAMBDA_INLINE {
      const uint32_t number = *row++;
      ++count;
      if (!kAllOwn && (number & ~kFlag) < from) {
        sum.write(aside_at);
        aside_at += step;
        return;
      }
      // Masked, not branched over: nobody could predict it.
      T* to = base + int64_t{number & ~kFlag} * step;
      sum.add_if(to, ~(static_cast<int32_t>(number) >> 31));
      sum.write(to);
    };
    // Vertices of few entries, of the same number each time.
    const auto vertices = [&](auto constant) WSIS_LAMBDA_INLINE {
      constexpr int kCount = decltype(constant)::value;
      while (count != end && *count == kCount) {
        Row sum;
        sum.clear();  // a product alone would become one operation with the addition in put()
        for (int i = 0; i < kCount; ++i) sum.add(values + offset[entry[i]], weight[entry[i]]);
        entry += kCount;
        put(sum);
      }
    };
    // Others: four entries at once, and then always three, so that the number of rounds, which
    // falls slowly from vertex to vertex, is all that there is to predict.
    while (count != end && *count > 4) {
      Row sum, other;  // neither waits for the other
      sum.clear();
      other.clear();
      for (int32_t rounds = *count >> 2; rounds > 0; --rounds, entry += 4) {
        sum.add(values + offset[entry[0]], weight[entry[0]]);
        other.add(values + offset[entry[1]], weight[entry[1]]);
        sum.add(values + offset[entry[2]], weight[entry[2]]);
        other.add(values + offset[entry[3]], weight[entry[3]]);
      }
      const int32_t left = *count & 3;
      for (int32_t i = 0; i < 3; ++i) {
        const int16_t e = entry[i < left ? i : -1];
        sum.add(values + offset[e], i < left ? weight[e] : T(0));
      }
      entry += left;
      sum.add(other);
      put(sum);
    }
    vertices(std::integral_constant<int, 4>{});
    vertices(std::integral_constant<int, 3>{});
    vertices(std::integral_constant<int, 2>{});
    vertices(std::integral_constant<int, 1>{});
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

// Adds what the parts put aside (at `sides`, of each part), in the order of the tiles: the sums are
// those of one thread.
template <class T>
void add_aside(const Lattice& lattice, int32_t stride, const std::vector<const T*>& sides,
               const Crew& crew, T* table) {
  const int64_t tiles = lattice.tiles.count();
  const int32_t parts = crew.parts();
  if (parts == 1) return;
  crew.share(lattice.vertices, [&](int, int64_t begin, int64_t end) {
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

}  // namespace wsis::cpu
