// Random walks on the pixels of a grid: what CPU and CUDA share.
//
// A_ij is the affinity of pixel i to j = i + offset, 1 for j = i, 0 where there is no offset;
// T_ij = A_ij^beta / s_j with s_j = sum_i A_ij^beta, and a walk maps x to x T^n. With
// P_ij = A_ij^beta a step is (x T)_j = (x_j + sum_i x_i P_ij) / s_j: a stencil, and its adjoint is
// the stencil of the transposed P between a division and a product by s,
//     T^n g = s * ((P / s)^n) (g / s)  (all products by pixel).
//
// Symmetric P makes the eigenvalues of T real and inside [-1, 1], so that T^n may be replaced by its
// expansion in Chebyshev polynomials t_k, cut at a degree of about sqrt(n):
//     z^n = sum_k c_k t_k(z), c_k = the chance that |a walk of n steps of +-1| ends at k,
// whose tail beyond d is at most 2 exp(-d^2 / 2 n) (Sachdeva and Vishnoi 2014, theorem 3.3): 256
// steps take 98 products for 1e-9. Recurrence: v_{k+1} = 2 v_k T - v_{k-1}.
#pragma once

#include <cstdint>

#include "kernels/platform.h"

namespace wsis::kernels {

constexpr int kMaxOffsets = 512;  // a half disc of radius 18 has 508

// Offsets of a call that stay inside the grid somewhere, small enough to be a kernel argument, and
// where their affinities lie.
struct Offsets {
  int32_t count;
  int16_t dy[kMaxOffsets], dx[kMaxOffsets], plane[kMaxOffsets];
};

// From rows (dy, dx). Others reach no pixel.
inline Offsets make_offsets(const int64_t* offsets, int64_t count, int64_t height, int64_t width) {
  Offsets made{};
  for (int64_t k = 0; k < count; ++k) {
    const int64_t dy = offsets[2 * k], dx = offsets[2 * k + 1];
    if (dy <= -height || dy >= height || dx <= -width || dx >= width) continue;
    made.dy[made.count] = static_cast<int16_t>(dy);
    made.dx[made.count] = static_cast<int16_t>(dx);
    made.plane[made.count++] = static_cast<int16_t>(k);
  }
  return made;
}

// a^exponent, exponent >= 1, by squaring.
template <class V>
WSIS_HD V power(V a, int32_t exponent) {
  while (exponent % 2 == 0) {
    a *= a;
    exponent /= 2;
  }
  V result = a;
  for (exponent /= 2; exponent > 0; exponent /= 2) {
    a *= a;
    if (exponent % 2 == 1) result *= a;
  }
  return result;
}

// A step in which a pixel changes by `change` (received from others less its own loss): small changes
// are not lost in the rounding of the value. v_{k+1} = 2 v_k T - v_{k-1}, as v_k T = v_k + change.
template <class V>
WSIS_HD V next_term(V now, V before, V change) {
  return now + ((now - before) + (change + change));
}

}  // namespace wsis::kernels
