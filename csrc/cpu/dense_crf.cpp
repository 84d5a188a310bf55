// Each iteration walks over the pixels once: a tile slices all lattices, adds the unaries, takes the
// softmax, and splats the result for the next iteration. Q itself exists for one tile only; then the
// lattices' tables are blurred. Two tables of a lattice take turns.
#include "cpu/dense_crf.h"

#include <vector>

#include "cpu/dense_crf_update.h"
#include "cpu/memory.h"
#include "cpu/permutohedral_blur.h"

namespace wsis::cpu {
namespace {

int64_t round_up(int64_t elements) { return TileBuffers<char>::round_up(elements); }

// Rows of whole vectors do not cross cache lines then.
template <class T>
T* aligned(T* memory) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

struct Memory {
  int32_t stride, longest = 0, corners = 0;
  int64_t buffers = 0, buffer = 0, logits = 0, total = 0;
  std::vector<int64_t> tables;             // of each term, the first of two
  std::vector<std::vector<int64_t>> side;  // of each term and part
  std::vector<int64_t> folded;             // weights times factors of a symmetric term, or -1
  std::vector<std::vector<int32_t>> offsets;  // of each term, see fill_offsets()

  Memory(const CrfCall& call, bool with_probs) : stride(stride_for(call.labels)), side(call.num_terms) {
    for (int32_t k = 0; k < call.num_terms; ++k) {
      const Lattice& lattice = call.terms[k].lattice;
      longest += longest_list(lattice);
      corners += lattice.dims + 1;
    }
    buffers = round_up(int64_t{stride} * call.num_terms);  // after the factors
    buffer = TileBuffers<char>::size(stride, longest, corners);
    total = buffers + buffer * call.parts;
    for (int32_t k = 0; k < call.num_terms; ++k) {
      const Term& term = call.terms[k];
      const bool fold = term.before && term.before == term.after;
      folded.push_back(fold ? total : -1);
      if (fold) total += round_up(term.lattice.tiles.pixels() * (term.lattice.dims + 1));
      offsets.emplace_back(kTilePixels * (term.lattice.dims + 1));
      fill_offsets(term.lattice.dims + 1, stride, offsets.back().data());
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

// One walk over some of the tiles.
template <class T>
struct Pass {
  const CrfCall& call;
  const Memory& memory;
  const Tiles& tiles;
  const T *unary, *start;  // planes; start only in the first pass
  T* logits;               // -unary of the tiles, rows of C
  bool keep_logits, read_planes, last, first, shift;
  const std::vector<const T*>& sources;  // a table of each term, blurred
  const std::vector<T*>& targets;
  const T* factors;  // [terms, stride]
  T* scratch;
  T* probs;
  uint8_t* bytes;
  int32_t* integers;
  int part;
  int64_t begin, end;  // tiles
  Sums<T>* sums;

  template <int kBytes>
  WSIS_INLINE void run() const {
    with_row_vector<T, kBytes>(memory.stride,
                               [&](auto v) WSIS_LAMBDA_INLINE { walk<decltype(v)>(); });
  }

  template <class V>
  WSIS_INLINE void walk() const {
    const int32_t stride = memory.stride;
    const TileBuffers<T> buffers(scratch + memory.buffers + part * memory.buffer, stride,
                                 memory.longest);
    T* sides[kMostTerms];
    uint32_t own[kMostTerms];
    for (int32_t k = 0; k < call.num_terms; ++k) {
      sides[k] = scratch + memory.side[k][part];
      own[k] = part == 0 ? 0 : first_own(call.terms[k].lattice, part, call.parts);
    }
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tiles[t];
      if (t + 1 < end)
        for (int32_t k = 0; k < call.num_terms; ++k)
          prefetch_rows(call.terms[k].lattice, t + 1, first ? nullptr : sources[k],
                        last ? nullptr : targets[k], stride);
      if (first || last || shift || !Update<T>::serves(stride))
        slowly<V>(t, tile, buffers);
      else
        update<V>(t, tile, buffers);
      if (last)
        write<V>(tile, buffers.pixels);
      else
        for (int32_t k = 0; k < call.num_terms; ++k) {
          const TileOf of(call.terms[k].lattice, t, tile);
          const T* weights = weights_of(k, of, tile, call.terms[k].before, buffers.weights);
          dispatch(SplatTile<T>{of, buffers.pixels, weights, stride, memory.offsets[k].data(),
                                own[k], targets[k], sides[k], &sides[k]});
        }
    }
  }

  // Any pass.
  template <class V>
  WSIS_INLINE void slowly(int64_t t, const Tile& tile, const TileBuffers<T>& buffers) const {
    const int32_t stride = memory.stride;
    const bool given = first && start;
    if (!given || keep_logits) {
      load_logits<V>(tile, buffers.pixels);
      for (int32_t k = 0; !first && k < call.num_terms; ++k) {
        const TileOf of(call.terms[k].lattice, t, tile);
        const T* weights = weights_of(k, of, tile, call.terms[k].after, buffers.weights);
        dispatch(SliceTile<T>{of, sources[k], factors + k * stride, weights, stride, buffers.rows,
                              buffers.pixels});
      }
      if (first || last || shift) dispatch(Shift<T>{buffers.pixels, tile.pixels(), stride, sums});
      if (keep_logits) keep(tile, buffers.pixels);
    }
    if (given)
      load_tile<V>(start, tiles, tile, call.labels, stride, T(1), T(0), buffers.pixels);
    else
      dispatch(Softmax<T>{buffers.pixels, tile.pixels(), stride, sums});
  }

  // Logits of a tile for the passes to come, each pixel's largest taken off.
  WSIS_INLINE void keep(const Tile& tile, const T* rows) const {
    T* kept = logits + tile.first * call.labels;
    for (int32_t p = 0; p < tile.pixels(); ++p, rows += memory.stride)
      for (int32_t c = 0; c < call.labels; ++c) *kept++ = rows[c];
  }

  // Passes between the first and the last, for rows that fit in registers.
  template <class V>
  WSIS_INLINE void update(int64_t t, const Tile& tile, const TileBuffers<T>& buffers) const {
    const int32_t stride = memory.stride;
    Source<T> from[kMostTerms];
    T *rows = buffers.rows, *weights = buffers.weights;
    for (int32_t k = 0; k < call.num_terms; ++k) {
      const TileOf of(call.terms[k].lattice, t, tile);
      dispatch(CopyRows<T>{of, sources[k], factors + k * stride, stride, rows});
      from[k] = {of.slots, weights_of(k, of, tile, call.terms[k].after, weights), rows, of.corners};
      rows += int64_t{of.listed} * stride;
      weights += kTilePixels * of.corners;
    }
    const T* kept = logits + tile.first * call.labels;
    int32_t pitch = call.labels;
    // Whole vectors are read: where that would go past the end of the logits, from a copy.
    if ((tiles.pixels() - tile.first - tile.pixels()) * pitch < stride) {
      load_logits<V>(tile, buffers.pixels);
      kept = buffers.pixels;
      pitch = stride;
    }
    dispatch(Update<T>{kept, pitch, call.num_terms, tile.pixels(), stride, from, buffers.pixels,
                       sums});
  }

  // Weights with the factors of a symmetric term were multiplied once for all iterations.
  WSIS_INLINE const T* weights_of(int32_t k, const TileOf& of, const Tile& tile,
                                  const float* factors_of_pixels, T* buffer) const {
    if (memory.folded[k] >= 0) return scratch + memory.folded[k] + tile.first * of.corners;
    return load_weights(of, tiles, tile, factors_of_pixels, buffer);
  }

  template <class V>
  WSIS_INLINE void load_logits(const Tile& tile, T* rows) const {
    const int32_t labels = call.labels, stride = memory.stride;
    const T none = static_cast<T>(kernels::kNoLabel);
    const T* kept = logits + tile.first * labels;
    if (read_planes) {
      load_tile<V>(unary, tiles, tile, labels, stride, T(-1), none, rows);
      return;
    }
    // Below, whole vectors are read: where that would go past the end, single numbers.
    if ((tiles.pixels() - tile.first - tile.pixels()) * labels < stride) {
      for (int32_t p = 0; p < tile.pixels(); ++p)
        for (int32_t c = 0; c < stride; ++c)
          rows[p * stride + c] = c < labels ? kept[p * labels + c] : none;
      return;
    }
    // What lies beyond the labels is the next pixel's.
    constexpr int32_t kStep = kLanes<V, T>;
    const int32_t whole = labels / kStep * kStep;
    BitsOf<V, T> mask{};
    V outside{};
    if constexpr (!std::is_same_v<V, T>)
      for (int32_t i = 0; i < kStep; ++i) {
        mask[i] = i < labels - whole ? -1 : 0;
        outside[i] = i < labels - whole ? T(0) : none;
      }
    for (int32_t p = 0; p < tile.pixels(); ++p, kept += labels, rows += stride) {
      int32_t c = 0;
      for (; c < whole; c += kStep) store(rows + c, load<V>(kept + c));
      if (c < labels) {
        store(rows + c, masked(load<V>(kept + c), mask) + outside);
        c += kStep;
      }
      for (; c < stride; c += kStep) store(rows + c, V{} + none);
    }
  }

  template <class V>
  WSIS_INLINE void write(const Tile& tile, const T* rows) const {
    if (probs) store_tile<V>(rows, tiles, tile, call.labels, memory.stride, probs);
    if (!bytes && !integers) return;
    int64_t at = int64_t{tile.y} * tiles.width + tile.x;
    for (int32_t y = 0; y < tile.height; ++y, at += tiles.width - tile.width)
      for (int32_t x = 0; x < tile.width; ++x, ++at, rows += memory.stride) {
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
void mix_rows(const double* matrix, int32_t labels, int32_t stride, int64_t rows, const Crew& crew,
              T* table) {
  crew.share(rows, [&](int, int64_t begin, int64_t end) {
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

// As dense_crf(), all softmaxes shifted or only those at the ends.
template <class T>
bool infer(const CrfCall& call, const Memory& memory, bool shift, const T* unary, const T* start,
           T* scratch, T* probs, uint8_t* bytes, int32_t* integers) {
  const Tiles tiles(call.height, call.width);
  const int32_t stride = memory.stride, terms = call.num_terms;
  std::vector<std::vector<const T*>> sides(terms);
  for (int32_t k = 0; k < terms; ++k)
    for (int64_t offset : memory.side[k]) sides[k].push_back(scratch + offset);
  // Where there is a result, the kept unaries lie in its place: the last pass reads the originals.
  T* logits = probs ? probs : scratch + memory.logits;
  std::vector<Sums<T>> sums(call.parts);
  with_crew(call.parts, [&](const Crew& crew) {
    std::vector<const T*> sources(terms);
    std::vector<T*> targets(terms);
    for (int32_t k = 0; k < terms; ++k) {
      targets[k] = scratch + memory.tables[k];
      sources[k] = targets[k] + round_up(call.terms[k].lattice.vertices * stride);
    }
    for (int32_t i = 0; i <= call.iterations; ++i) {
      const bool last = i == call.iterations, first = i == 0;
      crew.share(tiles.count(), [&](int part, int64_t begin, int64_t end) {
        dispatch(Pass<T>{call, memory, tiles, unary, start, logits, first && call.iterations > 1,
                         first || last, last, first, shift, sources, targets,
                         scratch, scratch, probs, bytes, integers, part, begin, end, &sums[part]});
      });
      if (last) break;
      for (int32_t k = 0; k < terms; ++k) {
        const Term& term = call.terms[k];
        add_aside(term.lattice, stride, sides[k], crew, targets[k]);
        blur(term.lattice, stride, false, crew, targets[k]);
        if (term.full)
          mix_rows(term.mix, call.labels, stride, term.lattice.vertices, crew, targets[k]);
        T* blurred = targets[k];
        targets[k] = const_cast<T*>(sources[k]);
        sources[k] = blurred;
      }
    }
  });
  for (const Sums<T>& part : sums)
    if (!part.sound()) return false;
  return true;
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
  prefer_huge_pages(scratch, memory.total * static_cast<int64_t>(sizeof(T)));
  if (probs) prefer_huge_pages(probs, tiles.pixels() * call.labels * static_cast<int64_t>(sizeof(T)));
  scratch = aligned(scratch);
  for (int32_t k = 0; k < call.num_terms; ++k) {
    const Term& term = call.terms[k];
    const double slice = kernels::slice_factor(term.lattice.dims);
    for (int32_t c = 0; c < memory.stride; ++c)  // of the slice, see Pass::factors
      scratch[k * memory.stride + c] =
          static_cast<T>(c >= call.labels ? 0.0 : term.full ? slice : slice * term.mix[c]);
  }
  parallel_for(tiles.count(), call.parts, [&](int, int64_t begin, int64_t end) {
    for (int32_t k = 0; k < call.num_terms; ++k)
      for (int64_t t = begin; memory.folded[k] >= 0 && t < end; ++t) {
        const Tile tile = tiles[t];
        const TileOf of(call.terms[k].lattice, t, tile);
        load_weights(of, tiles, tile, call.terms[k].before,
                     scratch + memory.folded[k] + tile.first * of.corners);
      }
  });
  return infer(call, memory, false, unary, start, scratch, probs, bytes, integers) ||
         infer(call, memory, true, unary, start, scratch, probs, bytes, integers);
}

template bool dense_crf(const CrfCall&, const float*, const float*, float*, float*, uint8_t*,
                        int32_t*);
template bool dense_crf(const CrfCall&, const double*, const double*, double*, double*, uint8_t*,
                        int32_t*);

}  // namespace wsis::cpu
