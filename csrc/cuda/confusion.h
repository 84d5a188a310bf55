// Confusion counting on CUDA: launchers. Shapes as in cpu/confusion.h; `tally` and `histogram` come
// zeroed. Counts are integers, so the result does not depend on the order of the additions.
#pragma once

#include "cpu/confusion.h"

namespace wsis::cuda {

using cpu::ClassMap;

// tally [C * C + 2].
void confusion_matrix(ClassMap pred,    // [n]
                      ClassMap target,  // [n]
                      int64_t n, int32_t num_classes, int64_t ignore_index, int64_t* tally,
                      int device, uintptr_t stream);

// tally [T * C * C + 2]; histogram [C, K, T + 1] is scratch.
template <class T>
void threshold_curve(const T* scores,           // [B, K, n]
                     ClassMap target,           // [B, n]
                     const T* thresholds,       // [T], ascending
                     const int64_t* class_ids,  // [K]
                     int64_t batch, int32_t num_channels, int64_t n, int32_t num_thresholds,
                     int32_t num_classes, int64_t ignore_index, int64_t* histogram, int64_t* tally,
                     int device, uintptr_t stream);

}  // namespace wsis::cuda
