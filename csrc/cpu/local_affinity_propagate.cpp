#include "cpu/local_affinity_layout.h"

namespace wsis::cpu {
namespace {

constexpr int kGroup = 8;     // planes whose sums are in registers together
constexpr int64_t kSpan = 4;  // tiles of a row that all planes share
constexpr int64_t kAhead = 5;  // tiles, between asking for weights and using them
// Rows that an iteration takes before the next one gets its turn: they share most of the rows around
// them, which then come from the second-level cache. 8 is 15 % faster than 1.
constexpr int64_t kBand = 8;
// The rows of a wave: weights, masks and results of a few planes. A third of a usual last-level
// cache; 20 MiB are 20 % slower, and without a wave an iteration takes 1.4 times as long.
constexpr int64_t kCacheBytes = 10 << 20;

// Where results go: rows of a padded plane, or of the result.
template <class T>
struct Target {
  T* rows;
  int64_t stride, plane;
  bool padded;
};

// One image.
template <class T>
struct Propagation {
  const T* packed;
  const Taps& taps;
  const Padded& layout;
  T* buffers[2];  // padded planes, at the first pixel; the masks are in the first
  T* result;
  int32_t iterations;
  bool transposed;

  // Rows from one iteration of a wave to the next: whole bands, at least as many as a tap reaches.
  int64_t lag() const {
    return (*std::max_element(taps.dy, taps.dy + taps.count) + kBand - 1) / kBand * kBand;
  }
};

WSIS_INLINE int64_t floor_div(int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; }

// Some rows of all planes, for several iterations in a wave: iteration k works on a band of rows when
// its predecessor has come `lag` rows further, so that it finds the rows around the band finished and
// in the cache, along with the weights. What it writes are rows that its predecessor has read for the
// last time, so two buffers do.
template <class T>
struct PropagateRows {
  const Propagation<T>& all;
  int32_t iteration, wave;  // the first, and how many
  int32_t planes;
  int64_t begin, end;  // rows
  const Taps& taps = all.taps;
  const Padded& layout = all.layout;

  static constexpr T kZeros[kTile] = {};

  template <int kBytes>
  WSIS_INLINE void run() const {
    const int64_t lag = all.lag();
    for (int64_t front = begin; front < end + lag * (wave - 1); front += kBand)
      for (int32_t k = 0; k < wave; ++k) {
        const T* source = all.buffers[(iteration + k) % 2];
        const Target<T> target = target_of(iteration + k);
        const int64_t first = front - lag * k;
        for (int64_t y = std::max(first, begin); y < std::min(first + kBand, end); ++y) {
          if (all.transposed)
            backward<Vector<T, kBytes>>(static_cast<int32_t>(y), source, target);
          else
            forward<Vector<T, kBytes>>(static_cast<int32_t>(y), source, target);
          close(y, target);
        }
      }
  }

  WSIS_INLINE Target<T> target_of(int32_t i) const {
    if (i + 1 < all.iterations)
      return {all.buffers[(i + 1) % 2], layout.stride, layout.plane, true};
    return {all.result, layout.width, static_cast<int64_t>(layout.width) * layout.height, false};
  }

  template <class V>
  WSIS_INLINE void forward(int32_t y, const T* source, const Target<T>& target) const {
    const int32_t count = taps.count * kDirections;
    const int64_t tiles = tiles_of(layout.width), per_tile = count * kTile;
    int64_t offsets[kMaxTaps];
    tap_offsets(taps, layout, y, 0, offsets);
    // All planes of a few tiles before the next: their weights stay in the first-level cache. What
    // comes from memory is asked for a row ahead (15 % of an iteration; asking for what lies behind
    // the array does no harm). Two tiles of few planes go together, as the sums of a few planes alone
    // would wait for each other.
    for (int64_t first = 0; first < tiles; first += kSpan) {
      const int64_t last = std::min(first + kSpan, tiles);
      for_groups([&](auto size, int32_t plane) __attribute__((always_inline)) {
        constexpr int kPlanes = decltype(size)::kSize;
        constexpr int kTiles = kPlanes <= kGroup / 2 ? 2 : 1;
        const T* weights = all.packed + (y * tiles + first) * per_tile;
        int64_t tile = first;
        for (; tile + kTiles <= last; tile += kTiles, weights += kTiles * per_tile)
          gather<V, kPlanes, kTiles>(weights, offsets, count, tiles * per_tile, y, tile * kTile,
                                     plane, source, target);
        for (; tile < last; ++tile, weights += per_tile)
          gather<V, kPlanes, 1>(weights, offsets, count, tiles * per_tile, y, tile * kTile, plane,
                                source, target);
      });
    }
  }

  template <int kCount>
  struct Size {
    static constexpr int kSize = kCount;
  };

