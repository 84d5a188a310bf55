// Affinities of a half disc on the CPU (formulas: kernels/stencil_affinity.h), row by row, without an
// array of the features of all pairs. Sizes: B images, F channels, K offsets, H W image.
//
// Threads share rows forward, and backward channels of pairs and images of paths: nothing is added by
// two threads.
#pragma once

#include "kernels/stencil_affinity.h"

namespace wsis::cpu {

struct StencilCall {
  int64_t batch;
  int32_t channels, planes, height, width;  // planes: K
  kernels::Offsets offsets;                 // inside the grid
  int32_t parts;                            // threads
};

template <class T>
void pair_affinity(const T* features,  // [B, F, H, W]
                   const StencilCall& call,
                   T* affinity);  // [B, K, H, W]

template <class T>
void pair_affinity_backward(const T* gradient,  // [B, K, H, W]
                            const T* features,  // [B, F, H, W]
                            const T* affinity,  // [B, K, H, W]
                            const StencilCall& call,
                            T* scratch,             // [B, K, H, W]
                            T* features_gradient);  // [B, F, H, W]

// chosen: the cell of the largest pixel of each path.
template <class T>
void path_affinity(const T* edge,  // [B, H, W]
                   const StencilCall& call,
                   uint8_t* chosen,  // [B, K, H, W]
                   T* affinity);     // [B, K, H, W]

template <class T>
void path_affinity_backward(const T* gradient,      // [B, K, H, W]
                            const uint8_t* chosen,  // [B, K, H, W]
                            const StencilCall& call,
                            T* edge_gradient);  // [B, H, W]

}  // namespace wsis::cpu
