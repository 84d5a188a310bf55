// Windowed Gaussian filter on the CPU. Sizes: B images, C values and F feature channels of a pixel,
// H W image, r radius of the window.
#pragma once

#include "kernels/gated_crf.h"

namespace wsis::cpu {

struct WindowCall {
  int64_t batch;
  int32_t values, features;  // C, F
  int32_t height, width;
  int32_t radius;  // 1 to kernels::kMaxRadius
  int32_t parts;   // threads
};

// Elements of the scratch: the planes of one image with a border of zeros.
int64_t window_scratch(const WindowCall& call);

// out_i = sum over j != i, |y_j - y_i| <= r, |x_j - x_i| <= r, inside the image, of K_ij v_j. K is
// symmetric, so this is its own adjoint. The order of the sums is fixed: the result does not depend
// on `parts`.
template <class T>
void window_filter(const T* values,    // [B, C, H, W]
                   const T* features,  // [B, F, H, W]
                   const kernels::WindowKernels<T>& kernels, const WindowCall& call, T* scratch,
                   T* result);  // [B, C, H, W]

}  // namespace wsis::cpu
