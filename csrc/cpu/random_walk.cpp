#include "cpu/random_walk.h"

#include <algorithm>

#include "cpu/barrier.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace wsis::cpu {
namespace {

using kernels::kMaxOffsets;

constexpr int kRows = 3;          // of a group, see the header
constexpr int kGroup = 4;         // maps whose sums are in registers, at most
constexpr int kLine = 16;         // elements; a multiple of every vector
constexpr int kMaxTaps = 2 * kMaxOffsets;
constexpr int32_t kBlock = 512;   // columns whose weights are made together

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A neighbour that a pixel receives from.
struct Tap {
  int32_t dy, dx;
  int32_t plane;  // of its affinity, which lies at the pixel or `there`
  bool there;
};

// Neighbours (dy, dx) of the first row of a group that rows of it receive from, those with the same
// rows together, as a loop is made for each set of rows.
struct Position {
  int32_t dy, dx;
  int32_t rows;             // bits
  int16_t taps[kRows];
};

struct Stencil {
  int32_t taps_count, count;
  Tap taps[kMaxTaps];
  Position positions[kMaxTaps * kRows];
  int16_t slots[kMaxTaps * kRows];  // [tap, row]: where its weight lies among those of a group
  int32_t ends[1 << kRows];         // of the positions by their set of rows

  // `transposed`: P or its transpose (no matter if symmetric).
  Stencil(const Walk& walk, bool transposed) : taps_count(0), count(0) {
    const kernels::Offsets& o = walk.offsets;
    for (int32_t k = 0; k < o.count; ++k) {
      if (walk.symmetric || transposed)
        taps[taps_count++] = {o.dy[k], o.dx[k], o.plane[k], false};
      if (walk.symmetric || !transposed)
        taps[taps_count++] = {-o.dy[k], -o.dx[k], o.plane[k], true};
    }
    for (int32_t t = 0; t < taps_count; ++t)
      for (int32_t r = 0; r < kRows; ++r)
        positions[count++] = {taps[t].dy + r, taps[t].dx, 1 << r, {}};
    const auto by_place = [](const Position& a, const Position& b) {
      return a.dy != b.dy ? a.dy < b.dy : a.dx != b.dx ? a.dx < b.dx : a.rows < b.rows;
    };
    // The taps of a row are found again by their number before sorting.
    for (int32_t i = 0; i < count; ++i) positions[i].taps[i % kRows] = static_cast<int16_t>(i / kRows);
    std::sort(positions, positions + count, by_place);
    int32_t merged = 0;
    for (int32_t i = 0; i < count; ++i) {
      Position& last = positions[std::max(merged - 1, 0)];
      if (merged > 0 && last.dy == positions[i].dy && last.dx == positions[i].dx) {
        for (int r = 0; r < kRows; ++r)
          if (positions[i].rows >> r & 1) last.taps[r] = positions[i].taps[r];
        last.rows |= positions[i].rows;
      } else {
        positions[merged++] = positions[i];
      }
    }
    count = merged;
    std::sort(positions, positions + count, [&](const Position& a, const Position& b) {
      return a.rows != b.rows ? a.rows < b.rows : by_place(a, b);
    });
    int16_t slot = 0;
    for (int32_t p = 0; p < count; ++p)
      for (int r = 0; r < kRows; ++r)
        if (positions[p].rows >> r & 1) slots[positions[p].taps[r] * kRows + r] = slot++;
    for (int32_t set = 0, p = 0; set < 1 << kRows; ++set) {
      while (p < count && positions[p].rows == set) ++p;
      ends[set] = p;
    }
  }
};

// Planes with a border of zeros as wide as the stencil reaches. The right border of a row is the left
// one of the next.
struct Layout {
  int32_t height, width, border_y, border_x;
  int64_t groups, columns;  // columns: the width in whole lines
  int64_t stride, lead, plane;

