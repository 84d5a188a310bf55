// Each iteration walks over the pixels once: a tile slices all lattices, adds the unaries, takes the
// softmax, and splats the result for the next iteration. Q itself exists for one tile only; then the
// lattices' tables are blurred. Two tables of a lattice take turns.
#include "cpu/dense_crf.h"

#include <vector>

#include "cpu/permutohedral_rows.h"
#include "kernels/dense_crf.h"

namespace wsis::cpu {
namespace {

int64_t round_up(int64_t elements) { return TileBuffers<char>::round_up(elements); }

// Rows of whole vectors do not cross cache lines then.
template <class T>
T* aligned(T* memory) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

struct Memory {
  int32_t stride, longest = 0, corners = 1;
  int64_t buffers = 0, buffer = 0, logits = 0, total = 0;
  std::vector<int64_t> tables;             // of each term, the first of two
  std::vector<std::vector<int64_t>> side;  // of each term and part, in elements

  Memory(const CrfCall& call, bool with_probs) : stride(stride_for(call.labels)), side(call.num_terms) {
    for (int32_t k = 0; k < call.num_terms; ++k) {
      const Lattice& lattice = call.terms[k].lattice;
      longest = std::max(longest, longest_list(lattice));
      corners = std::max(corners, lattice.dims + 1);
    }
    buffers = round_up(int64_t{stride} * call.num_terms);  // after the factors
    buffer = TileBuffers<char>::size(stride, longest, corners);
    total = buffers + buffer * call.parts;
    for (int32_t k = 0; k < call.num_terms; ++k) {
      tables.push_back(total);
      total += 2 * round_up(call.terms[k].lattice.vertices * stride);
      for (int32_t part = 0; part < call.parts; ++part) {
        side[k].push_back(total);
        total += part ? round_up(aside(call.terms[k].lattice, part, call.parts) * stride) : 0;
      }
    }
    logits = total;
    if (!with_probs) total += round_up(int64_t{call.height} * call.width * call.labels);
    total += 16;  // to align the first
  }
};

template <class T>
struct Pass {
  const CrfCall& call;
  const Memory& memory;
  const Tiles& tiles;
  const T *unary, *start;  // planes; start only in the first pass
  T* logits;               // -unary of the tiles, rows of C
  bool keep_logits, read_planes, last, first;
  const std::vector<const T*>& sources;  // a table of each term, blurred
  const std::vector<T*>& targets;
  const T* factors;  // [terms, stride]
  T* scratch;
  T* probs;
  uint8_t* bytes;
  int32_t* integers;
  int part;
  int64_t begin, end;  // tiles
  bool* finite;

  template <int kBytes>
  WSIS_INLINE void run() const {
    stride() == 1 ? walk<T>() : walk<RowVector<T, kBytes>>();
  }
  WSIS_INLINE int32_t stride() const { return memory.stride; }

  template <class V>
  WSIS_INLINE void walk() const {
    T* own_memory = scratch + memory.buffers + part * memory.buffer;
    const TileBuffers<T> buffers(own_memory, stride(), memory.longest);
    T* sides[kMostTerms];
    uint32_t own[kMostTerms];
    for (int32_t k = 0; k < call.num_terms; ++k) {
      sides[k] = scratch + memory.side[k][part];
      own[k] = part == 0 ? 0 : first_own(call.terms[k].lattice, part, call.parts);
    }
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tiles[t];
      load_logits(tile, buffers.pixels);
      if (!first)
        for (int32_t k = 0; k < call.num_terms; ++k) {
          const TileOf of(call.terms[k].lattice, t, tile);
          load_weights(of, tiles, tile, call.terms[k].after, buffers.weights);
          slice_tile<V>(of, sources[k], factors + k * stride(), buffers.weights, stride(),
                        buffers.rows, buffers.pixels);
        }
      if (first && start)
        load_tile(start, tiles, tile, call.labels, stride(), T(1), T(0), buffers.pixels);
      else
        *finite = softmax<V>(tile.pixels(), buffers.pixels) && *finite;
      if (last)
        write(tile, buffers.pixels);
      else
        for (int32_t k = 0; k < call.num_terms; ++k) {
          const TileOf of(call.terms[k].lattice, t, tile);
          load_weights(of, tiles, tile, call.terms[k].before, buffers.weights);
          sides[k] = splat_tile<V>(of, buffers.pixels, buffers.weights, stride(), own[k], targets[k],
                                   sides[k]);
        }
    }
  }

  WSIS_INLINE void load_logits(const Tile& tile, T* rows) const {
    const int32_t labels = call.labels;
    T* kept = logits + tile.first * labels;
    const T none = static_cast<T>(kernels::kNoLabel);
    if (read_planes) {
      load_tile(unary, tiles, tile, labels, stride(), T(-1), none, rows);
      if (keep_logits)
        for (int32_t p = 0; p < tile.pixels(); ++p)
          std::memcpy(kept + p * labels, rows + p * stride(), labels * sizeof(T));
      return;
    }
    for (int32_t p = 0; p < tile.pixels(); ++p) {
      std::memcpy(rows + p * stride(), kept + p * labels, labels * sizeof(T));
      for (int32_t c = labels; c < stride(); ++c) rows[p * stride() + c] = none;
    }
  }

