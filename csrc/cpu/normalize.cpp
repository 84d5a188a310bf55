// Passes of one grid are summed before anything is resized, as far as the rule is linear. Rows of
// the small grids are widened once; then whole rows are mixed vertically. Between two rows where a
// grid's source row changes, every output row is first + k * slope, so both are formed once per run
// of rows (3 on average at four scales): the extrema need the two ends of a run only, and the second
// sweep writes one multiply-add per score. The scores are written once, already normalised.
// (Maxima over plain and flipped passes are not linear: there every row is merged, once.)
#include "cpu/normalize.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace wsis::cpu {
namespace {

using kernels::Affine;
using kernels::Extrema;

// Columns are taken in blocks of four vectors; rows in scratch are padded to whole blocks, by
// repeating the last column, which changes no extremum.
constexpr int32_t kVectors = 4;
template <class T>
constexpr int32_t kPad = kVectors * 64 / sizeof(T);  // elements of four of the widest vectors

template <class T>
int32_t padded(int32_t columns) {
  return (columns + kPad<T> - 1) / kPad<T> * kPad<T>;
}

// The grids that are resized: one per size of the passes, or one per pass where they may not be
// summed before.
template <class T>
struct Grids {
  int32_t count = 0;
  int32_t h[kMostPasses], w[kMostPasses];
  int32_t of_pass[kMostPasses];
  int64_t cells[kMostPasses];     // offset in the grids [h, w + 1]
  int64_t rows[kMostPasses];      // offset in the widened rows [h, stride]
  int32_t* first_x[kMostPasses];  // [stride] source column
  int32_t* start_x[kMostPasses];  // [w + 1] first column whose source is w
  int32_t* first_y[kMostPasses];  // [rows of the frame] source row
  T* weight_x[kMostPasses];       // [stride + kPad] of the column after
  T* weight_y[kMostPasses];       // [rows of the frame] of the row after
  int32_t* run;                   // [rows of the frame] rows that share their source rows
  int32_t stride = 0;
  int64_t all_cells = 0, all_rows = 0;
  Scratch scratch{};
};

template <class T>
Grids<T> plan(const Passes<T>& passes, Merge merge, Frame frame, int32_t* tables, T* weights) {
  Grids<T> grids;
  for (int32_t m = 0; m < passes.count; ++m) {
    const Pass<T>& pass = passes.pass[m];
    int32_t g = merge.flip_max ? grids.count : 0;
    while (g < grids.count && (grids.h[g] != pass.h || grids.w[g] != pass.w)) ++g;
    if (g == grids.count) {
      grids.h[g] = pass.h;
      grids.w[g] = pass.w;
      ++grids.count;
    }
    grids.of_pass[m] = g;
  }
  grids.stride = padded<T>(frame.columns);
  Scratch& used = grids.scratch;
  const auto take_table = [&](int64_t size) { return tables + (used.tables += size) - size; };
  const auto take_weights = [&](int64_t size) { return weights + (used.weights += size) - size; };
  for (int32_t g = 0; g < grids.count; ++g) {
    grids.cells[g] = grids.all_cells;
    grids.rows[g] = grids.all_rows;
    grids.all_cells += static_cast<int64_t>(grids.h[g]) * (grids.w[g] + 1);
    grids.all_rows += static_cast<int64_t>(grids.h[g]) * grids.stride;
    grids.first_x[g] = take_table(grids.stride);
    grids.start_x[g] = take_table(grids.w[g] + 1);
    grids.first_y[g] = take_table(frame.rows);
    grids.weight_x[g] = take_weights(grids.stride + kPad<T>);
    grids.weight_y[g] = take_weights(frame.rows);
  }
  grids.run = take_table(frame.rows);
  used.per_part = 2 * grids.stride + grids.all_rows + kPad<T> + grids.all_cells;
  return grids;
}

template <class T>
void fill_tables(const Grids<T>& grids, Frame frame, bool long_runs) {
  for (int32_t g = 0; g < grids.count; ++g) {
    for (int32_t x = 0; x < grids.stride + kPad<T>; ++x) {
      const int32_t column = std::min(x, frame.columns - 1);
      const kernels::Tap<T> tap = kernels::tap<T>(column, grids.w[g], frame.width);
      if (x < grids.stride) grids.first_x[g][x] = tap.first;
      grids.weight_x[g][x] = tap.weight;
    }
    for (int32_t source = 0, x = 0; source <= grids.w[g]; ++source) {
      while (x < grids.stride && grids.first_x[g][x] < source) ++x;
      grids.start_x[g][source] = x;
    }
    for (int32_t y = 0; y < frame.rows; ++y) {
      const kernels::Tap<T> tap = kernels::tap<T>(y, grids.h[g], frame.height);
      grids.first_y[g][y] = tap.first;
      grids.weight_y[g][y] = tap.weight;
    }
  }
  // A run ends where a source row changes, and where the clamp at the border does.
  for (int32_t y = frame.rows - 1; y >= 0; --y) {
    bool goes_on = long_runs && y + 1 < frame.rows;
    for (int32_t g = 0; g < grids.count && goes_on; ++g)
      goes_on = grids.first_y[g][y] == grids.first_y[g][y + 1] &&
                (grids.weight_y[g][y] != T(0) || grids.weight_y[g][y + 1] == T(0));
    grids.run[y] = goes_on ? grids.run[y + 1] + 1 : 1;
  }
}

// Passes of plane p into the grids [h, w + 1]; the last column is there twice.
template <class T>
void fill_grids(const Passes<T>& passes, const Grids<T>& grids, bool positive_each, int64_t p,
                T* cells) {
  for (int32_t m = 0; m < passes.count; ++m) {
    const Pass<T>& pass = passes.pass[m];
    const int32_t g = grids.of_pass[m], w = pass.w;
    const bool first = std::find(grids.of_pass, grids.of_pass + m, g) == grids.of_pass + m;
    for (int32_t y = 0; y < pass.h; ++y) {
      const T* from = pass.maps + (p * pass.h + y) * w;
      T* to = cells + grids.cells[g] + static_cast<int64_t>(y) * (w + 1);
      const auto put = [&](auto value_at) {
        for (int32_t x = 0; x < w; ++x) {
          const T value = positive_each ? kernels::positive_finite(value_at(x)) : value_at(x);
          to[x] = first ? value : to[x] + value;
        }
      };
      if (pass.flip)
        put([&](int32_t x) { return from[w - 1 - x]; });
      else
        put([&](int32_t x) { return from[x]; });
      to[w] = to[w - 1];
    }
  }
}

// Rows of all grids to the width of the frame. Where a source column serves many columns, they are
// written as whole vectors, whose overhang the next source column overwrites.
template <class T>
struct Widen {
  const Grids<T>& grids;
  const T* cells;
  T* rows;

