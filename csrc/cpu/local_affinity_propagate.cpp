#include "cpu/local_affinity_layout.h"

namespace wsis::cpu {
namespace {

constexpr int kGroup = 8;  // planes whose sums are in registers together
constexpr int64_t kLeastSpan = 4;  // tiles of a strip, so that the columns around it stay few
constexpr int64_t kAhead = 5;  // tiles, between asking for weights and using them
constexpr int64_t kCacheBytes = 256 << 10;  // a quarter of a usual second-level cache

// Where results go: rows of a padded plane, or of the result.
template <class T>
struct Target {
  T* rows;
  int64_t stride, plane;
  bool padded;
};

WSIS_INLINE int64_t floor_div(int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; }

template <class T>
struct PropagateRows {
  const T* source;  // padded planes, at the first pixel
  const T* packed;  // of this image
  const Taps& taps;
  const Padded& layout;
  Target<T> target;
  int32_t planes;
  bool transposed;
  int64_t begin, end;  // rows

  static constexpr T kZeros[kTile] = {};

  template <int kBytes>
  WSIS_INLINE void run() const {
    if (transposed)
      backward<Vector<T, kBytes>>();
    else
      forward<Vector<T, kBytes>>();
  }

  // Weights come from memory once per iteration, a strip of each row, which the processor does not
  // foresee: the same tile of the next row is asked for in time (15 % of an iteration; asking for
  // what lies behind the array does no harm).
  //
  // Columns in strips and planes in sets, such that the rows that a strip looks at, from the largest
  // dilation above to the largest below, stay in the second-level cache from one row to the next.
  template <class V>
  WSIS_INLINE void forward() const {
    const int32_t count = taps.count * kDirections;
    const int64_t tiles = tiles_of(layout.width);
    const int64_t rows = 2 * *std::max_element(taps.dy, taps.dy + taps.count) + 1;
    const int64_t columns = kCacheBytes / (rows * static_cast<int64_t>(sizeof(T)));
    const int64_t most = std::max<int64_t>(columns / (kLeastSpan * kTile + 2 * layout.border), 1);
    const int32_t sets = static_cast<int32_t>((planes + most - 1) / most);
    const int64_t span = std::max<int64_t>(
        (columns * sets / planes - 2 * layout.border) / kTile, kLeastSpan);
    int64_t offsets[kMaxTaps];
    for (int32_t set = 0; set < sets; ++set) {
      const int32_t low = planes * set / sets, high = planes * (set + 1) / sets;
      for (int64_t first = 0; first < tiles; first += span) {
        const int64_t last = std::min(first + span, tiles);
        for (int64_t y = begin; y < end; ++y) {
          tap_offsets(taps, layout, static_cast<int32_t>(y), 0, offsets);
          for_groups(low, high, [&](auto size, int32_t plane) __attribute__((always_inline)) {
            for (int64_t tile = first; tile < last; ++tile)
              gather<V, decltype(size)::kSize>(packed + (y * tiles + tile) * count * kTile,
                                               offsets, count, tiles * count * kTile, false, y,
                                               tile * kTile, plane);
          });
        }
      }
    }
    for (int64_t y = begin; y < end; ++y) close(y);
  }

  template <int kCount>
  struct Size {
    static constexpr int kSize = kCount;
  };

  // Calls body(Size, first plane) for groups of planes.
  template <class Body>
  WSIS_INLINE void for_groups(int32_t plane, int32_t last, Body body) const {
    for (; plane + kGroup <= last; plane += kGroup) body(Size<kGroup>(), plane);
    switch (last - plane) {
      case 7:
        return body(Size<7>(), plane);
      case 6:
        return body(Size<6>(), plane);
      case 5:
        return body(Size<5>(), plane);
      case 4:
        return body(Size<4>(), plane);
      case 3:
        return body(Size<3>(), plane);
      case 2:
        return body(Size<2>(), plane);
      case 1:
        return body(Size<1>(), plane);
    }
  }

  // Sums over taps of a vector of pixels, for some planes.
  template <class V, int kPlanes>
  WSIS_INLINE void sum_up(const T* weights, const T* from, const int64_t* offsets, int32_t count,
                          int64_t next, V* sums) const {
    const int64_t stride = layout.plane;
    for (int32_t p = 0; p < count; ++p) {
      const V weight = load<V>(weights + p * kTile);
      __builtin_prefetch(weights + p * kTile + next, 0, 2);
      const T* neighbour = from + offsets[p];
      for (int g = 0; g < kPlanes; ++g) sums[g] += weight * load<V>(neighbour + g * stride);
    }
  }