  // In place; false if a pixel's sum is not a number.
  template <class V>
  WSIS_INLINE bool softmax(int32_t pixels, T* rows) const {
    constexpr int kWidth = kLanes<V, T>;
    bool fine = true;
    const int32_t vectors = stride() / kWidth;
    for (int32_t p = 0; p < pixels; ++p, rows += stride()) {
      V most = load<V>(rows);
      for (int32_t g = 1; g < vectors; ++g) most = kernels::larger(most, load<V>(rows + g * kWidth));
      const V highest = V{} + reduce(most, [](T a, T b) WSIS_LAMBDA_INLINE { return a > b ? a : b; });
      V sum{};
      for (int32_t g = 0; g < vectors; ++g) {
        const V power = kernels::unnormalised(load<V>(rows + g * kWidth), highest);
        store(rows + g * kWidth, power);
        sum += power;
      }
      const T total = reduce(sum, [](T a, T b) WSIS_LAMBDA_INLINE { return a + b; });
      fine = fine && total >= T(0.5);
      const T inverse = T(1) / total;
      for (int32_t g = 0; g < vectors; ++g)
        store(rows + g * kWidth, load<V>(rows + g * kWidth) * inverse);
    }
    return fine;
  }

  template <class V, class Op>
  static WSIS_INLINE T reduce(V values, Op op) {
    if constexpr (std::is_same_v<V, T>) {
      return values;
    } else {
      T lane[kLanes<V, T>];
      store(lane, values);
      for (int half = kLanes<V, T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = op(lane[i], lane[i + half]);
      return lane[0];
    }
  }

  WSIS_INLINE void write(const Tile& tile, const T* rows) const {
    if (probs) store_tile(rows, tiles, tile, call.labels, stride(), probs);
    if (!bytes && !integers) return;
    int64_t at = int64_t{tile.y} * tiles.width + tile.x;
    for (int32_t y = 0; y < tile.height; ++y, at += tiles.width - tile.width)
      for (int32_t x = 0; x < tile.width; ++x, ++at, rows += stride()) {
        int32_t best = 0;
        for (int32_t c = 1; c < call.labels; ++c) best = rows[c] > rows[best] ? c : best;
        if (bytes)
          bytes[at] = static_cast<uint8_t>(best);
        else
          integers[at] = best;
      }
  }
};

// Rows of vertices times a matrix [C, C], in place.
template <class T>
void mix_rows(const double* matrix, int32_t labels, int32_t stride, int64_t rows, int32_t parts,
              T* table) {
  parallel_for(rows, parts, [&](int, int64_t begin, int64_t end) {
    std::vector<T> mixed(labels);
    for (T* row = table + begin * stride; row != table + end * stride; row += stride) {
      for (int32_t c = 0; c < labels; ++c) {
        double sum = 0;
        for (int32_t i = 0; i < labels; ++i) sum += matrix[c * labels + i] * row[i];
        mixed[c] = static_cast<T>(sum);
      }
      std::copy(mixed.begin(), mixed.end(), row);
    }
  });
}

}  // namespace

int64_t crf_scratch_size(const CrfCall& call, bool with_probs) {
  return Memory(call, with_probs).total;
}

template <class T>
bool dense_crf(const CrfCall& call, const T* unary, const T* start, T* scratch, T* probs,
               uint8_t* bytes, int32_t* integers) {
  const Memory memory(call, probs != nullptr);
  const Tiles tiles(call.height, call.width);
  const int32_t stride = memory.stride;
  scratch = aligned(scratch);
  T* factors = scratch;
  std::vector<const T*> sources(call.num_terms);
  std::vector<T*> targets(call.num_terms);
  for (int32_t k = 0; k < call.num_terms; ++k) {
    const Term& term = call.terms[k];
    const double slice = kernels::slice_factor(term.lattice.dims);
    for (int32_t c = 0; c < stride; ++c)
      factors[k * stride + c] =
          static_cast<T>(c >= call.labels ? 0.0 : term.full ? slice : slice * term.mix[c]);
    targets[k] = scratch + memory.tables[k];
    sources[k] = targets[k] + round_up(term.lattice.vertices * stride);
  }
  // Where there is a result, the kept unaries lie in its place: the last pass reads the originals.
  T* logits = probs ? probs : scratch + memory.logits;
  std::vector<char> finite(call.parts, 1);
  for (int32_t i = 0; i <= call.iterations; ++i) {
    const bool last = i == call.iterations;
    parallel_for(tiles.count(), call.parts, [&](int part, int64_t begin, int64_t end) {
      bool fine = true;
      dispatch(Pass<T>{call, memory, tiles, unary, start, logits, i == 0 && call.iterations > 1,
                       i == 0 || last, last, i == 0, sources, targets, factors, scratch, probs,
                       bytes, integers, part, begin, end, &fine});
      finite[part] = finite[part] && fine;
    });
    if (last) break;
    for (int32_t k = 0; k < call.num_terms; ++k) {
      const Term& term = call.terms[k];
      std::vector<const T*> sides;
      for (int64_t offset : memory.side[k]) sides.push_back(scratch + offset);
      add_aside(term.lattice, stride, sides, targets[k]);
      blur(term.lattice, stride, false, call.parts, targets[k]);
      if (term.full)
        mix_rows(term.mix, call.labels, stride, term.lattice.vertices, call.parts, targets[k]);
      T* blurred = targets[k];
      targets[k] = const_cast<T*>(sources[k]);
      sources[k] = blurred;
    }
  }
  for (char fine : finite)
    if (!fine) return false;
  return true;
}

template bool dense_crf(const CrfCall&, const float*, const float*, float*, float*, uint8_t*,
                        int32_t*);
template bool dense_crf(const CrfCall&, const double*, const double*, double*, double*, uint8_t*,
                        int32_t*);

}  // namespace wsis::cpu
