// Building a lattice: corners of all pixels, tile by tile; then numbers for the vertices; then lines.
//
// Most of the work is done inside tiles, which threads share: a tile finds its own distinct vertices
// in a table that stays in the first-level cache, and only those (about one in ten corners) are then
// looked up in the image's table, one tile after the other, so that numbers do not depend on threads.

// Which vertices exist must not depend on the instruction set; before everything that is inlined.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <limits>
#include <type_traits>

#include "cpu/memory.h"
#include "cpu/permutohedral_vertices.h"
#include "cpu/simd.h"

namespace wsis::cpu {
namespace {

// ---- features ----------------------------------------------------------------------------------

float channel_value(const Points& points, int32_t channel, int64_t pixel) {
  const int64_t at = points.interleaved
                         ? pixel * points.channels + channel
                         : channel * int64_t{points.height} * points.width + pixel;
  return points.bytes ? static_cast<const uint8_t*>(points.image)[at]
                      : static_cast<const float*>(points.image)[at];
}

// Of every feature; false if one is not finite. Bytes may have any value.
bool find_range(const Points& points, float* low, float* high) {
  int32_t at = 0;
  if (points.widths_xy) {
    low[0] = low[1] = 0;
    high[0] = static_cast<float>(points.width - 1) / points.widths_xy[0];
    high[1] = static_cast<float>(points.height - 1) / points.widths_xy[1];
    at = 2;
  }
  const int64_t pixels = int64_t{points.height} * points.width;
  for (int32_t c = 0; c < points.channels; ++c) {
    float least = 0, most = 255;
    if (!points.bytes) {
      least = std::numeric_limits<float>::infinity(), most = -least;
      bool finite = true;
      for (int64_t p = 0; p < pixels; ++p) {
        const float value = channel_value(points, c, p);
        finite = finite && std::fabs(value) <= std::numeric_limits<float>::max();
        least = std::min(least, value);
        most = std::max(most, value);
      }
      if (!finite) return false;
    }
    low[at + c] = least / points.widths[c];
    high[at + c] = most / points.widths[c];
  }
  return true;
}

// ---- corners of a tile -------------------------------------------------------------------------

template <class Key, int kDims>
struct EmbedTiles {
  static constexpr int kMost = kDims ? kDims : kMaxDims;
  static constexpr int kBits = kDims == 2 ? 10 : kDims ? 11 : 13;
  static constexpr int32_t kPlaces = kTilePixels * (kMost + 1);
  static_assert((1 << kBits) > kPlaces + kPlaces / 4, "the table of a tile must not fill up");

  const Points& points;
  const Tiles& tiles;
  const KeyLayout<Key>& layout;
  const float* scale;
  int64_t begin, end;  // tiles
  Key* listed;         // this and the next: at the first corner of tile `begin`
  int16_t* listed_counts;
  int16_t *slots, *entries;
  float* weights;
  int32_t* listed_in;  // [T]

  // What is known of the pixels of one tile.
  struct Work {
    float features[kMost][kTilePixels];
    float weight[kMost + 1][kTilePixels];
    Key key[kMost + 1][kTilePixels];        // of each corner
    uint32_t home[kMost + 1][kTilePixels];  // where the search for it begins
    Key origin, step[kMost + 1];  // the key of coordinates 0, and what a corner adds to the one before
    Key keys[kPlaces];            // of the distinct vertices
    int16_t counts[kPlaces], moved[kPlaces];
    uint16_t table[1 << kBits];  // numbers of vertices, or 0xffff
  };

  template <int kBytes>
  WSIS_INLINE void run() const {
    Work work;
    Key* to = listed;
    int16_t* to_counts = listed_counts;
    const int dims = kDims ? kDims : layout.dims;
    const int32_t zeros[kMost] = {};
    work.origin = layout.pack(zeros, dims);
    for (int i = 0; i <= dims; ++i) work.step[i] = layout.step(i);
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tiles[t];
      load_features(tile, work);
      for (int p = 0; p < tile.pixels(); p += kBytes / 4) place<Vector<float, kBytes>>(p, work);
      const int64_t at = tile.first * (dims + 1);
      const int32_t count = list(tile.pixels(), slots + at, weights + at, work);
      sort(count, tile.pixels() * (dims + 1), slots + at, entries + at, to, to_counts, work);
      listed_in[t] = count;
      to += count;
      to_counts += count;
    }
  }

  WSIS_INLINE void load_features(const Tile& tile, Work& work) const {
    const int32_t spatial = points.widths_xy ? 2 : 0;
    int p = 0;
    for (int32_t y = tile.y; y < tile.y + tile.height; ++y) {
      const int64_t row = int64_t{y} * points.width + tile.x;
      if (spatial) {
        for (int32_t i = 0; i < tile.width; ++i) {
          work.features[0][p + i] = static_cast<float>(tile.x + i) / points.widths_xy[0];
          work.features[1][p + i] = static_cast<float>(y) / points.widths_xy[1];
        }
      }
      for (int32_t c = 0; c < points.channels; ++c)
        for (int32_t i = 0; i < tile.width; ++i)
          work.features[spatial + c][p + i] = channel_value(points, c, row + i) / points.widths[c];
      p += tile.width;
    }
    const int dims = kDims ? kDims : layout.dims;
    for (; p < kTilePixels && p % 16 != 0; ++p)  // the rest of a vector
      for (int j = 0; j < dims; ++j) work.features[j][p] = work.features[j][0];
  }

