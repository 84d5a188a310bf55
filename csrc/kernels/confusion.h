// Confusion counting: the arithmetic of one pixel, one cell and one histogram row.
//
// Sizes: C classes, K score channels, T thresholds, n pixels.
#pragma once

#include <cmath>

#include "kernels/platform.h"

namespace wsis::kernels {

constexpr int32_t kIgnored = -1;
constexpr int32_t kOutOfRange = -2;

// Class id of a pixel in [0, C), kIgnored or kOutOfRange.
WSIS_HD int32_t class_code(int64_t value, int32_t num_classes, int64_t ignore_index) {
  if (value == ignore_index) return kIgnored;
  return value >= 0 && value < num_classes ? static_cast<int32_t>(value) : kOutOfRange;
}

// Class id of a prediction, which has no ignore value of its own.
WSIS_HD int32_t class_code(int64_t value, int32_t num_classes) {
  return value >= 0 && value < num_classes ? static_cast<int32_t>(value) : kOutOfRange;
}

// Row target, column prediction.
WSIS_HD int32_t cell_index(int32_t target, int32_t pred, int32_t num_classes) {
  return target * num_classes + pred;
}

// Running maximum over channels, starting at kLowest: the lowest channel wins a tie, and NaN, which
// is never greater, is never best. Without a branch, for vectors.
constexpr float kLowest = -INFINITY;

template <class T>
WSIS_HD void take_better(T score, int32_t k, T& best, int32_t& channel) {
  const bool better = score > best;
  best = better ? score : best;
  channel = better ? k : channel;
}

// One step of the branch-free binary search below.
template <class T>
WSIS_HD int32_t bucket_step(int32_t position, int32_t half, const T* thresholds, T score) {
  return thresholds[position + half - 1] < score ? position + half : position;
}

// How many of the ascending thresholds [T] lie strictly below the score; 0 for NaN.
// The number of steps depends on T alone, so that lanes of a vector or a warp stay together.
template <class T>
WSIS_HD int32_t bucket_of(const T* thresholds, int32_t num_thresholds, T score) {
  int32_t position = 0;
  for (int32_t left = num_thresholds; left > 0;) {
    const int32_t half = (left + 1) / 2;
    position = bucket_step(position, half, thresholds, score);
    left -= half;
  }
  return position;
}

// Cell of the histogram [C, K, T + 1].
WSIS_HD int32_t histogram_index(int32_t target, int32_t channel, int32_t bucket,
                                int32_t num_channels, int32_t num_thresholds) {
  return (target * num_channels + channel) * (num_thresholds + 1) + bucket;
}

// Adds one histogram row [T + 1], the pixels of one target class whose best channel predicts class
// `pred`, to the curve [T, C, C]: a pixel of bucket b exceeds the thresholds 0 .. b - 1 and is
// background (class 0) at the others. `add(cell, count)` does the addition.
template <class Count, class Add>
WSIS_HD void spread_row(const Count* row, int32_t target, int32_t pred, int32_t num_classes,
                        int32_t num_thresholds, Add add) {
  Count above = 0;
  Count below = 0;
  for (int32_t b = 0; b <= num_thresholds; ++b) above += row[b];
  if (above == 0) return;
  for (int32_t t = 0; t < num_thresholds; ++t) {
    above -= row[t];
    below += row[t];
    const int64_t matrix = static_cast<int64_t>(t) * num_classes * num_classes;
    if (above != 0) add(matrix + cell_index(target, pred, num_classes), above);
    if (below != 0) add(matrix + cell_index(target, 0, num_classes), below);
  }
}

}  // namespace wsis::kernels
