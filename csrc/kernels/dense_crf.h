// The mean field of a dense CRF (Kraehenbuehl and Koltun 2011): what happens at one pixel.
//
// V is float, double or a vector of them (cpu/simd.h).
#pragma once

#include <cmath>

#include "kernels/local_affinity.h"  // exp_nonpositive, bit_cast, smaller

namespace wsis::kernels {

// Logit of a channel that is only there to fill a vector: its probability is exactly 0.
constexpr float kNoLabel = -1e30f;

template <class V>
WSIS_HD V larger(V a, V b) {
  return a > b ? a : b;
}

// exp(logit - highest), of which the sum over labels divides.
template <class V>
WSIS_HD V unnormalised(V logit, V highest) {
  return exp_nonpositive(logit - highest);
}

// exp(x) for x that should be moderate: infinity or nonsense of that size above 88, which the sum of
// a pixel's labels tells; 0 below -87.3.
template <class V>
WSIS_HD V exp_moderate(V x) {
  using T = typename Element<V>::Scalar;
  if constexpr (sizeof(T) == sizeof(float)) {
    const V limited = x > 88.7f ? V{} + 88.7f : x;
    return exp_nonpositive_float(limited);
  } else {
    return Element<V>::exponential(x);
  }
}

// Factors of a pixel from what the plain filter makes of ones; the constant of the densecrf library.
template <class T>
WSIS_HD T symmetric_normaliser(T filtered_ones) {
  return static_cast<T>(1.0 / sqrt(static_cast<double>(filtered_ones) + 1e-20));
}
template <class T>
WSIS_HD T one_sided_normaliser(T filtered_ones) {
  return static_cast<T>(1.0 / (static_cast<double>(filtered_ones) + 1e-20));
}

}  // namespace wsis::kernels
