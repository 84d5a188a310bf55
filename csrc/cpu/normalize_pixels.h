// What is done at every pixel over all classes: the background score and the label map, on the CPU.
//
// Sizes: B images, K classes, n pixels, as rows x columns where boxes are cut.
#pragma once

#include <cstdint>

#include "kernels/normalize.h"

namespace wsis::cpu {

// Channel 0 of scores [B, 1 + K, n] from the others. Channels of weight 0 are not read, they hold
// `absent`.
template <class T>
void add_background(kernels::Background kind, T value,
                    const T* weights,  // [B, K], or null for 1
                    T absent, int64_t batch, int32_t num_classes, int64_t n, int32_t parts,
                    T* scores);

// Gradient [B, 1 + K, n] of scores [B, 1 + K, n] whose background is 1 - best, to shares [B, K, n]
// of the classes: those that tie for the best share what the background gets.
template <class T>
void share_background(const T* gradient, const T* scores, int64_t batch, int32_t num_classes,
                      int64_t n, int32_t parts, T* shares);

struct LabelRule {
  double low, high;  // background up to low, undecided up to high
  int64_t ignore_index;
};

// Labels [B, rows, columns] of the best of scores [B, K, rows, columns] times weights [B, K] (null
// for 1). Outside boxes [B, 4] (y0, y1, x0, x1, half open; null for none) they are ignored.
template <class T>
void cams_to_labels(const T* scores, const T* weights, const int64_t* boxes, int64_t batch,
                    int32_t num_classes, int32_t rows, int32_t columns, LabelRule rule,
                    int32_t parts, int64_t* labels);

}  // namespace wsis::cpu
