// CAM normalisation: where a pixel lies on a smaller grid, and the arithmetic of one score.
//
// Sizes: h w grid of a map, H W grid that it is resized to. eps guards divisions and is the width
// of the dead zone. Non-finite values: see poisoned().
#pragma once

#include <cmath>

#include "kernels/platform.h"

namespace wsis::kernels {

// ---- resize: bilinear, align_corners=False ------------------------------------------------------

// Most rows or columns, so that the numerator below stays within 31 bits.
constexpr int32_t kMostSide = 32767;

template <class T>
struct Tap {
  int32_t first;
  int32_t second;
  T weight;  // of the second
};

// Position (i + 1/2) small / large - 1/2 of pixel i of the large grid on the small one, clamped to
// it. As a fraction over 2 large, so it is exact; only the weight is rounded.
template <class T>
WSIS_HD Tap<T> tap(int32_t i, int32_t small, int32_t large) {
  const int32_t numerator = (2 * i + 1) * small - large;
  const int32_t last = small - 1;
  if (numerator <= 0) return {0, last < 1 ? last : 1, T(0)};
  const int32_t first = numerator / (2 * large);
  if (first >= last) return {last, last, T(0)};
  return {first, first + 1, T(numerator - first * 2 * large) / T(2 * large)};
}

template <class T>
WSIS_HD T mix(T first, T second, T weight) {
  return first + weight * (second - first);
}

// max(x, 0) that keeps NaN. T, here and where nothing else is said, may be a vector (cpu/simd.h).
template <class T>
WSIS_HD T positive(T x) {
  return x < T{} ? T{} : x;
}

// positive() of a value that must be finite: -inf becomes NaN and not 0, so that it is noticed like
// any other value that is not. (Negative values become -0, which adds nothing either.)
template <class T>
WSIS_HD T positive_finite(T x) {
  return x < T{} ? x * T{} : x;
}

// ---- extrema ------------------------------------------------------------------------------------

template <class T>
struct Extrema {
  T low;
  T high;
};

template <class T>
WSIS_HD Extrema<T> no_extrema() {
  return {T(INFINITY), T(-INFINITY)};
}

// 0 for a finite value, NaN for the others. Added to a maximum, it makes all scores of the plane
// NaN (see affine_of), on both devices alike, without a branch or a synchronisation.
template <class T>
WSIS_HD T poisoned(T x) {
  return x * T{};
}

template <class T>
WSIS_HD T lesser(T a, T b) {
  return b < a ? b : a;
}

template <class T>
WSIS_HD T greater(T a, T b) {
  return b > a ? b : a;
}

// NaN in either maximum stays.
template <class T>
WSIS_HD Extrema<T> join(Extrema<T> a, Extrema<T> b) {
  const bool take = b.high > a.high || b.high != b.high;
  return {lesser(a.low, b.low), take && a.high == a.high ? b.high : a.high};
}

// ---- norms --------------------------------------------------------------------------------------

// p = [x]+, low and high its extrema over the plane; the codes are known to wsis/ops.
enum class Norm : int32_t {
  kOverMax = 0,    // p / (high + eps)
  kShifted = 1,    // (q - low - eps) / (high - low + eps), q = p, but 0 where p < low + eps
  kOverRange = 2,  // (x - low) / (high - low + eps), extrema of x itself
  kDeadZone = 3,   // [p - low - eps]+ / (high - low + eps)
  kSeed = 4,       // [p - eps]+ / (high + eps)
};

constexpr int32_t kNorms = 5;

// Every norm is x < shift ? below : (x - shift) * scale. No ReLU of x is left: where it would cut,
// x < shift.
template <class T>
struct Affine {
  T shift;
  T below;
  T scale;
};

template <class T>
WSIS_HD Affine<T> affine_of(Norm norm, Extrema<T> plane, T eps) {
  const bool range = norm == Norm::kOverRange;
  const T low = range ? plane.low : positive(plane.low);
  const T high = range ? plane.high : positive(plane.high);
  const bool over_max = norm == Norm::kOverMax || norm == Norm::kSeed;
  const T width = (over_max ? high : high - low) + eps, scale = T(1) / width;
  const T shift = norm == Norm::kOverMax ? T(0) : norm == Norm::kSeed ? eps : range ? low : low + eps;
  return {shift, norm == Norm::kShifted ? -shift / width : poisoned(scale), scale};
}

template <class T>
WSIS_HD T score_of(T x, Affine<T> a) {
  return x < a.shift ? a.below : (x - a.shift) * a.scale;
}

// ---- gradients of kShifted, kDeadZone and kSeed -------------------------------------------------

// Whether the score follows x. At the bend itself torch's relu has slope 0, torch's where slope 1.
template <class T>
WSIS_HD bool follows(Norm norm, T x, T shift) {
  return norm == Norm::kShifted ? x >= shift : x > shift;
}

// Sums over the plane, g the gradient of the score y.
template <class T>
struct GradientSums {
  T shifted;  // of g where the score falls as `low` rises
  T scaled;   // of g y
};

template <class T>
WSIS_HD GradientSums<T> gradient_terms(Norm norm, T x, T g, Affine<T> a) {
  const bool counts = norm == Norm::kShifted || follows(norm, x, a.shift);
  return {counts ? g : T(0), g * score_of(x, a)};
}

// Gradient of the plane's own extrema; each goes to the first position that attains it, and to
// none where the ReLU has cut it off.
template <class T>
WSIS_HD Extrema<T> gradient_of_extrema(Norm norm, GradientSums<T> sums, T scale) {
  const T high = -sums.scaled * scale;
  return {norm == Norm::kSeed ? T(0) : (sums.scaled - sums.shifted) * scale, high};
}

template <class T>
WSIS_HD T gradient_of(Norm norm, T x, T g, Affine<T> a) {
  return follows(norm, x, a.shift) ? g * a.scale : T(0);
}

// ---- background and labels ----------------------------------------------------------------------

enum class Background : int32_t {
  kConstant = 0,    // value
  kPower = 1,       // (1 - best)^value
  kComplement = 2,  // 1 - best
};

// Largest exponent that is multiplied out; PSA and SEAM use 4 to 32.
constexpr int32_t kMostSquared = 64;

template <class T>
WSIS_HD T power(T base, T exponent) {
  const int32_t whole = exponent >= T(0) && exponent <= T(kMostSquared) ? int32_t(exponent) : -1;
  if (T(whole) != exponent) return std::pow(base, exponent);
  T result = T(1);
  for (int32_t left = whole; left > 0; left >>= 1) {
    if (left & 1) result *= base;
    base *= base;
  }
  return result;
}

template <class T>
WSIS_HD T background_of(Background kind, T best, T value) {
  if (kind == Background::kConstant) return value;
  return kind == Background::kPower ? power(T(1) - best, value) : T(1) - best;
}

// Class id from the best score: background up to `low`, undecided up to `high`.
template <class T>
WSIS_HD int64_t label_of(T best, int32_t channel, T low, T high, int64_t ignore_index) {
  if (!(best > low)) return 0;
  return best > high ? channel + 1 : ignore_index;
}

}  // namespace wsis::kernels
