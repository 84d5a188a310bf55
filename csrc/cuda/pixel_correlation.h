// Pixel correlation on CUDA: launchers (formulas: kernels/pixel_correlation.h). The h w x h w
// matrix exists only as tiles in shared memory. A block owns some pixels and walks over all others,
// so nothing is added by two blocks, and results are the same at every call; the price is that each
// pair is computed twice.
//
// Products are in float32 or float64. TF32 tensor cores keep 10 bits, an error of 1e-3 in z, which
// the tolerance of 1e-5 does not allow.
#pragma once

#include "cpu/pixel_correlation.h"

namespace wsis::cuda {

using cpu::Correlation;

struct Queue {
  int device;
  uintptr_t stream;
};

// Two launches. result += share * out.
template <class T>
void pixel_correlation(const T* cams,      // [B, C, N]
                       const T* features,  // [B, D, N]
                       const Correlation& call, const Queue& queue,
                       T* units,    // [B, D, N], scratch
                       T* norms,    // [B, N], scratch
                       T* saved,    // [B, C + 1, N]
                       T* result);  // [B, C, N]

// Up to five launches. cams_gradient is added to.
template <class T>
void pixel_correlation_backward(const T* gradient,  // [B, C, N]
                                const T* cams,      // [B, C, N]
                                const T* features,  // [B, D, N]
                                const T* saved,     // [B, C + 1, N]
                                const Correlation& call, const Queue& queue,
                                T* units,               // [B, D, N], scratch
                                T* norms,               // [B, N], scratch
                                T* terms,               // [B, 2 (C + 1), N], scratch
                                T* cams_gradient,       // [B, C, N] or null
                                T* features_gradient);  // [B, D, N] or null

}  // namespace wsis::cuda