  explicit Layout(const Walk& walk) : height(walk.height), width(walk.width) {
    border_y = border_x = 0;
    for (int32_t k = 0; k < walk.offsets.count; ++k) {
      border_y = std::max<int32_t>(border_y, std::abs(walk.offsets.dy[k]));
      border_x = std::max<int32_t>(border_x, std::abs(walk.offsets.dx[k]));
    }
    groups = (height + kRows - 1) / kRows;
    columns = round_up(width, kLine);
    // An odd number of lines per row, and planes 8 lines apart modulo 64, spread what is read
    // together over the sets of a first-level cache (local_affinity_layout.h).
    stride = (round_up(columns + border_x, kLine) / kLine | 1) * kLine;
    lead = round_up(border_x, kLine) + border_y * stride;
    const int64_t lines = round_up(lead + (groups * kRows + border_y) * stride, kLine) / kLine;
    plane = (lines + (8 - lines % 64 + 64) % 64) * kLine;
  }
  int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

// Of one image, and of the buffers.
template <class T>
struct Image {
  const T* maps;
  const T* affinity;
  T* result;
  T* packed;      // [groups, columns / lanes, weights of a group, lanes]
  T* inverse;     // [H, columns], 1 / s
  T* loss;        // [H, columns], what a pixel loses in a step
  T* buffers[2];  // [C] planes: v_k in the one with its parity
  T* sum;         // [C] planes: of c_k v_k
};

// The same pointer, but the compiler does not know: weights are read again for every map, as operands
// of the sums, where it would keep them in registers. That is one instruction for two (24 % faster
// with three maps).
template <class T>
WSIS_INLINE const T* forget(const T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

// What one thread does, for all images.
template <class T>
struct WalkRows {
  const Walk& walk;
  const Layout& layout;
  const Stencil& stencil;  // of a step
  const Stencil& columns;  // of the column sums
  const Image<T>& first;
  int64_t begin, end;  // groups of rows
  Barrier& barrier;

  int32_t first_row() const { return static_cast<int32_t>(begin * kRows); }
  int32_t last_row() const {
    return static_cast<int32_t>(std::min<int64_t>(end * kRows, layout.height));
  }
  int64_t weights_of_group() const { return int64_t{stencil.taps_count} * kRows; }

  template <int kBytes>
  WSIS_INLINE void run() const {
    using V = Vector<T, kBytes>;
    for (int64_t b = 0; b < walk.batch; ++b) {
      Image<T> image = first;
      image.maps += b * walk.maps * layout.pixels();
      image.result += b * walk.maps * layout.pixels();
      image.affinity += b * walk.planes * layout.pixels();
      invert_sums<V>(image);
      pack<V>(image);
      start(image);
      barrier.wait();
      for (int64_t k = 0; k < walk.steps; ++k) {
        for (int64_t group = begin; group < end; ++group) step<V>(image, k, group);
        barrier.wait();
      }
      finish(image);
    }
  }

  // Affinities to the tap of the pixels [low, high) of row y that have it; where it lies in the
  // image, from low on.
  WSIS_INLINE const T* find(const Image<T>& image, const Tap& tap, int32_t y, int32_t& low,
                            int32_t& high) const {
    low = std::max(0, -tap.dx);
    high = std::min(layout.width, layout.width - tap.dx);
    if (y + tap.dy < 0 || y + tap.dy >= layout.height || low >= high) {
      low = high = 0;
      return nullptr;
    }
    const int64_t row = tap.there ? y + tap.dy : y, column = tap.there ? low + tap.dx : low;
    return image.affinity + (int64_t{tap.plane} * layout.height + row) * layout.width + column;
  }

  // A^beta of a tap for the pixels [from, from + kBlock) of row y; 0 where it lies outside.
  template <class V>
  WSIS_INLINE void read_powers(const Image<T>& image, const Tap& tap, int32_t y, int32_t from,
                               T* powers) const {
    constexpr int32_t kLanes = sizeof(V) / sizeof(T);
    int32_t low, high;
    const T* a = find(image, tap, y, low, high);
    const int32_t left = std::max(low, from), right = std::min(high, from + kBlock);
    std::fill_n(powers, kBlock, T(0));
    if (left >= right) return;
    std::copy(a + (left - low), a + (right - low), powers + (left - from));
    for (int32_t x = 0; x < right - from; x += kLanes)
      store(powers + x, kernels::power(load<V>(powers + x), walk.exponent));
  }

  template <class V>
  WSIS_INLINE void invert_sums(const Image<T>& image) const {
    T powers[kBlock];
    double sums[kBlock];
    for (int32_t y = first_row(); y < last_row(); ++y)
      for (int32_t from = 0; from < layout.width; from += kBlock) {
        const int32_t count = std::min(kBlock, layout.width - from);
        std::fill_n(sums, kBlock, 1.0);
        for (int32_t t = 0; t < columns.taps_count; ++t) {
          read_powers<V>(image, columns.taps[t], y, from, powers);
          for (int32_t x = 0; x < count; ++x) sums[x] += powers[x];
        }
        T* inverse = image.inverse + y * layout.columns + from;
        for (int32_t x = 0; x < count; ++x) inverse[x] = static_cast<T>(1 / sums[x]);
        const int64_t room = std::min<int64_t>(kBlock, layout.columns - from);
        std::fill(inverse + count, inverse + room, T(0));
      }
  }

  // Weights of own groups in their order, 0 beyond the image, and the share of a pixel's own value
  // that it loses: as much as it receives from others, as their weights were rounded. A transposed
  // asymmetric stencil has no such sum.
  template <class V>
  WSIS_INLINE void pack(const Image<T>& image) const {
    constexpr int64_t kLanes = sizeof(V) / sizeof(T);
    const bool sums_to_one = walk.symmetric || !walk.transposed;
    const int64_t per_tile = weights_of_group() * kLanes;
    T values[kBlock];
    double sums[kBlock];
    for (int64_t y = begin * kRows; y < end * kRows; ++y)
      for (int64_t from = 0; from < layout.columns; from += kBlock) {
        const int64_t count = std::min<int64_t>(kBlock, layout.columns - from);
        const T* inverse = image.inverse + y * layout.columns + from;
        T* tiles = image.packed + (y / kRows * layout.columns + from) * weights_of_group();
        std::fill_n(sums, kBlock, 0.0);
        for (int32_t t = 0; t < stencil.taps_count; ++t) {
          if (y >= layout.height) {
            std::fill_n(values, kBlock, T(0));
          } else {
            read_powers<V>(image, stencil.taps[t], static_cast<int32_t>(y),
                           static_cast<int32_t>(from), values);
            for (int64_t x = 0; x < count; ++x) values[x] *= inverse[x];
            for (int64_t x = 0; x < count; ++x) sums[x] += values[x];
          }
          T* to = tiles + stencil.slots[t * kRows + y % kRows] * kLanes;
          for (int64_t x = 0; x < count; x += kLanes, to += per_tile)
            store(to, load<V>(values + x));
        }
        if (y >= layout.height) continue;
        T* loss = image.loss + y * layout.columns + from;
        for (int64_t x = 0; x < count; ++x)
          loss[x] = sums_to_one ? static_cast<T>(sums[x]) : T(1) - inverse[x];
      }
  }

  // Own rows of the buffers: v_0, and zeros around. The first and last thread have the borders.
  WSIS_INLINE void start(const Image<T>& image) const {
    const T factor = walk.coefficients ? static_cast<T>(walk.coefficients[0]) : T(0);
    for (int32_t c = 0; c < walk.maps; ++c) {
      const int64_t plane = c * layout.plane;
      for (T* buffer : image.buffers) {
        T* at = buffer + plane;
        const int64_t low = begin == 0 ? 0 : layout.lead + begin * kRows * layout.stride;
        const int64_t high = end == layout.groups ? layout.plane
                                                  : layout.lead + end * kRows * layout.stride;
        std::fill(at + low, at + std::max(low, high), T(0));
      }
      for (int32_t y = first_row(); y < last_row(); ++y) {
        const T* from = image.maps + (int64_t{c} * layout.height + y) * layout.width;
        const T* inverse = image.inverse + y * layout.columns;
        T* to = image.buffers[0] + plane + layout.lead + y * layout.stride;
        T* sum = image.sum + plane + layout.lead + y * layout.stride;
        for (int32_t x = 0; x < layout.width; ++x) {
          to[x] = walk.transposed ? from[x] * inverse[x] : from[x];
          sum[x] = factor * to[x];
        }
        std::fill(sum + layout.width, sum + layout.columns, T(0));
      }
    }
  }

  WSIS_INLINE void finish(const Image<T>& image) const {
    const T* planes = walk.coefficients ? image.sum : image.buffers[walk.steps % 2];
    for (int32_t c = 0; c < walk.maps; ++c)
      for (int32_t y = first_row(); y < last_row(); ++y) {
        const T* from = planes + c * layout.plane + layout.lead + y * layout.stride;
        const T* inverse = image.inverse + y * layout.columns;
        T* to = image.result + (int64_t{c} * layout.height + y) * layout.width;
        for (int32_t x = 0; x < layout.width; ++x)
          to[x] = walk.transposed ? from[x] / inverse[x] : from[x];
      }
  }

  // v_{k+1} of one group of rows.
  template <class V>
  WSIS_INLINE void step(const Image<T>& image, int64_t k, int64_t group) const {
    int64_t offsets[kMaxTaps * kRows];
    for (int32_t p = 0; p < stencil.count; ++p)
      offsets[p] = stencil.positions[p].dy * layout.stride + stencil.positions[p].dx;
    int32_t c = 0;
    // Threes; at the end four instead of three and one, whose sums would wait for each other.
    for (; walk.maps - c > kGroup || walk.maps - c == kGroup - 1; c += kGroup - 1)
      sum_maps<V, 3>(image, k, group, c, offsets);
    if (walk.maps - c == 4) return sum_maps<V, 4>(image, k, group, c, offsets);
    if (walk.maps - c == 2) return sum_maps<V, 2>(image, k, group, c, offsets);
    if (walk.maps - c == 1) return sum_maps<V, 1>(image, k, group, c, offsets);
  }

  template <class V, int kMaps>
  WSIS_INLINE void sum_maps(const Image<T>& image, int64_t k, int64_t group, int32_t map,
                            const int64_t* offsets) const {
    constexpr int64_t kLanes = sizeof(V) / sizeof(T);
    const int64_t start = map * layout.plane + layout.lead + group * kRows * layout.stride;
    const T* weights =
        image.packed + group * (layout.columns / kLanes) * weights_of_group() * kLanes;
    const T* source = image.buffers[k % 2] + start;
    T* target = image.buffers[(k + 1) % 2] + start;
    T* sum = image.sum + start;
    const T* loss = image.loss + group * kRows * layout.columns;
    const bool recurrence = walk.coefficients != nullptr;
    const T factor = recurrence ? static_cast<T>(walk.coefficients[k + 1]) : T(0);
    const auto rows =
        static_cast<int>(std::min<int64_t>(kRows, layout.height - group * kRows));
    for (int64_t x = 0; x < layout.columns; x += kLanes) {
      V sums[kMaps * kRows] = {};
      weights = add_neighbours<V, kMaps>(weights, source + x, offsets, sums);
      for (int c = 0; c < kMaps; ++c)
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          const int64_t at = c * layout.plane + r * layout.stride + x;
          const V before = load<V>(source + at);
          const V change = sums[c * kRows + r] - load<V>(loss + r * layout.columns + x) * before;
          V value = before + change;
          if (recurrence && k > 0) value = kernels::next_term(before, load<V>(target + at), change);
          store(target + at, value);
          if (factor != 0) store(sum + at, load<V>(sum + at) + factor * value);
        }
    }
  }

  // All positions of a tile, one set of rows after the other. Returns what comes after its weights.
  template <class V, int kMaps>
  WSIS_INLINE const T* add_neighbours(const T* weights, const T* from, const int64_t* offsets,
                                      V* sums) const {
    int32_t p = 0;
    weights = add_set<V, kMaps, 1>(weights, from, offsets, p, sums);
    weights = add_set<V, kMaps, 2>(weights, from, offsets, p, sums);
    weights = add_set<V, kMaps, 3>(weights, from, offsets, p, sums);
    weights = add_set<V, kMaps, 4>(weights, from, offsets, p, sums);
    weights = add_set<V, kMaps, 5>(weights, from, offsets, p, sums);
    weights = add_set<V, kMaps, 6>(weights, from, offsets, p, sums);
    return add_set<V, kMaps, 7>(weights, from, offsets, p, sums);
  }

  template <class V, int kMaps, int kSet>
  WSIS_INLINE const T* add_set(const T* weights, const T* from, const int64_t* offsets, int32_t& p,
                               V* sums) const {
    constexpr int kLanes = sizeof(V) / sizeof(T);
    constexpr int kCount = (kSet & 1) + (kSet >> 1 & 1) + (kSet >> 2 & 1);
    const int32_t stop = stencil.ends[kSet];
    for (; p < stop; ++p, weights += kCount * kLanes) {
      const T* neighbour = from + offsets[p];
      for (int c = 0; c < kMaps; ++c) {
        const V value = load<V>(neighbour + c * layout.plane);
        const T* own = forget(weights);
        for (int r = 0, i = 0; r < kRows; ++r)
          if (kSet >> r & 1) sums[c * kRows + r] += load<V>(own + i++ * kLanes) * value;
      }
    }
    return weights;
  }
};

// Parts of the scratch, in elements.
struct Parts {
  int64_t packed, inverse, buffer;

