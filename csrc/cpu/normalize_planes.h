// Norms of the losses on the CPU, with gradient: each plane by its own extrema.
//
// Sizes: planes = B images x K classes, n pixels. The planes lie in arrays [B, skip + K, n] whose
// first `skip` channels (background) are left alone.
#pragma once

#include <cstdint>

#include "kernels/normalize.h"

namespace wsis::cpu {

struct Planes {
  int64_t batch, n;
  int32_t num_classes;
  int32_t skip_in;   // channels before the classes in maps and in their gradient
  int32_t skip_out;  // the same in scores and in theirs
};

// scores from maps, and extrema [B, K, 2] of the maps; the maximum of a plane with a value that is
// not finite is NaN, and so are its scores.
template <class T>
void norm_planes(const T* maps, Planes planes, kernels::Norm norm, T eps, int32_t parts, T* scores,
                 T* extrema);

// Gradient of the maps from that of the scores; the two may be one array where skip_in equals
// skip_out.
template <class T>
void norm_planes_backward(const T* gradient, const T* maps, const T* extrema, Planes planes,
                          kernels::Norm norm, T eps, int32_t parts, T* maps_gradient);

}  // namespace wsis::cpu
