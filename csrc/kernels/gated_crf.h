// Windowed Gaussian kernels (Gated CRF loss, Obukhov et al. 2019): the weight between two pixels of a
// window, for scalars and for vectors of pixels.
//
// The weight is a sum over kernels of weight * exp(-1/2 (closeness * squared distance in the plane +
// sum over the kernel's channels of squared differences)). Channels come divided by their widths.
#pragma once

#include <cstring>

#include "kernels/local_affinity.h"

namespace wsis::kernels {

constexpr int kMaxWindowKernels = 8;
constexpr int kMaxRadius = 32;
constexpr int kMaxWindow = (2 * kMaxRadius + 1) * (2 * kMaxRadius + 1);

// The kernels of a call, small enough to be a kernel argument. Kernel k owns the next `channels[k]`
// channels of the features.
template <class T>
struct WindowKernels {
  int32_t count;
  int32_t channels[kMaxWindowKernels];
  T weight[kMaxWindowKernels];
  T closeness[kMaxWindowKernels];  // 1 / sigma^2 of the plane; 0: the place does not matter
};

template <class V, class T>
WSIS_HD V read(const T* from) {
  V value;
  memcpy(&value, from, sizeof(V));
  return value;
}

// Weight between two pixels (or two vectors of pixels), whose first channels lie at `here` and
// `there`, `plane` elements between channels. Symmetric to the last bit: differences are squared.
template <class V, class T>
WSIS_HD V window_weight(const WindowKernels<T>& kernels, const T* here, const T* there,
                        int64_t plane, int32_t squared_distance) {
  V sum{};
  for (int32_t k = 0; k < kernels.count; ++k) {
    V far = V{} + kernels.closeness[k] * static_cast<T>(squared_distance);
    for (int32_t c = 0; c < kernels.channels[k]; ++c, here += plane, there += plane) {
      const V difference = read<V>(there) - read<V>(here);
      far += difference * difference;
    }
    sum += exp_nonpositive(far * T(-0.5)) * kernels.weight[k];
  }
  return sum;
}

}  // namespace wsis::kernels