  Parts(const Walk& walk, const Layout& layout) {
    const int64_t taps = int64_t{walk.offsets.count} * (walk.symmetric ? 2 : 1);
    packed = layout.groups * kRows * layout.columns * taps;
    inverse = round_up(layout.height * layout.columns, kLine);
    buffer = walk.maps * layout.plane;
  }
  int64_t size() const { return packed + 2 * inverse + 3 * buffer; }
};

}  // namespace

int64_t random_walk_scratch(const Walk& walk) { return Parts(walk, Layout(walk)).size(); }

template <class T>
void random_walk(const T* maps, const T* affinity, const Walk& walk, T* scratch, T* result) {
  const Layout layout(walk);
  const Parts sizes(walk, layout);
  prefer_huge_pages(scratch, sizes.size() * static_cast<int64_t>(sizeof(T)));
  T* const inverse = scratch + sizes.packed;
  T* const loss = inverse + sizes.inverse;
  Image<T> image{maps, affinity, result, scratch, inverse, loss, {}, nullptr};
  image.buffers[0] = loss + sizes.inverse;
  image.buffers[1] = image.buffers[0] + sizes.buffer;
  image.sum = image.buffers[1] + sizes.buffer;
  const Stencil stencil(walk, walk.transposed), columns(walk, false);
  const int parts = static_cast<int>(std::min<int64_t>(walk.parts, layout.groups));
  Barrier barrier(parts);
  parallel_for(layout.groups, parts, [&](int, int64_t begin, int64_t end) {
    const WalkRows<T> rows{walk, layout, stencil, columns, image, begin, end, barrier};
    dispatch(rows);
  });
}

#define WSIS_INSTANTIATE(T) \
  template void random_walk(const T*, const T*, const Walk&, T*, T*);
WSIS_INSTANTIATE(float)
WSIS_INSTANTIATE(double)
#undef WSIS_INSTANTIATE

}  // namespace wsis::cpu
