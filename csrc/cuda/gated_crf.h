// Windowed Gaussian filter on CUDA: launcher. Sizes as in cpu/gated_crf.h; `parts` is not read.
#pragma once

#include "cpu/gated_crf.h"

namespace wsis::cuda {

// As cpu::window_filter, one launch. Nothing beside the result is needed: neighbours come from the
// caches, and a weight is computed where it is used.
template <class T>
void window_filter(const T* values,    // [B, C, H, W]
                   const T* features,  // [B, F, H, W]
                   const kernels::WindowKernels<T>& kernels, const cpu::WindowCall& call,
                   T* result,  // [B, C, H, W]
                   int device, uintptr_t stream);

}  // namespace wsis::cuda
