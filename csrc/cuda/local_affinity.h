// Local affinity and propagation on CUDA: launchers. Sizes as in cpu/local_affinity.h; `parts` of a
// call is not read, and packed weights lie as [B, P / 4, H, W, 4], so that a thread reads four at a
// time and neighbouring threads read neighbouring memory.
#pragma once

#include "cpu/local_affinity.h"

namespace wsis::cuda {

using cpu::AffinityCall;

struct Images {
  int64_t batch;
  int32_t planes;  // masks or channels per image
  int32_t height, width;
  int device;
  uintptr_t stream;
};

// Dilations of the fast path, which is for float: as many as all published methods use. It holds all
// weights of a pixel in registers and needs no `stats`.
constexpr int kFast = 6;
template <class T>
bool has_fast_path(const AffinityCall& call) {
  return call.num_dilations == kFast && sizeof(T) == sizeof(float);
}

// Weights, and what they can be computed from once more: per pixel the factor of each channel, and
// the largest exponent and the factor of both softmaxes. One launch, or two without a fast path.
template <class T>
void local_affinity(const T* image,  // [B, K, H, W]
                    const AffinityCall& call, const Images& images,
                    T* stats,    // [B, K + 4, H, W], or null where not needed
                    T* packed);  // [B, P / 4, H, W, 4], or null

// As cpu::propagate, one launch per iteration.
template <class T>
void propagate(const T* masks,         // [B, N, H, W]
               const T* packed,        // [B, P / 4, H, W, 4]
               const int32_t* counts,  // [B] or null
               int32_t iterations, bool transposed, const AffinityCall& call, const Images& images,
               T* scratch,  // [B, N, H, W]
               T* result);  // [B, N, H, W]

// The same without packed weights, for images so large that those do not fit.
template <class T>
void propagate_lean(const T* masks,  // [B, N, H, W]
                    const T* image,  // [B, channels, H, W]
                    const T* stats,  // [B, channels + 4, H, W]
                    int32_t channels,
                    const int32_t* counts,  // [B] or null
                    int32_t iterations, bool transposed, const AffinityCall& call,
                    const Images& images,
                    T* scratch,  // [B, N, H, W]
                    T* result);  // [B, N, H, W]

}  // namespace wsis::cuda
