// Two-threshold pseudo masks: the arithmetic of one position, one softmax and one decision.
//
// Sizes: B images, K classes, P present classes of an image, H W image, h w reduced size.
// Planes of a stack: background and the present classes at the high threshold, then the same at the
// low one, 2 (P + 1) in all; none where P = 0, for then everything is background.
#pragma once

#include "kernels/local_affinity.h"
#include "kernels/platform.h"

namespace wsis::kernels {

constexpr int32_t kBackground = 0;
constexpr int64_t kMostClasses = 12000;  // CUDA lists the present ones in 48 KiB of shared memory

// A threshold in units of the image's mean score (1 where thresholds are constants). Above 1 no
// class could reach it.
template <class T>
WSIS_HD T threshold(T value, T unit) {
  const T product = value * unit;
  return product < T(1) ? product : T(1);
}

struct Range {
  int32_t begin, end;
};

// A half-open range of the box, cut to the image.
WSIS_HD Range cut(const int64_t* bounds, int32_t size) {
  const auto within = [](int64_t x, int64_t low, int64_t high) {
    return static_cast<int32_t>(x < low ? low : x > high ? high : x);
  };
  const int32_t begin = within(bounds[0], 0, size);
  return {begin, within(bounds[1], begin, size)};
}

// Where an output position lies in the input of a bilinear resize with align_corners=False:
// (1 - weight) a[low] + weight a[high]. Rounded step by step as torch rounds, since labels are decided
// from the result; kernels/normalize.h has the exact position.
template <class T>
struct Lerp {
  int32_t low, high;
  T weight;
};

template <class T>
WSIS_HD Lerp<T> lerp_at(int32_t i, int32_t from, int32_t to) {
  const T position = (static_cast<T>(i) + T(0.5)) * (static_cast<T>(from) / static_cast<T>(to));
  const T inside = position > T(0.5) ? position - T(0.5) : T(0);
  const int32_t floor = static_cast<int32_t>(inside);
  const int32_t low = floor < from - 1 ? floor : from - 1;  // rounding may reach the end
  const int32_t high = low + 1 < from ? low + 1 : low;
  return {low, high, inside - static_cast<T>(low)};
}

template <class T>
WSIS_HD T blend(T a, T b, T weight) {
  return a * (T(1) - weight) + b * weight;
}

// Rows first: on the CPU that is one pass over whole rows.
template <class T>
WSIS_HD T sample(const T* plane, int64_t stride, Lerp<T> y, Lerp<T> x) {
  const T* upper = plane + y.low * stride;
  const T* lower = plane + y.high * stride;
  return blend(blend(upper[x.low], lower[x.low], y.weight),
               blend(upper[x.high], lower[x.high], y.weight), x.weight);
}

// Softmax over a background constant and class scores v_c, from sums over the classes alone, so
// that two constants share the exponentials: `best` = max v_c, `total` = sum exp(v_c - best).
// No argument of exp is positive, so nothing overflows, and the denominator is at least 1.
template <class T>
struct Shares {
  T background;  // its probability
  T factor;      // probability of class c = exp(v_c - best) * factor
};

template <class T>
WSIS_HD Shares<T> shares(T constant, T best, T total) {
  const T lead = constant - best;
  const T small = exp_nonpositive(lead > T(0) ? -lead : lead);
  const T background = lead > T(0) ? T(1) : small;
  const T scale = lead > T(0) ? small : T(1);
  const T inverse = T(1) / (total * scale + background);
  return {background * inverse, scale * inverse};
}

// The class at the high threshold; its background is undecided unless the low threshold agrees.
WSIS_HD int64_t decide(int32_t at_high, int32_t at_low, int64_t ignore_index) {
  return at_high == kBackground && at_low != kBackground ? ignore_index : at_high;
}

}  // namespace wsis::kernels