  // A tile of the target. `weights` [count, 16]; `next` is how far ahead to ask for weights.
  template <class V, int kPlanes>
  WSIS_INLINE void gather(const T* weights, const int64_t* offsets, int32_t count, int64_t next,
                          bool add, int64_t y, int64_t x, int32_t plane) const {
    constexpr int kLanes = sizeof(V) / sizeof(T);
    const T* from = source + plane * layout.plane + x;
    T* to = target.rows + plane * target.plane + y * target.stride + x;
    for (int part = 0; part < kTile; part += kLanes, to += kLanes) {
      const int64_t left = target.padded ? kLanes : layout.width - x - part;
      if (left <= 0) return;
      const size_t bytes = static_cast<size_t>(std::min<int64_t>(left, kLanes)) * sizeof(T);
      V sums[kPlanes] = {};
      if (add)
        for (int g = 0; g < kPlanes; ++g) std::memcpy(&sums[g], to + g * target.plane, bytes);
      sum_up<V, kPlanes>(weights + part, from + part, offsets, count, next, sums);
      if (left >= kLanes) {
        for (int g = 0; g < kPlanes; ++g) store(to + g * target.plane, sums[g]);
      } else {
        for (int g = 0; g < kPlanes; ++g) std::memcpy(to + g * target.plane, &sums[g], bytes);
      }
    }
  }

  WSIS_INLINE void close(int64_t y) const {
    if (!target.padded) return;
    for (int32_t n = 0; n < planes; ++n)
      layout.close_row(target.rows + n * target.plane + y * target.stride, !transposed);
  }

  // Weights that a place of the target receives, brought into the order in which forward() finds
  // its own: [count, 16], and where their pixels lie.
  struct Received {
    alignas(64) T weights[kMaxTaps * kTile];
    int64_t offsets[kMaxTaps];
    int32_t count;
    // Where the next call goes on: tap, row and column of the source. There may be more pixels than
    // places, where a border stops them.
    int32_t p, row, x;

    void restart() {
      p = 0;
      row = x = -1;
    }
  };

  // Row q receives from every pixel whose step ends in it: in every column from the pixels that no
  // border on the left or right stops; in the first and last column from those, too. The borders
  // of the source are 0.
  template <class V>
  WSIS_INLINE void backward() const {
    const int32_t taps_count = taps.count * kDirections;
    Received from;
    for (int32_t y = static_cast<int32_t>(begin); y < end; ++y) {
      for (int32_t x = 0; x < layout.width; x += kTile) {
        from.restart();
        for (bool add = false; from.p < taps_count; add = true) {
          receive(from, y, x);
          for_groups(0, planes, [&](auto size, int32_t plane) __attribute__((always_inline)) {
            gather<V, decltype(size)::kSize>(from.weights, from.offsets, from.count, 0, add, y, x,
                                             plane);
          });
        }
      }
      for (int32_t side = -1; side <= 1; side += 2) {
        T* column = target.rows + y * target.stride + (side < 0 ? 0 : layout.width - 1);
        from.restart();
        while (from.p < taps_count) {
          receive_stopped(from, y, side);
          for_groups(0, planes, [&](auto size, int32_t plane) __attribute__((always_inline)) {
            constexpr int kPlanes = decltype(size)::kSize;
            constexpr int32_t kLanes = sizeof(V) / sizeof(T);
            V sums[kPlanes] = {};
            for (int32_t part = 0; part < kTile; part += kLanes)
              sum_up<V, kPlanes>(from.weights + part, source + plane * layout.plane + part,
                                 from.offsets, from.count, 0, sums);
            for (int g = 0; g < kPlanes; ++g)
              for (int32_t i = 0; i < kLanes; ++i)
                column[(plane + g) * target.plane] += sums[g][i];
          });
        }
      }
      close(y);
    }
  }

  // Weights of tap p of 16 pixels, 0 beyond the last tile.
  WSIS_INLINE const T* tile_weights(int32_t row, int64_t tile, int32_t p) const {
    const int64_t tiles = tiles_of(layout.width), count = taps.count * kDirections;
    if (tile < 0 || tile >= tiles) return kZeros;
    // Nothing foresees that lines of several rows are read in turn.
    const T* weights = packed + ((row * tiles + tile) * count + p) * kTile;
    __builtin_prefetch(weights + kAhead * count * kTile, 0, 2);
    return weights;
  }