  template <int kBytes>
  WSIS_INLINE void run() const {
    for (int32_t g = 0; g < grids.count; ++g) {
      const int32_t w = grids.w[g];
      const bool long_runs = 4 * static_cast<int64_t>(w) <= grids.stride;
      for (int32_t y = 0; y < grids.h[g]; ++y) {
        const T* from = cells + grids.cells[g] + static_cast<int64_t>(y) * (w + 1);
        T* to = rows + grids.rows[g] + static_cast<int64_t>(y) * grids.stride;
        if (long_runs)
          by_source<Vector<T, kBytes>>(g, w, from, to);
        else
          by_column(g, from, to);
      }
    }
  }

  template <class V>
  WSIS_INLINE void by_source(int32_t g, int32_t w, const T* from, T* to) const {
    constexpr int32_t kLanes = sizeof(V) / sizeof(T);
    const int32_t* start = grids.start_x[g];
    const T* weight = grids.weight_x[g];
    for (int32_t s = 0; s < w; ++s) {
      const V value = from[s] - V{}, slope = from[s + 1] - from[s] - V{};
      const int32_t end = s + 1 < w ? start[s + 1] : grids.stride;
      for (int32_t x = start[s]; x < end; x += kLanes)
        store(to + x, value + load<V>(weight + x) * slope);
    }
  }

  WSIS_INLINE void by_column(int32_t g, const T* from, T* to) const {
    const int32_t* first = grids.first_x[g];
    for (int32_t x = 0; x < grids.stride; ++x)
      to[x] = kernels::mix(from[first[x]], from[first[x] + 1], grids.weight_x[g][x]);
  }
};

// Scores that do not fit a second-level cache are stored around the caches: nobody then reads what
// is about to be overwritten. 16 MB: 1.4 ms instead of 2.2. Rows must begin at 16 bytes.
constexpr int64_t kStoreAround = 1 << 20;

template <class V, class T>
WSIS_INLINE void store_around(T* to, V value) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  using Quarter = Vector<float, 16>;
  Quarter parts[sizeof(V) / 16];
  std::memcpy(parts, &value, sizeof(V));
  for (size_t i = 0; i < sizeof(V) / 16; ++i)
    __builtin_ia32_movntps(reinterpret_cast<float*>(to) + 4 * i, parts[i]);
#else
  store(to, value);
#endif
}

// Stores around the caches are seen by other threads only after this.
inline void finish_stores() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_ia32_sfence();
#endif
}