  // Weights and keys of the corners of as many pixels as V has lanes.
  template <class V>
  WSIS_INLINE void place(int p, Work& work) const {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    using Integers = Vector<int32_t, sizeof(V)>;
    const int dims = kDims ? kDims : layout.dims;
    V features[kMost], corner[kMost + 1], rank[kMost + 1], weight[kMost + 1];
    for (int j = 0; j < dims; ++j) features[j] = load<V>(&work.features[j][p]);
    kernels::embed<kDims>(features, scale, dims, corner, rank, weight);
    int32_t corners[kMost + 1][kLanes], ranks[kMost + 1][kLanes];
    for (int i = 0; i <= dims; ++i) {
      store(&work.weight[i][p], weight[i]);
      store(corners[i], __builtin_convertvector(corner[i], Integers));
      store(ranks[i], __builtin_convertvector(rank[i], Integers));
    }
    // Keys are wider than what they are made of: half a vector at once, or one.
    constexpr bool kVectors = sizeof(Key) == sizeof(uint64_t);
    constexpr int kStep = kVectors ? kLanes / 2 : 1;
    using Keys = std::conditional_t<kVectors, Vector<uint64_t, sizeof(V)>, Key>;
    for (int lane = 0; lane < kLanes; lane += kStep) {
      Keys corner_of[kMost + 1], rank_of[kMost + 1];
      for (int i = 0; i <= dims; ++i) {
        corner_of[i] = widened<Keys>(corners[i] + lane);
        rank_of[i] = widened<Keys>(ranks[i] + lane);
      }
      make_keys(p + lane, corner_of, rank_of, work);
    }
  }

  template <class Keys>
  WSIS_INLINE Keys widened(const int32_t* from) const {
    if constexpr (std::is_same_v<Keys, Key>) {
      return static_cast<Key>(int64_t{*from});
    } else {
      using Signed = Vector<int64_t, sizeof(Keys)>;
      const auto integers = load<Vector<int32_t, sizeof(Keys) / 2>>(from);
      const Signed values = __builtin_convertvector(integers, Signed);
      return load<Keys>(&values);
    }
  }

  // The keys of all corners of pixels whose corner 0 and ranks are given, and their homes.
  template <class Keys>
  WSIS_INLINE void make_keys(int p, const Keys* corner, const Keys* rank, Work& work) const {
    const int dims = kDims ? kDims : layout.dims;
    Keys key = Keys{} + work.origin;
    for (int i = 0; i < dims; ++i) key += corner[i] * layout.unit[i];
    for (int r = 0; r <= dims; ++r) {
      const Keys moved = Keys{} + static_cast<Key>(dims - r + 1);  // the rank of what moves from r - 1
      for (int i = 0; r > 0 && i <= dims; ++i)
        key += rank[i] == moved ? Keys{} + work.step[i] : Keys{};
      store(&work.key[r][p], key);
      const auto home = kernels::mix(key) >> (64 - kBits);
      if constexpr (std::is_same_v<Keys, Key>)
        work.home[r][p] = static_cast<uint32_t>(home);
      else
        store(&work.home[r][p],
              __builtin_convertvector(home, Vector<uint32_t, sizeof(Keys) / 2>));
    }
  }

  // Numbers the distinct vertices of a tile as they come; returns how many.
  WSIS_INLINE int32_t list(int pixels, int16_t* slot, float* weight, Work& work) const {
    const int dims = kDims ? kDims : layout.dims;
    std::memset(work.table, 0xff, sizeof(work.table));
    std::memset(work.counts, 0, sizeof(work.counts));
    int32_t count = 0;
    for (int p = 0; p < pixels; ++p, slot += dims + 1, weight += dims + 1) {
      for (int r = 0; r <= dims; ++r) {
        weight[r] = work.weight[r][p];
        const Key key = work.key[r][p];
        uint32_t at = work.home[r][p];
        // Nobody could predict whether a vertex is new: it is written in any case, and counts if so.
        work.keys[count] = key;
        int32_t number = std::min<int32_t>(work.table[at], count);
        while (work.keys[number] != key) {
          at = (at + 1) % (1 << kBits);
          number = std::min<int32_t>(work.table[at], count);
        }
        work.table[at] = static_cast<uint16_t>(number);
        slot[r] = static_cast<int16_t>(number);
        ++work.counts[number];
        count += number == count;
      }
    }
    return count;
  }

