// Softmax of the rows of a tile, and what became of the sums that it divides by.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/row_vectors.h"
#include "kernels/dense_crf.h"

namespace wsis::cpu {

// Of the pixels that a thread has seen.
template <class T>
struct Sums {
  T least = std::numeric_limits<T>::max(), most = 0, nothing = 0;
  // Comparisons pass over a sum that is not a number; its difference from itself is none either.
  bool sound() const { return least > T(1e-30) && most < T(1e30) && nothing == 0; }
};

// The same while a tile is walked over, a pixel in each lane.
template <class V, class T>
struct TileSums {
  Sums<T>* kept;
  V least, most{}, nothing{};

  WSIS_INLINE explicit TileSums(Sums<T>* sums)
      : kept(sums), least(V{} + std::numeric_limits<T>::max()) {}
  WSIS_INLINE void add(V sum) {
    least = kernels::smaller(sum, least);
    most = kernels::larger(sum, most);
    nothing += sum - sum;
  }
  // A pixel's largest logit. Where channels fill up the row, minus infinity would not show.
  WSIS_INLINE void add_logit(V highest) {
    constexpr T kNone = std::numeric_limits<T>::quiet_NaN();
    nothing += highest > static_cast<T>(kernels::kNoLabel) ? V{} : V{} + kNone;
  }
  WSIS_INLINE void keep() const {
    constexpr int kStep = kLanes<V, T>;
    T lanes[3][kStep];
    store(lanes[0], least);
    store(lanes[1], most);
    store(lanes[2], nothing);
    for (int i = 0; i < kStep; ++i) {
      kept->least = kernels::smaller(lanes[0][i], kept->least);
      kept->most = kernels::larger(lanes[1][i], kept->most);
      kept->nothing += lanes[2][i];
    }
  }
};

// Takes the largest logit off every row of a tile: that keeps exponentials in range. It is only done
// in the first and the last pass. In between, logits have the largest of -unary taken off already,
// and the messages of usual terms do not lead far away from it; the sums tell if they did.
template <class T>
struct Shift {
  T* rows;
  int32_t pixels, stride;
  Sums<T>* sums;

  template <int kBytes>
  WSIS_INLINE void run() const {
    with_row_vector<T, kBytes>(stride, [&](auto v) WSIS_LAMBDA_INLINE { all<decltype(v)>(); });
  }

  template <class V>
  WSIS_INLINE void all() const {
    constexpr int kStep = kLanes<V, T>;
    TileSums<V, T> seen(sums);
    for (T* row = rows; row != rows + int64_t{pixels} * stride; row += stride) {
      V highest = load<V>(row);
      for (int32_t i = kStep; i < stride; i += kStep)
        highest = kernels::larger(highest, load<V>(row + i));
      highest = over_lanes(highest, [](V a, V b) WSIS_LAMBDA_INLINE { return a > b ? a : b; });
      seen.add_logit(highest);
      for (int32_t i = 0; i < stride; i += kStep) store(row + i, load<V>(row + i) - highest);
    }
    seen.keep();
  }
};

// rows <- softmax of each, without a shift, for rows of kVectors V, or of `stride` where kVectors is
// 0. As many pixels as V has lanes go together: their sums are one vector.
template <class V, int kVectors, class T>
WSIS_INLINE void softmax_rows(T* rows, int32_t pixels, int32_t stride, Sums<T>* sums) {
  constexpr int kStep = kLanes<V, T>;
  if constexpr (kVectors != 0) stride = kVectors * kStep;
  TileSums<V, T> seen(sums);
  for (int32_t p = 0; p < pixels; p += kStep, rows += kStep * stride) {
    const int32_t real = std::min(kStep, pixels - p);
    V parts[kStep];
    for (int32_t i = 0; i < real; ++i) {
      T* row = rows + i * stride;
      V sum{};
      for (int32_t c = 0; c < stride; c += kStep) {
        const V v = kernels::exp_moderate(load<V>(row + c));
        store(row + c, v);
        sum += v;
      }
      parts[i] = sum;
    }
    for (int32_t i = real; i < kStep; ++i) parts[i] = parts[0];
    const V sum = sums_of_rows(parts);
    seen.add(sum);
    T inverse[kStep];
    store(inverse, T(1) / sum);
    for (int32_t i = 0; i < real; ++i) {
      T* row = rows + i * stride;
      for (int32_t c = 0; c < stride; c += kStep) store(row + c, load<V>(row + c) * inverse[i]);
    }
  }
  seen.keep();
}

// The same for rows of 4 channels, two of them in a vector of 8 lanes, 8 pixels together.
template <class V, class T>
WSIS_INLINE void softmax_pairs(T* rows, int32_t pixels, Sums<T>* sums) {
  static_assert(kLanes<V, T> == 8, "a vector holds two rows");
  TileSums<V, T> seen(sums);
  for (; pixels >= 8; pixels -= 8, rows += 32) {
    V pair[4];
    for (int i = 0; i < 4; ++i) pair[i] = kernels::exp_moderate(load<V>(rows + 8 * i));
    const V sum = add_neighbours(add_halves(pair[0], pair[1]), add_halves(pair[2], pair[3]));
    seen.add(sum);
    const V inverse = T(1) / sum;  // of the pixels 0, 2, 4, 6, 1, 3, 5, 7
    store(rows, pair[0] * __builtin_shufflevector(inverse, inverse, 0, 0, 0, 0, 4, 4, 4, 4));
    store(rows + 8, pair[1] * __builtin_shufflevector(inverse, inverse, 1, 1, 1, 1, 5, 5, 5, 5));
    store(rows + 16, pair[2] * __builtin_shufflevector(inverse, inverse, 2, 2, 2, 2, 6, 6, 6, 6));
    store(rows + 24, pair[3] * __builtin_shufflevector(inverse, inverse, 3, 3, 3, 3, 7, 7, 7, 7));
  }
  seen.keep();
  using Short = ShortVector<T, sizeof(V)>;
  softmax_rows<Short, 4 / kLanes<Short, T>>(rows, pixels, 4, sums);
}

// Softmax of the rows of a tile, of any stride.
template <class T>
struct Softmax {
  T* rows;
  int32_t pixels, stride;
  Sums<T>* sums;

  template <int kBytes>
  WSIS_INLINE void run() const {
    if constexpr (kLanes<RowVector<T, kBytes>, T> == 8)
      if (stride == 4) return softmax_pairs<RowVector<T, kBytes>>(rows, pixels, sums);
    with_row_vector<T, kBytes>(stride, [&](auto v) WSIS_LAMBDA_INLINE {
      softmax_rows<decltype(v), 0>(rows, pixels, stride, sums);
    });
  }
};

}  // namespace wsis::cpu