// What a sweep over the merged plane leaves. Where merging is linear it costs less to merge twice
// than to store and read the merged values; where it is not, less to normalise them in place.
enum class Leave { kExtrema, kScores, kExtremaAndMerged };

template <class T, bool kFlipMax, Leave kLeave>
struct Sweep {
  static constexpr bool kReduce = kLeave != Leave::kScores;
  static constexpr bool kWrite = kLeave != Leave::kExtrema;

  const Grids<T>& grids;
  const T* rows;
  Frame frame;
  T weight;
  Affine<T> affine;
  bool around;  // scores are stored around the caches
  T* line;      // [2, stride] of the current run: its first row, and the slope
  T* scores;
  Extrema<T>* extrema;

  // What the grids contribute to one run of rows.
  struct Source {
    const T *first, *second;
    T weight, step;
  };

  template <int kBytes>
  WSIS_INLINE void run() const {
    using V = Vector<T, kBytes>;
    constexpr int32_t kLanes = kBytes / sizeof(T), kBlock = kVectors * kLanes;
    V low = INFINITY - V{}, high = -INFINITY - V{}, poison{};
    Source sources[kMostPasses];
    for (int32_t y = 0; y < frame.rows; y += grids.run[y]) {
      const int32_t length = grids.run[y];
      for (int32_t g = 0; g < grids.count; ++g) sources[g] = source_of(g, y, length);
      for (int32_t x = 0; x < frame.columns; x += kBlock) {
        V start[kVectors] = {}, slope[kVectors] = {};
        if constexpr (kFlipMax)
          add_pairs(sources, x, start);
        else
          add_linear(sources, x, start, slope);
        for (int v = 0; v < kVectors; ++v) {
          start[v] *= weight - V{};
          slope[v] *= weight - V{};
          if constexpr (kWrite) {
            store(line + x + v * kLanes, start[v]);
            store(line + grids.stride + x + v * kLanes, slope[v]);
          }
          if constexpr (kReduce) {
            const V end = start[v] + static_cast<T>(length - 1) * slope[v];
            low = kernels::lesser(low, kernels::lesser(start[v], end));
            high = kernels::greater(high, kernels::greater(start[v], end));
            poison += kernels::poisoned(start[v]);
          }
        }
      }
      if constexpr (kWrite) {
        for (int32_t k = 0; k < length; ++k)
          write_row<V>(static_cast<T>(k), scores + static_cast<int64_t>(y + k) * frame.columns);
      }
    }
    if constexpr (kReduce) {
      high += poison;
      Extrema<T> all = kernels::no_extrema<T>();
      for (int l = 0; l < kLanes; ++l) all = kernels::join(all, Extrema<T>{low[l], high[l]});
      *extrema = all;
    }
  }

  // Row k of the current run.
  template <class V>
  WSIS_INLINE void write_row(T k, T* to) const {
    constexpr int32_t kLanes = sizeof(V) / sizeof(T);
    const Affine<V> norm{affine.shift - V{}, affine.below - V{}, affine.scale - V{}};
    const T* slope = line + grids.stride;
    int32_t x = 0;
    for (; x + kLanes <= frame.columns; x += kLanes) {
      const V merged = load<V>(line + x) + k * load<V>(slope + x);
      if constexpr (kReduce)
        store(to + x, merged);
      else
        around ? store_around(to + x, kernels::score_of(merged, norm))
               : store(to + x, kernels::score_of(merged, norm));
    }
    for (; x < frame.columns; ++x) {
      const T merged = line[x] + k * slope[x];
      to[x] = kReduce ? merged : kernels::score_of(merged, affine);
    }
  }

  WSIS_INLINE Source source_of(int32_t g, int32_t y, int32_t length) const {
    const int32_t first = grids.first_y[g][y], second = std::min(first + 1, grids.h[g] - 1);
    const T* grid = rows + grids.rows[g];
    const T weight_y = grids.weight_y[g][y];
    const bool moves = length > 1 && grids.weight_y[g][y + 1] != weight_y;
    return {grid + static_cast<int64_t>(first) * grids.stride,
            grid + static_cast<int64_t>(second) * grids.stride, weight_y,
            moves ? T(grids.h[g]) / T(frame.height) : T(0)};
  }

  template <class V>
  WSIS_INLINE void add_linear(const Source* sources, int32_t x, V* start, V* slope) const {
    constexpr int32_t kLanes = sizeof(V) / sizeof(T);
    for (int32_t g = 0; g < grids.count; ++g) {
      const Source& s = sources[g];
      for (int v = 0; v < kVectors; ++v) {
        const V first = load<V>(s.first + x + v * kLanes);
        const V change = load<V>(s.second + x + v * kLanes) - first;
        start[v] += first + s.weight * change;
        slope[v] += s.step * change;
      }
    }
  }