  // Orders the vertices of a tile by falling counts: loops over their entries then have nearly the
  // same length each time, which the branch predictor learns.
  WSIS_INLINE void sort(int32_t count, int32_t corners, int16_t* slot, int16_t* entry, Key* to,
                        int16_t* to_counts, Work& work) const {
    int16_t begin_of[kTilePixels + 2] = {};
    for (int32_t v = 0; v < count; ++v) ++begin_of[kTilePixels + 1 - work.counts[v]];
    for (int n = 1; n <= kTilePixels + 1; ++n) begin_of[n] += begin_of[n - 1];
    for (int32_t v = 0; v < count; ++v) {
      const int16_t place = begin_of[kTilePixels - work.counts[v]]++;
      work.moved[v] = place;
      to[place] = work.keys[v];
      to_counts[place] = work.counts[v];
    }
    for (int32_t place = 0, next = 0; place < count; ++place) {
      work.counts[place] = static_cast<int16_t>(next);
      next += to_counts[place];
    }
    for (int32_t e = 0; e < corners; ++e) {
      const int16_t place = work.moved[slot[e]];
      slot[e] = place;
      entry[work.counts[place]++] = static_cast<int16_t>(e);
    }
  }
};

// ---- all of it ---------------------------------------------------------------------------------

// Calls body(layout) with keys that are wide enough; false where float cannot count coordinates.
template <class Body>
bool with_keys(const Points& points, Body body) {
  float low[kMaxDims], high[kMaxDims];
  find_range(points, low, high);
  KeyLayout<uint64_t> narrow;
  const int bits = kernels::make_layout(low, high, points.dims(), &narrow);
  if (bits <= 64) {
    body(narrow);
    return true;
  }
  if (bits == kernels::kTooWide) return false;
  KeyLayout<WideKey> wide;
  kernels::make_random_layout(points.dims(), &wide);
  body(wide);
  return true;
}

}  // namespace

int64_t lattice_scratch_size(int64_t pixels, int32_t dims) {
  return Scratch<uint64_t>::size(pixels * (dims + 1));
}

Sizes embed(const Points& points, int32_t parts, int64_t* memory, int16_t* slots, float* weights,
            int16_t* entries, int32_t* first) {
  const int32_t dims = points.dims();
  const Tiles tiles(points.height, points.width);
  float scale[kMaxDims], low[kMaxDims], high[kMaxDims];
  if (!find_range(points, low, high)) return {-1, 0};
  for (int i = 0; i < dims; ++i) scale[i] = kernels::axis_scale(i, dims);
  prefer_huge_pages(memory, lattice_scratch_size(tiles.pixels(), dims) * int64_t{sizeof(*memory)});
  prefer_huge_pages(slots, tiles.pixels() * (dims + 1) * int64_t{sizeof(*slots)});
  prefer_huge_pages(weights, tiles.pixels() * (dims + 1) * int64_t{sizeof(*weights)});
  prefer_huge_pages(entries, tiles.pixels() * (dims + 1) * int64_t{sizeof(*entries)});
  Sizes sizes{-2, 0};
  with_keys(points, [&](const auto& layout) {
    using Key = std::remove_const_t<std::remove_reference_t<decltype(layout.ones)>>;
    Scratch<Key> scratch(memory, tiles.pixels() * (dims + 1));
    parallel_for(tiles.count(), parts, [&](int, int64_t begin, int64_t end) {
      if (begin == end) return;
      const int64_t at = tiles[begin].first * (dims + 1);
      const auto with = [&](auto constant) {
        dispatch(EmbedTiles<Key, decltype(constant)::value>{
            points, tiles, layout, scale, begin, end, scratch.listed + at, scratch.counts + at,
            slots, entries, weights, first + 1});
      };
      switch (dims) {
        case 2:
          return with(std::integral_constant<int, 2>{});
        case 3:
          return with(std::integral_constant<int, 3>{});
        case 5:
          return with(std::integral_constant<int, 5>{});
        default:
          return with(std::integral_constant<int, 0>{});
      }
    });
    first[0] = 0;
    for (int64_t t = 0; t < tiles.count(); ++t) first[t + 1] += first[t];
    sizes.listed = first[tiles.count()];
    sizes.vertices = number(first, tiles.count(), parts, tiles, dims, scratch);
  });
  return sizes;
}

void finish(const Points& points, Sizes sizes, int32_t parts, int64_t* memory, uint32_t* rows,
            int16_t* counts, uint32_t* lines, int32_t* cuts) {
  with_keys(points, [&](const auto& layout) {
    using Key = std::remove_const_t<std::remove_reference_t<decltype(layout.ones)>>;
    Scratch<Key> scratch(memory, int64_t{points.height} * points.width * (points.dims() + 1));
    std::memcpy(rows, scratch.rows, sizes.listed * sizeof(uint32_t));
    std::memcpy(counts, scratch.counts, sizes.listed * sizeof(int16_t));
    find_lines(layout, sizes.vertices, parts, scratch, lines, cuts);
  });
}

}  // namespace wsis::cpu
