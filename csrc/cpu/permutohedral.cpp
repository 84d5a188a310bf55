#include "cpu/permutohedral.h"

#include <vector>

#include "cpu/permutohedral_blur.h"
#include "cpu/permutohedral_rows.h"
#include "kernels/dense_crf.h"

namespace wsis::cpu {
namespace {

// Channels that are filtered together: more would not gain anything, and the table grows with them.
constexpr int32_t kTogether = 32;

// A tile's rows, each times its pixel's factor (row-major in the image). The weights would take it
// just as well, but there are d + 1 of them to a pixel, and only a few vectors of channels.
template <class V, class T>
WSIS_INLINE void scale_tile(const float* factors, const Tiles& tiles, const Tile& tile,
                            int32_t stride, T* rows) {
  for (int32_t y = 0; y < tile.height; ++y) {
    const float* factor = factors + (int64_t{tile.y} + y) * tiles.width + tile.x;
    for (int32_t x = 0; x < tile.width; ++x, rows += stride) {
      const V by = V{} + static_cast<T>(factor[x]);
      for (int32_t c = 0; c < stride; c += kLanes<V, T>) store(rows + c, load<V>(rows + c) * by);
    }
  }
}

template <class T>
struct Splat {
  const Lattice& lattice;
  const float* before;
  const T* values;
  int32_t channels, stride;
  int64_t begin, end;
  uint32_t own;
  T *table, *side;
  TileBuffers<T> buffers;

  template <int kBytes>
  WSIS_INLINE void run() const {
    with_row_vector<T, kBytes>(stride,
                               [&](auto v) WSIS_LAMBDA_INLINE { splat<decltype(v)>(); });
  }
  template <class V>
  WSIS_INLINE void splat() const {
    T* aside = side;
    int32_t offsets[kTilePixels * (kernels::kMaxDims + 1)];
    fill_offsets(lattice.dims + 1, stride, offsets);
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = lattice.tiles[t];
      const TileOf of(lattice, t, tile);
      load_tile<V>(values, lattice.tiles, tile, channels, stride, T(1), T(0),
                   buffers.pixels);
      if (before) scale_tile<V>(before, lattice.tiles, tile, stride, buffers.pixels);
      const T* weights = load_weights<T>(of, lattice.tiles, tile, nullptr, buffers.weights);
      dispatch(SplatTile<T>{of, buffers.pixels, weights, stride, offsets, own, table, aside, &aside});
    }
  }
};

template <class T>
struct Slice {
  const Lattice& lattice;
  const float* after;
  const T *table, *factors;
  int32_t channels, stride;
  int64_t begin, end;
  TileBuffers<T> buffers;
  T* result;

  template <int kBytes>
  WSIS_INLINE void run() const {
    with_row_vector<T, kBytes>(stride,
                               [&](auto v) WSIS_LAMBDA_INLINE { slice<decltype(v)>(); });
  }
  template <class V>
  WSIS_INLINE void slice() const {
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = lattice.tiles[t];
      const TileOf of(lattice, t, tile);
      std::memset(buffers.pixels, 0, sizeof(T) * stride * kTilePixels);
      const T* weights = load_weights<T>(of, lattice.tiles, tile, nullptr, buffers.weights);
      dispatch(SliceTile<T>{of, table, factors, weights, stride, buffers.rows, buffers.pixels});
      if (after) scale_tile<V>(after, lattice.tiles, tile, stride, buffers.pixels);
      store_tile<V>(buffers.pixels, lattice.tiles, tile, channels, stride, result);
    }
  }
};

struct Memory {
  int32_t stride, longest;
  int64_t table, buffer;
  std::vector<int64_t> side;  // where each part puts rows aside; the last: their end

  Memory(const Lattice& lattice, const FilterCall& call)
      : stride(stride_for(std::min(call.channels, kTogether))),
        longest(longest_list(lattice)),
        side(call.parts + 1) {
    table = TileBuffers<char>::round_up(lattice.vertices * stride);
    buffer = TileBuffers<char>::size(stride, longest, lattice.dims + 1);
    for (int32_t part = 0; part < call.parts; ++part)
      side[part + 1] = side[part] + (part ? aside(lattice, part, call.parts) : 0);
  }
  int64_t size(int32_t parts) const { return 2 * stride + 16 + table + parts * buffer + side[parts] * stride; }
};

}  // namespace

int64_t filter_scratch_size(const Lattice& lattice, const FilterCall& call) {
  return Memory(lattice, call).size(call.parts);
}

template <class T>
void filter(const Lattice& lattice, const FilterCall& call, const T* values, T* scratch, T* result) {
  const Memory memory(lattice, call);
  const int64_t plane = lattice.tiles.pixels();
  T* factors = scratch;
  T* table = factors + TileBuffers<T>::round_up(memory.stride);
  T* buffers = table + memory.table;
  T* side = buffers + call.parts * memory.buffer;
  for (int32_t first = 0; first < call.channels; first += kTogether) {
    const int32_t channels = std::min(call.channels - first, kTogether);
    const int32_t stride = stride_for(channels);
    for (int32_t c = 0; c < stride; ++c)
      factors[c] = static_cast<T>(kernels::slice_factor(lattice.dims));
    const auto buffers_of = [&](int part) {
      return TileBuffers<T>(buffers + part * memory.buffer, stride, memory.longest);
    };
    std::vector<const T*> sides;
    for (int32_t part = 0; part < call.parts; ++part)
      sides.push_back(side + memory.side[part] * stride);
    const int64_t tiles = lattice.tiles.count();
    with_crew(call.parts, [&](const Crew& crew) {
      crew.share(tiles, [&](int part, int64_t begin, int64_t end) {
        const uint32_t own = part == 0 ? 0 : first_own(lattice, part, call.parts);
        dispatch(Splat<T>{lattice, call.before, values + first * plane, channels, stride, begin, end,
                          own, table, side + memory.side[part] * stride, buffers_of(part)});
      });
      add_aside(lattice, stride, sides, crew, table);
      blur(lattice, stride, call.reverse, crew, table);
      crew.share(tiles, [&](int part, int64_t begin, int64_t end) {
        dispatch(Slice<T>{lattice, call.after, table, factors, channels, stride, begin, end,
                          buffers_of(part), result + first * plane});
      });
    });
  }
}

void normalise(float* factors, int64_t count, bool symmetric) {
  for (int64_t i = 0; i < count; ++i)
    factors[i] = symmetric ? kernels::symmetric_normaliser(factors[i])
                           : kernels::one_sided_normaliser(factors[i]);
}

template void filter(const Lattice&, const FilterCall&, const float*, float*, float*);
template void filter(const Lattice&, const FilterCall&, const double*, double*, double*);

}  // namespace wsis::cpu
