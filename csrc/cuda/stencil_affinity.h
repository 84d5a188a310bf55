// Affinities of a half disc on CUDA: launchers (formulas: kernels/stencil_affinity.h). One launch
// each. A thread owns a pair, or backward what a pixel receives from all of its pairs: nothing is
// added by two threads, and results are the same at every call.
#pragma once

#include "cpu/stencil_affinity.h"

namespace wsis::cuda {

using cpu::StencilCall;

template <class T>
void pair_affinity(const T* features,  // [B, F, H, W]
                   const StencilCall& call, int device, uintptr_t stream,
                   T* affinity);  // [B, K, H, W]

template <class T>
void pair_affinity_backward(const T* gradient,  // [B, K, H, W]
                            const T* features,  // [B, F, H, W]
                            const T* affinity,  // [B, K, H, W]
                            const StencilCall& call, int device, uintptr_t stream,
                            T* features_gradient);  // [B, F, H, W]

template <class T>
void path_affinity(const T* edge,  // [B, H, W]
                   const StencilCall& call, int device, uintptr_t stream,
                   uint8_t* chosen,  // [B, K, H, W]
                   T* affinity);     // [B, K, H, W]

template <class T>
void path_affinity_backward(const T* gradient,      // [B, K, H, W]
                            const uint8_t* chosen,  // [B, K, H, W]
                            const StencilCall& call, int device, uintptr_t stream,
                            T* edge_gradient);  // [B, H, W]

}  // namespace wsis::cuda
