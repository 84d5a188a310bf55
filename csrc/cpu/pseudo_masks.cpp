#include "cpu/pseudo_masks.h"

#include <algorithm>

#include "cpu/simd.h"
#include "kernels/confusion.h"
#include "kernels/pseudo_masks.h"

namespace wsis::cpu {
namespace {

using kernels::kBackground;
using kernels::Lerp;
using kernels::Range;

// Pixels of a row are taken in blocks whose intermediate values stay in the first-level cache.
constexpr int32_t kBlock = 512;
constexpr int32_t kSpan = 2048;  // input columns of a block

// A block of output columns: where they lie in the input, relative to `first`.
template <class T>
struct Columns {
  int32_t begin, size;  // of the output
  int32_t first, span;  // of the input
  int32_t low[kBlock], high[kBlock];
  T weight[kBlock];
};

// How many output columns have their inputs within kSpan columns.
int32_t block_of(int32_t from, int32_t to) {
  const int64_t fit = 1 + static_cast<int64_t>(kSpan - 3) * to / from;
  return static_cast<int32_t>(std::clamp<int64_t>(fit, 1, kBlock));
}

template <class T>
WSIS_INLINE void place(int32_t begin, int32_t end, int32_t from, int32_t to, Columns<T>& columns) {
  columns.begin = begin;
  columns.size = end - begin;
  columns.first = kernels::lerp_at<T>(begin, from, to).low;
  columns.span = kernels::lerp_at<T>(end - 1, from, to).high - columns.first + 1;
  for (int32_t i = 0; i < columns.size; ++i) {
    const Lerp<T> x = kernels::lerp_at<T>(begin + i, from, to);
    columns.low[i] = x.low - columns.first;
    columns.high[i] = x.high - columns.first;
    columns.weight[i] = x.weight;
  }
}

template <class T>
WSIS_INLINE void blend_rows(const T* upper, const T* lower, T weight, int32_t n, T* __restrict out) {
  for (int32_t i = 0; i < n; ++i) out[i] = kernels::blend(upper[i], lower[i], weight);
}

// Rows of the input between which output row y lies, blended over a block's columns.
template <class T>
WSIS_INLINE const T* blended_row(const T* plane, int32_t width, Lerp<T> y,
                                 const Columns<T>& columns, T* buffer) {
  const T* upper = plane + static_cast<int64_t>(y.low) * width + columns.first;
  if (y.weight == T(0)) return upper;
  const T* lower = plane + static_cast<int64_t>(y.high) * width + columns.first;
  blend_rows(upper, lower, y.weight, columns.span, buffer);
  return buffer;
}

template <class T>
WSIS_INLINE void scores_and_best(const T* __restrict row, const int32_t* __restrict low,
                               const int32_t* __restrict high, const T* __restrict weight,
                               int32_t n, T* __restrict out, T* __restrict best) {
  for (int32_t i = 0; i < n; ++i) {
    const T value = kernels::blend(row[low[i]], row[high[i]], weight[i]);
    out[i] = value;
    best[i] = value > best[i] ? value : best[i];
  }
}

template <class T>
WSIS_INLINE void exponentials(const T* best, int32_t n, T* __restrict values, T* __restrict total) {
  for (int32_t i = 0; i < n; ++i) {
    values[i] = kernels::exp_nonpositive(values[i] - best[i]);
    total[i] += values[i];
  }
}

template <class T>
WSIS_INLINE void background(T constant, const T* best, const T* total, int32_t n,
                          T* __restrict plane, T* __restrict factor) {
  for (int32_t i = 0; i < n; ++i) {
    const kernels::Shares<T> share = kernels::shares(constant, best[i], total[i]);
    plane[i] = share.background;
    factor[i] = share.factor;
  }
}

template <class T>
WSIS_INLINE void probabilities(const T* factor_high, const T* factor_low, int32_t n,
                             T* __restrict high, T* __restrict low) {
  for (int32_t i = 0; i < n; ++i) {
    const T value = high[i];
    low[i] = value * factor_low[i];
    high[i] = value * factor_high[i];
  }
}

template <class T>
WSIS_INLINE void take_plane(const T* __restrict row, const int32_t* __restrict low,
                          const int32_t* __restrict high, const T* __restrict weight, int32_t n,
                          int32_t id, T* __restrict best, int32_t* __restrict winner) {
  for (int32_t i = 0; i < n; ++i) {
    const T value = kernels::blend(row[low[i]], row[high[i]], weight[i]);
    kernels::take_better(value, id, best[i], winner[i]);
  }
}

// take_plane for a resize to twice the width, which is what the default down_scale asks for: output
// columns 2 j and 2 j + 1 lie 1/4 before and after input column j. Even and odd columns are kept in
// halves of their own, so that whole vectors are loaded; gathering costs three times as much.
// row [-1 .. half], the border repeated.
template <class T>
WSIS_INLINE void take_doubled(const T* __restrict row, int32_t half, int32_t id, T* __restrict best,
                            int32_t* __restrict winner) {
  for (int32_t j = 0; j < half; ++j)
    kernels::take_better(kernels::blend(row[j - 1], row[j], T(0.75)), id, best[j], winner[j]);
  for (int32_t j = 0; j < half; ++j)
    kernels::take_better(kernels::blend(row[j], row[j + 1], T(0.25)), id, best[half + j],
                         winner[half + j]);
}

WSIS_INLINE void decide_row(const int32_t* high, const int32_t* low, int32_t n, int64_t ignore_index,
                          int64_t* __restrict out) {
  for (int32_t i = 0; i < n; ++i) out[i] = kernels::decide(high[i], low[i], ignore_index);
}

// Even columns first, then odd ones.
WSIS_INLINE void decide_doubled(const int32_t* high, const int32_t* low, int32_t half,
                              int64_t ignore_index, int64_t* __restrict out) {
  for (int32_t j = 0; j < half; ++j) {
    out[2 * j] = kernels::decide(high[j], low[j], ignore_index);
    out[2 * j + 1] = kernels::decide(high[half + j], low[half + j], ignore_index);
  }
}

// The input row of a block of doubled columns, with a column more at either end.
template <class T>
WSIS_INLINE const T* doubled_row(const T* plane, int32_t width, Lerp<T> y,
                                 const Columns<T>& columns, T* buffer) {
  const int32_t begin = columns.begin / 2, half = columns.size / 2;
  const T* row = plane + static_cast<int64_t>(y.low) * width;
  const T* lower = plane + static_cast<int64_t>(y.high) * width;
  const int32_t first = std::max(begin - 1, 0), last = std::min(begin + half, width - 1);
  T* out = buffer + 1;
  blend_rows(row + first, lower + first, y.weight, last - first + 1, out + (first - begin));
  if (first == begin) out[-1] = out[0];
  if (last < begin + half) out[half] = out[half - 1];
  return out;
}

template <class T>
WSIS_INLINE void raise(const T* values, int32_t n, T* __restrict best) {
  for (int32_t i = 0; i < n; ++i) best[i] = values[i] > best[i] ? values[i] : best[i];
}

}  // namespace

template <class T>
void pseudo_unit(const T* cams, const uint8_t* present, const int64_t* box, PseudoSizes sizes,
                 int32_t parts, double* scratch, T* unit) {
  const int64_t plane = static_cast<int64_t>(sizes.height) * sizes.width;
  parallel_loops(sizes.batch * sizes.height, parts,
                 [&](int, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    T best[kBlock];
    for (int64_t job = begin; job < end; ++job) {
      const int64_t b = job / sizes.height, y = job % sizes.height;
      const Range rows = kernels::cut(box + b * 4, sizes.height);
      const Range columns = kernels::cut(box + b * 4 + 2, sizes.width);
      double sum = 0;
      for (int32_t x = columns.begin; x < columns.end && y >= rows.begin && y < rows.end;
           x += kBlock) {
        const int32_t n = std::min(kBlock, columns.end - x);
        std::fill_n(best, n, T(kernels::kLowest));
        bool any = false;
        for (int32_t k = 0; k < sizes.classes; ++k) {
          if (!present[b * sizes.classes + k]) continue;
          any = true;
          raise(cams + (b * sizes.classes + k) * plane + y * sizes.width + x, n, best);
        }
        for (int32_t i = 0; i < n && any; ++i) sum += best[i];
      }
      scratch[job] = sum;
    }
  });
  for (int64_t b = 0; b < sizes.batch; ++b) {
    const Range rows = kernels::cut(box + b * 4, sizes.height);
    const Range columns = kernels::cut(box + b * 4 + 2, sizes.width);
    const int64_t pixels =
        static_cast<int64_t>(rows.end - rows.begin) * (columns.end - columns.begin);
    double sum = 0;
    for (int32_t y = 0; y < sizes.height; ++y) sum += scratch[b * sizes.height + y];
    unit[b] = static_cast<T>(sum / static_cast<double>(std::max<int64_t>(pixels, 1)));
  }
}

template <class T>
void pseudo_stack(const T* cams, const uint8_t* present, const T* unit, T high, T low,
                  PseudoSizes sizes, int32_t parts, T* stack, int32_t* counts, int32_t* ids) {
  for (int64_t b = 0; b < sizes.batch; ++b) {
    int32_t* row = ids + b * (sizes.room + 1);
    int32_t found = 0;
    row[0] = kBackground;
    for (int32_t k = 0; k < sizes.classes && found < sizes.room; ++k)
      if (present[b * sizes.classes + k]) row[++found] = k + 1;
    std::fill_n(row + 1 + found, sizes.room - found, kBackground);
    counts[b] = found ? 2 * (found + 1) : 0;
  }
  const int32_t h = sizes.reduced_height, w = sizes.reduced_width;
  const int64_t plane = static_cast<int64_t>(sizes.height) * sizes.width;
  const int64_t reduced = static_cast<int64_t>(h) * w;
  if (reduced == 0 || plane == 0) return;
  const int32_t block = block_of(sizes.width, w);
  parallel_loops(sizes.batch * h, parts,
                 [&](int, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    T buffer[kSpan], best[kBlock], total[kBlock], factor[kBlock];
    Columns<T> columns;
    for (int32_t x = 0; x < w; x += block) {
      place(x, std::min(x + block, w), sizes.width, w, columns);
      const int32_t n = columns.size;
      for (int64_t job = begin; job < end; ++job) {
        const int64_t b = job / h, y = job % h;
        if (counts[b] == 0) continue;
        const int32_t half = counts[b] / 2;
        const Lerp<T> at = kernels::lerp_at<T>(static_cast<int32_t>(y), sizes.height, h);
        T* highs = stack + b * 2 * (sizes.room + 1) * reduced + y * w + x;
        T* lows = highs + half * reduced;
        std::fill_n(best, n, T(kernels::kLowest));
        std::fill_n(total, n, T(0));
        for (int32_t p = 1; p < half; ++p) {
          const int64_t k = ids[b * (sizes.room + 1) + p] - 1;
          const T* map = cams + (b * sizes.classes + k) * plane;
          scores_and_best(blended_row(map, sizes.width, at, columns, buffer), columns.low,
                          columns.high, columns.weight, n, highs + p * reduced, best);
        }
        for (int32_t p = 1; p < half; ++p) exponentials(best, n, highs + p * reduced, total);
        const T scale = unit ? unit[b] : T(1);
        background(kernels::threshold(high, scale), best, total, n, highs, factor);
        background(kernels::threshold(low, scale), best, total, n, lows, buffer);
        for (int32_t p = 1; p < half; ++p)
          probabilities(factor, buffer, n, highs + p * reduced, lows + p * reduced);
      }
    }
  });
}

template <class T>
void pseudo_labels(const T* stack, const int32_t* counts, const int32_t* ids, const int64_t* box,
                   int64_t ignore_index, PseudoSizes sizes, int32_t parts, int64_t* masks) {
  const int32_t h = sizes.reduced_height, w = sizes.reduced_width;
  const int64_t reduced = static_cast<int64_t>(h) * w;
  if (reduced == 0 || sizes.height == 0 || sizes.width == 0) return;
  const int32_t block = block_of(w, sizes.width);
  const bool doubled = sizes.width == 2 * w;
  parallel_loops(sizes.batch * sizes.height, parts,
                 [&](int, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    T buffer[kSpan], best[kBlock];
    int32_t winner[2][kBlock];
    Columns<T> columns;
    for (int32_t x = 0; x < sizes.width; x += block) {
      place(x, std::min(x + block, sizes.width), w, sizes.width, columns);
      const int32_t n = columns.size;
      for (int64_t job = begin; job < end; ++job) {
        const int64_t b = job / sizes.height, y = job % sizes.height;
        const Range rows = kernels::cut(box + b * 4, sizes.height);
        const Range inside = kernels::cut(box + b * 4 + 2, sizes.width);
        int64_t* out = masks + (b * sizes.height + y) * sizes.width;
        const int32_t from = std::max(x, inside.begin), to = std::min(x + n, inside.end);
        if (y < rows.begin || y >= rows.end || from >= to) {
          std::fill_n(out + x, n, ignore_index);
          continue;
        }
        if (counts[b] == 0) {
          std::fill_n(out + x, n, int64_t{kBackground});
        } else {
          const int32_t half = counts[b] / 2;
          const Lerp<T> at = kernels::lerp_at<T>(static_cast<int32_t>(y), h, sizes.height);
          const T* plane = stack + b * 2 * (sizes.room + 1) * reduced;
          for (auto& index : winner) {
            std::fill_n(best, n, T(kernels::kLowest));
            std::fill_n(index, n, 0);
            for (int32_t p = 0; p < half; ++p, plane += reduced) {
              const int32_t id = ids[b * (sizes.room + 1) + p];
              if (doubled)
                take_doubled(doubled_row(plane, w, at, columns, buffer), n / 2, id, best, index);
              else
                take_plane(blended_row(plane, w, at, columns, buffer), columns.low, columns.high,
                           columns.weight, n, id, best, index);
            }
          }
          if (doubled)
            decide_doubled(winner[0], winner[1], n / 2, ignore_index, out + x);
          else
            decide_row(winner[0], winner[1], n, ignore_index, out + x);
        }
        std::fill(out + x, out + from, ignore_index);
        std::fill(out + to, out + x + n, ignore_index);
      }
    }
  });
}

#define WSIS_FOR(T)                                                                              \
  template void pseudo_unit(const T*, const uint8_t*, const int64_t*, PseudoSizes, int32_t,      \
                            double*, T*);                                                        \
  template void pseudo_stack(const T*, const uint8_t*, const T*, T, T, PseudoSizes, int32_t, T*, \
                             int32_t*, int32_t*);                                                \
  template void pseudo_labels(const T*, const int32_t*, const int32_t*, const int64_t*, int64_t, \
                              PseudoSizes, int32_t, int64_t*);
WSIS_FOR(float)
WSIS_FOR(double)
#undef WSIS_FOR

}  // namespace wsis::cpu