  // Calls body(Size, first plane) for groups of planes.
  template <class Body>
  WSIS_INLINE void for_groups(Body body) const {
    int32_t plane = 0;
    for (; plane + kGroup <= planes; plane += kGroup) body(Size<kGroup>(), plane);
    switch (planes - plane) {
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

  // Sums over taps of a vector of pixels in each of some tiles, for some planes. `next` is how far
  // ahead to ask for weights.
  template <class V, int kPlanes, int kTiles>
  WSIS_INLINE void sum_up(const T* weights, const T* from, const int64_t* offsets, int32_t count,
                          int64_t next, V* sums) const {
    const int64_t stride = layout.plane;
    for (int32_t p = 0; p < count; ++p) {
      V weight[kTiles];
      for (int t = 0; t < kTiles; ++t) {
        const T* at = weights + (t * count + p) * kTile;
        weight[t] = load<V>(at);
        __builtin_prefetch(at + next, 0, 2);
      }
      const T* neighbour = from + offsets[p];
      for (int g = 0; g < kPlanes; ++g)
        for (int t = 0; t < kTiles; ++t)
          sums[g * kTiles + t] += weight[t] * load<V>(neighbour + g * stride + t * kTile);
    }
  }

  // Tiles of the target side by side. `weights` [tiles, count, 16]; `add` to what is there.
  template <class V, int kPlanes, int kTiles>
  WSIS_INLINE void gather(const T* weights, const int64_t* offsets, int32_t count, int64_t next,
                          int64_t y, int64_t x, int32_t plane, const T* source,
                          const Target<T>& target, bool add = false) const {
    constexpr int kLanes = sizeof(V) / sizeof(T);
    const T* from = source + plane * layout.plane + x;
    T* row = target.rows + plane * target.plane + y * target.stride;
    const int64_t room = target.padded ? (x / kTile + kTiles) * kTile : layout.width;
    for (int part = 0; part < kTile; part += kLanes) {
      const auto bytes = [&](int t) {
        const int64_t left = room - x - part - t * kTile;
        return static_cast<size_t>(std::clamp<int64_t>(left, 0, kLanes)) * sizeof(T);
      };
      if (bytes(0) == 0) return;
      V sums[kPlanes * kTiles] = {};
      for (int t = 0; t < kTiles && add; ++t)
        for (int g = 0; g < kPlanes; ++g)
          std::memcpy(&sums[g * kTiles + t], row + g * target.plane + x + part + t * kTile, bytes(t));
      sum_up<V, kPlanes, kTiles>(weights + part, from + part, offsets, count, next, sums);
      for (int t = 0; t < kTiles; ++t) {
        T* to = row + x + part + t * kTile;
        if (bytes(t) == sizeof(V)) {
          for (int g = 0; g < kPlanes; ++g) store(to + g * target.plane, sums[g * kTiles + t]);
        } else {
          for (int g = 0; g < kPlanes; ++g)
            std::memcpy(to + g * target.plane, &sums[g * kTiles + t], bytes(t));
        }
      }
    }
  }

  WSIS_INLINE void close(int64_t y, const Target<T>& target) const {
    if (!target.padded) return;
    for (int32_t n = 0; n < planes; ++n)
      layout.close_row(target.rows + n * target.plane + y * target.stride, !all.transposed);
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
  WSIS_INLINE void backward(int32_t y, const T* source, const Target<T>& target) const {
    const int32_t taps_count = taps.count * kDirections;
    Received from;
    for (int32_t x = 0; x < layout.width; x += kTile) {
      from.restart();
      for (bool add = false; from.p < taps_count; add = true) {
        receive(from, y, x);
        for_groups([&](auto size, int32_t plane) __attribute__((always_inline)) {
          gather<V, decltype(size)::kSize, 1>(from.weights, from.offsets, from.count, 0, y, x,
                                              plane, source, target, add);
        });
      }
    }
    for (int32_t side = -1; side <= 1; side += 2) {
      T* column = target.rows + y * target.stride + (side < 0 ? 0 : layout.width - 1);
      from.restart();
      while (from.p < taps_count) {
        receive_stopped(from, y, side);
        for_groups([&](auto size, int32_t plane) __attribute__((always_inline)) {
          constexpr int kPlanes = decltype(size)::kSize;
          constexpr int32_t kLanes = sizeof(V) / sizeof(T);
          V sums[kPlanes] = {};
          for (int32_t part = 0; part < kTile; part += kLanes)
            sum_up<V, kPlanes, 1>(from.weights + part, source + plane * layout.plane + part,
                               from.offsets, from.count, 0, sums);
          for (int g = 0; g < kPlanes; ++g)
            for (int32_t i = 0; i < kLanes; ++i)
              column[(plane + g) * target.plane] += sums[g][i];
        });
      }
    }
  }

  // Weights of tap p of 16 pixels, 0 beyond the last tile.
  WSIS_INLINE const T* tile_weights(int32_t row, int64_t tile, int32_t p) const {
    const int64_t tiles = tiles_of(layout.width), count = taps.count * kDirections;
    if (tile < 0 || tile >= tiles) return kZeros;
    // Nothing foresees that lines of several rows are read in turn.
    const T* weights = all.packed + ((row * tiles + tile) * count + p) * kTile;
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

// Planes that go through all iterations together. The transpose takes more, as it brings the weights
// into order for each set of planes anew.
int32_t most_planes(bool transposed) { return transposed ? 3 * kGroup : kGroup; }

// Whether threads share planes, not rows.
bool by_planes(int32_t planes, int32_t parts) { return parts == 1 || planes >= 4 * parts; }

}  // namespace

int64_t propagate_scratch(int32_t planes, bool transposed, const AffinityCall& call) {
  const Padded layout(call, taps_of(call));
  const int32_t by_rows = std::min(planes, 4 * call.parts - 1);
  const int32_t by_set = std::min(planes, most_planes(transposed));
  return 2 * std::max(layout.size(by_set) * call.parts, layout.size(by_rows));
}

template <class T>
void propagate(const T* masks, const T* packed, const int32_t* counts, int64_t batch,
               int32_t planes, int32_t iterations, bool transposed, const AffinityCall& call,
               T* scratch, T* result) {
  const Taps taps = taps_of(call);
  const Padded layout(call, taps);
  const int64_t pixels = static_cast<int64_t>(call.height) * call.width;
  const int64_t row_weights = tiles_of(call.width) * kTile * taps.count * kDirections;
  const auto huge = [](T* begin, int64_t count) {
    prefer_huge_pages(begin, count * static_cast<int64_t>(sizeof(T)));
  };
  huge(scratch, propagate_scratch(planes, transposed, call));
  huge(result, batch * planes * pixels);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t used = counts ? std::clamp(counts[b], 0, planes) : planes;
    const T* from = masks + b * planes * pixels;
    T* out = result + b * planes * pixels;
    std::fill(out + used * pixels, out + planes * pixels, T(0));
    if (iterations == 0) std::copy_n(from, used * pixels, out);
    if (iterations == 0 || used == 0) continue;
    // The planes from `first` on, with buffers of their own.
    const auto start = [&](int32_t first, int32_t count, T* buffers, int parts) {
      copy_padded(from + first * pixels, count, layout, !transposed, parts, buffers);
      return Propagation<T>{packed + b * row_weights * call.height,
                            taps,
                            layout,
                            {buffers + layout.lead, buffers + layout.size(count) + layout.lead},
                            out + first * pixels,
                            iterations,
                            transposed};
    };
    if (!by_planes(used, call.parts)) {
      const Propagation<T> all = start(0, used, scratch, call.parts);
      for (int32_t i = 0; i < iterations; ++i)
        parallel_for(call.height, call.parts, [&](int, int64_t begin, int64_t end) {
          dispatch(PropagateRows<T>{all, i, 1, used, begin, end});
        });
      continue;
    }
    // Threads have planes of their own and never wait for each other.
    parallel_for(used, call.parts, [&](int part, int64_t low, int64_t high) {
      const int32_t most = most_planes(transposed);
      T* buffers = scratch + part * 2 * layout.size(std::min(planes, most));
      const int64_t sets = (high - low + most - 1) / most;
      for (int64_t set = 0; set < sets; ++set) {
        const auto first = static_cast<int32_t>(low + (high - low) * set / sets);
        const auto last = static_cast<int32_t>(low + (high - low) * (set + 1) / sets);
        const Propagation<T> some = start(first, last - first, buffers, 1);
        const int64_t row = row_weights + 2 * (last - first) * layout.stride;
        const int64_t rows = kCacheBytes / (row * static_cast<int64_t>(sizeof(T)));
        const auto wave =
            static_cast<int32_t>(std::clamp<int64_t>(rows / some.lag(), 1, iterations));
        for (int32_t i = 0; i < iterations; i += wave)
          dispatch(PropagateRows<T>{some, i, std::min(wave, iterations - i), last - first, 0,
                                    call.height});
      }
    });
  }
}

template void propagate(const float*, const float*, const int32_t*, int64_t, int32_t, int32_t, bool,
                        const AffinityCall&, float*, float*);
template void propagate(const double*, const double*, const int32_t*, int64_t, int32_t, int32_t,
                        bool, const AffinityCall&, double*, double*);

}  // namespace wsis::cpu
