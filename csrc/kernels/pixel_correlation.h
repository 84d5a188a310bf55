// Pixel correlation: the arithmetic of a pair of pixels and of one pixel, for scalars and vectors.
//
// z_ij = u_i . u_j of unit features, S = phi(z), out_cj = sum_i a_ci S_ij / (sum_i S_ij + eps).
// With h_cj = G_cj / s_j and t_j = -sum_c h_cj out_cj, where G is the gradient of out and s the
// divisor, the gradients are
//     to the maps      sum_j h_cj S_ij,
//     to u_i           sum_j E_ij u_j,  E_ij = phi'(z_ij) (a_i . h_j + t_j + a_j . h_i + t_i).
// S and E are symmetric, so every pair is computed once and used twice.
#pragma once

#include "kernels/local_affinity.h"  // exp_nonpositive and what V is made of
#include "kernels/platform.h"

namespace wsis::kernels {

// phi: relu(z), or exp((z - 1) / temperature), whose quotient is a softmax over i. As z is at most
// 1, up to rounding, no largest exponent has to be sought.
enum class Similarity : int32_t { kRelu, kSoftmax };

// `inverse` is 1 / temperature. Not a number stays one.
template <Similarity kSimilarity, class V>
WSIS_HD V similarity(V z, typename Element<V>::Scalar inverse) {
  using T = typename Element<V>::Scalar;
  if constexpr (kSimilarity == Similarity::kRelu)
    return z < T(0) ? V{} : z;
  else
    return exp_nonpositive((z - T(1)) * inverse);
}

// E from S and the sum in brackets; for relu the slope at 0 is 0, as in torch.
template <Similarity kSimilarity, class V>
WSIS_HD V pair_gradient(V similarity, V sum, typename Element<V>::Scalar inverse) {
  if constexpr (kSimilarity == Similarity::kRelu) {
    const V none{};
    return similarity > none ? sum : none;
  } else {
    return similarity * inverse * sum;
  }
}

// Gradient to a feature F from that to u = F / (norm + eps): g / (norm + eps) - u (g . u) / norm.
// For dot = g . u this is the factor of u; at F = 0, where the norm has no gradient, torch takes 0.
template <class T>
WSIS_HD T along_feature(T dot, T norm) {
  return norm > T(0) ? dot / norm : T(0);
}

}  // namespace wsis::kernels
