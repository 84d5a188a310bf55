// Confusion counting on the CPU. Sizes: C classes, K channels, T thresholds, B images, n pixels.
#pragma once

#include "kernels/platform.h"

namespace wsis::cpu {

// A class map of one of the integer dtypes.
struct ClassMap {
  const void* data;
  DType dtype;
};

// tally [C * C + 2]: counts (row target, column pred), then the number of pixels with a class out
// of range and n minus the index of the first of them (0 if none). scratch [parts, C * C + 2].
void confusion_matrix(ClassMap pred,    // [n]
                      ClassMap target,  // [n]
                      int64_t n, int32_t num_classes, int64_t ignore_index, int32_t parts,
                      int64_t* scratch, int64_t* tally);

// tally [T * C * C + 2]: one matrix per threshold, then the two cells as above (targets only).
// scratch [parts, C * K * (T + 1) + 2].
template <class T>
void threshold_curve(const T* scores,           // [B, K, n]
                     ClassMap target,           // [B, n]
                     const T* thresholds,       // [T], ascending
                     const int64_t* class_ids,  // [K], class that channel k stands for
                     int64_t batch, int32_t num_channels, int64_t n, int32_t num_thresholds,
                     int32_t num_classes, int64_t ignore_index, int32_t parts, int64_t* scratch,
                     int64_t* tally);

}  // namespace wsis::cpu