  template <class V>
  WSIS_INLINE void add_pairs(const Source* sources, int32_t x, V* start) const {
    constexpr int32_t kLanes = sizeof(V) / sizeof(T);
    for (int32_t g = 0; g < grids.count; g += 2) {
      const Source &a = sources[g], &b = sources[g + 1];
      for (int v = 0; v < kVectors; ++v) {
        const int32_t at = x + v * kLanes;
        const V plain =
            kernels::mix(load<V>(a.first + at), load<V>(a.second + at), a.weight - V{});
        const V flipped =
            kernels::mix(load<V>(b.first + at), load<V>(b.second + at), b.weight - V{});
        start[v] += kernels::positive(kernels::greater(plain, flipped)) +
                    kernels::poisoned(flipped);  // greater() keeps a NaN of the first only
      }
    }
  }
};

// Merged values to scores, in place.
template <class T>
struct Rescale {
  T* values;
  int64_t n;
  Affine<T> affine;

  template <int kBytes>
  WSIS_INLINE void run() const {
    using V = Vector<T, kBytes>;
    constexpr int64_t kLanes = kBytes / sizeof(T);
    const Affine<V> norm{affine.shift - V{}, affine.below - V{}, affine.scale - V{}};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      store(values + i, kernels::score_of(load<V>(values + i), norm));
    for (; i < n; ++i) values[i] = kernels::score_of(values[i], affine);
  }
};

}  // namespace

template <class T>
Scratch normalize_cams_scratch(const Passes<T>& passes, Merge merge, Frame frame) {
  return plan<T>(passes, merge, frame, nullptr, nullptr).scratch;
}

template <class T>
void normalize_cams(const Passes<T>& passes, Merge merge, Frame frame, T eps, const T* weights,
                    int64_t batch, int32_t num_classes, int32_t skip, int32_t parts,
                    int32_t* tables, T* table_weights, T* scratch, T* scores, T* extrema) {
  const Grids<T> grids = plan(passes, merge, frame, tables, table_weights);
  fill_tables(grids, frame, !merge.flip_max);
  const int64_t n = static_cast<int64_t>(frame.rows) * frame.columns;
  const bool aligned = (reinterpret_cast<uintptr_t>(scores) | frame.columns * sizeof(T)) % 16 == 0;
  const bool around =
      aligned && batch * num_classes * n * static_cast<int64_t>(sizeof(T)) >= kStoreAround;
  parallel_for(batch * num_classes, parts, [&](int part, int64_t begin, int64_t end) {
    T* line = scratch + part * grids.scratch.per_part;
    T* rows = line + 2 * grids.stride;
    T* cells = rows + grids.all_rows + kPad<T>;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t image = p / num_classes;
      T* out = scores + (p + (image + 1) * skip) * n;
      const T weight = weights ? weights[p] : T(1);
      Extrema<T> plane{T(0), T(0)};
      if (weight == T(0)) {
        std::fill_n(out, n, kernels::score_of(T(0), kernels::affine_of(merge.norm, plane, eps)));
      } else {
        fill_grids(passes, grids, merge.positive_each, p, cells);
        dispatch(Widen<T>{grids, cells, rows});
        if (merge.flip_max) {
          dispatch(Sweep<T, true, Leave::kExtremaAndMerged>{
              grids, rows, frame, weight, {}, false, line, out, &plane});
          dispatch(Rescale<T>{out, n, kernels::affine_of(merge.norm, plane, eps)});
        } else {
          dispatch(Sweep<T, false, Leave::kExtrema>{
              grids, rows, frame, weight, {}, false, nullptr, nullptr, &plane});
          const Affine<T> affine = kernels::affine_of(merge.norm, plane, eps);
          dispatch(Sweep<T, false, Leave::kScores>{
              grids, rows, frame, weight, affine, around, line, out, nullptr});
        }
      }
      extrema[2 * p] = plane.low;
      extrema[2 * p + 1] = plane.high;
    }
    finish_stores();
  });
}

template Scratch normalize_cams_scratch(const Passes<float>&, Merge, Frame);
template Scratch normalize_cams_scratch(const Passes<double>&, Merge, Frame);
template void normalize_cams(const Passes<float>&, Merge, Frame, float, const float*, int64_t,
                             int32_t, int32_t, int32_t, int32_t*, float*, float*, float*, float*);
template void normalize_cams(const Passes<double>&, Merge, Frame, double, const double*, int64_t,
                             int32_t, int32_t, int32_t, int32_t*, double*, double*, double*,
                             double*);

}  // namespace wsis::cpu
