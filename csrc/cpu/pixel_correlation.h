// Pixel correlation on the CPU (formulas: kernels/pixel_correlation.h). A call is one feature map.
//
// The h w x h w matrix exists only as tiles of kStrip x kStrip, on the stack. As it is symmetric,
// only pairs of strips I <= J are computed, and each tile is used for both: for I from the right
// and for J from the left. In round r the pairs with I + J = r (mod strips) run: no two of them
// share a strip, so they may run on any thread, and the order of every sum is that of the rounds
// whatever the number of threads. Going through the pairs row by row would keep more in the
// second-level cache: 5 % faster on one thread, but then threads would share strips.
#pragma once

#include <cstdint>

#include "kernels/pixel_correlation.h"

namespace wsis::cpu {

using kernels::Similarity;

constexpr int32_t kStrip = 96;  // pixels; 144 and 192 are no faster, and the diagonal costs more
constexpr int32_t kPanel = 48;  // pixels side by side; 3 vectors of any instruction set divide it

struct Correlation {
  int64_t batch;
  int32_t classes, depth, pixels;  // C, D, N = h w
  Similarity similarity;
  double eps, sum_eps;  // added to the norms and to the sums
  double inverse;       // 1 / temperature
  double share;         // of this map in the result
  int32_t parts;        // threads
};

// Elements of scratch for a call.
int64_t pixel_correlation_scratch(const Correlation& call, bool backward);

// result += share * out; saved: out, and 1 / (sum_i S_ij + sum_eps) in channel C.
template <class T>
void pixel_correlation(const T* cams,      // [B, C, N]
                       const T* features,  // [B, D, N]
                       const Correlation& call,
                       T* scratch,  // [pixel_correlation_scratch]
                       T* saved,    // [B, C + 1, N]
                       T* result);  // [B, C, N]

// cams_gradient += the gradient to the maps; null where it is not wanted, like features_gradient.
template <class T>
void pixel_correlation_backward(const T* gradient,  // [B, C, N]
                                const T* cams,      // [B, C, N]
                                const T* features,  // [B, D, N]
                                const T* saved,     // [B, C + 1, N]
                                const Correlation& call,
                                T* scratch,             // [pixel_correlation_scratch]
                                T* cams_gradient,       // [B, C, N] or null
                                T* features_gradient);  // [B, D, N] or null

}  // namespace wsis::cpu