  // For the tile at (y, x).
  WSIS_INLINE void receive(Received& from, int32_t y, int32_t x) const {
    from.count = 0;
    for (; from.p < taps.count * kDirections; ++from.p, from.row = -1) {
      const int32_t dy = kernels::step_y(from.p % kDirections) * taps.dy[from.p / kDirections];
      const int32_t dx = kernels::step_x(from.p % kDirections) * taps.dx[from.p / kDirections];
      const int64_t tile = floor_div(x - dx, kTile);
      const int32_t last = kernels::last_source(y, dy, layout.height);
      if (from.row < 0) from.row = kernels::first_source(y, dy);
      for (; from.row <= last; ++from.row) {
        if (from.count == kMaxTaps) return;
        // Whole tiles are copied, as reading across their ends would fetch lines of other taps.
        T both[2 * kTile];
        std::memcpy(both, tile_weights(from.row, tile, from.p), kTile * sizeof(T));
        std::memcpy(both + kTile, tile_weights(from.row, tile + 1, from.p), kTile * sizeof(T));
        std::memcpy(from.weights + from.count * kTile, both + (x - dx - tile * kTile),
                    kTile * sizeof(T));
        from.offsets[from.count++] = from.row * layout.stride - dx;
      }
    }
  }

  // For the first (side -1) or last (side 1) column of row y.
  WSIS_INLINE void receive_stopped(Received& from, int32_t y, int32_t side) const {
    from.count = 0;
    for (; from.p < taps.count * kDirections; ++from.p, from.row = -1) {
      if (kernels::step_x(from.p % kDirections) != side) continue;
      const int32_t dy = kernels::step_y(from.p % kDirections) * taps.dy[from.p / kDirections];
      const int32_t dx = taps.dx[from.p / kDirections];
      const int32_t first = side < 0 ? 0 : std::max(layout.width - dx, 0);
      const int32_t stop = side < 0 ? std::min(dx, layout.width) : layout.width;
      const int32_t last = kernels::last_source(y, dy, layout.height);
      if (from.row < 0) from.row = kernels::first_source(y, dy);
      for (; from.row <= last; ++from.row, from.x = -1) {
        if (from.x < 0) from.x = first / kTile * kTile;
        for (; from.x < stop; from.x += kTile) {
          if (from.count == kMaxTaps) return;
          const T* weights = tile_weights(from.row, from.x / kTile, from.p);
          T* to = from.weights + from.count * kTile;
          for (int32_t i = 0; i < kTile; ++i)
            to[i] = from.x + i >= first && from.x + i < stop ? weights[i] : T(0);
          from.offsets[from.count++] = from.row * layout.stride + from.x;
        }
      }
    }
  }
};

}  // namespace

template <class T>
void propagate(const T* masks, const T* packed, const int32_t* counts, int64_t batch,
               int32_t planes, int32_t iterations, bool transposed, const AffinityCall& call,
               T* scratch, T* result) {
  const Taps taps = taps_of(call);
  const Padded layout(call, taps);
  const int64_t pixels = static_cast<int64_t>(call.height) * call.width;
  const int64_t weights = tiles_of(call.width) * kTile * taps.count * kDirections * call.height;
  T* buffers[2] = {scratch, scratch + layout.size(planes)};
  prefer_huge_pages(scratch, 2 * layout.size(planes) * static_cast<int64_t>(sizeof(T)));
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t used = counts ? std::clamp(counts[b], 0, planes) : planes;
    T* out = result + b * planes * pixels;
    std::fill(out + used * pixels, out + planes * pixels, T(0));
    if (iterations == 0) std::copy_n(masks + b * planes * pixels, used * pixels, out);
    if (iterations == 0 || used == 0) continue;
    copy_padded(masks + b * planes * pixels, used, layout, !transposed, call.parts, buffers[0]);
    for (int32_t i = 0; i < iterations; ++i) {
      Target<T> target{out, call.width, pixels, false};
      if (i + 1 < iterations)
        target = {buffers[(i + 1) % 2] + layout.lead, layout.stride, layout.plane, true};
      parallel_for(call.height, call.parts, [&](int, int64_t begin, int64_t end) {
        dispatch(PropagateRows<T>{buffers[i % 2] + layout.lead, packed + b * weights, taps, layout,
                                  target, used, transposed, begin, end});
      });
    }
  }
}

template void propagate(const float*, const float*, const int32_t*, int64_t, int32_t, int32_t, bool,
                        const AffinityCall&, float*, float*);
template void propagate(const double*, const double*, const int32_t*, int64_t, int32_t, int32_t,
                        bool, const AffinityCall&, double*, double*);

}  // namespace wsis::cpu
