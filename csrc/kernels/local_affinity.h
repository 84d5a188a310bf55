// Local affinity (PAMR, PAR, VARM): the arithmetic of one tap, for scalars and for vectors of pixels.
//
// A pixel's taps are the 8 directions of each dilation, row by row without the centre; outside the
// image the border is repeated. V is float, double or a vector of them (cpu/simd.h).
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/platform.h"

namespace wsis::kernels {

enum class Kind : int32_t { kPamr, kPar, kVarm };

constexpr int kDirections = 8;
constexpr int kMaxDilations = 64;
constexpr int kMaxTaps = kDirections * kMaxDilations;

// The dilations of a call, small enough to be a kernel argument. A step beyond the border ends at
// the border, so `dx` and `dy` are capped at the width and the height (one less would do, but for
// the forward differences of VARM).
struct Taps {
  int32_t count;  // of dilations
  int32_t dx[kMaxDilations], dy[kMaxDilations];
};

inline Taps make_taps(const int64_t* dilations, int32_t count, int64_t height, int64_t width) {
  Taps taps{};
  taps.count = count;
  for (int32_t d = 0; d < count; ++d) {
    taps.dx[d] = static_cast<int32_t>(dilations[d] < width ? dilations[d] : width);
    taps.dy[d] = static_cast<int32_t>(dilations[d] < height ? dilations[d] : height);
  }
  return taps;
}

// PAR's second softmax times its share: the same for all pixels, by dilation and direction.
template <class T>
struct Position {
  T straight[kMaxDilations], diagonal[kMaxDilations];

  WSIS_HD T operator[](int p) const {
    const int k = p % kDirections, d = p / kDirections;
    return k == 0 || k == 2 || k == 5 || k == 7 ? diagonal[d] : straight[d];
  }
};

// From weights by tap [8 count].
template <class T>
Position<T> make_position(const double* by_tap, int32_t count) {
  Position<T> position{};
  for (int32_t d = 0; d < count; ++d) {
    position.diagonal[d] = static_cast<T>(by_tap[d * kDirections]);
    position.straight[d] = static_cast<T>(by_tap[d * kDirections + 1]);
  }
  return position;
}

// Direction k in [0, 8) as -1, 0 or 1 down and to the right.
WSIS_HD int step_y(int k) { return (k < 4 ? k : k + 1) / 3 - 1; }
WSIS_HD int step_x(int k) { return (k < 4 ? k : k + 1) % 3 - 1; }

WSIS_HD int32_t clamp_index(int32_t i, int32_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// Pixels i whose step ends at q when the border is repeated, clamp(i + step) = q: an interval
// [first, last], empty where first > last.
WSIS_HD int32_t first_source(int32_t q, int32_t step) {
  return q == 0 || q < step ? 0 : q - step;
}
WSIS_HD int32_t last_source(int32_t q, int32_t step, int32_t size) {
  return q == size - 1 || q - step >= size ? size - 1 : q - step;
}

// ---- scalars and vectors alike -----------------------------------------------------------------

// What V is made of; cpu/simd.h says it for vectors.
template <class V>
struct Element {
  using Scalar = V;
  using Bits = uint32_t;
  static WSIS_HD V square_root(V x) { return sqrt(x); }
  static WSIS_HD V exponential(V x) { return exp(x); }
};

template <class To, class From>
WSIS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes must agree");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
WSIS_HD V smaller(V a, V b) {
  return a < b ? a : b;
}

template <class V>
WSIS_HD V absolute(V a) {
  return a < 0 ? -a : a;
}

// exp(x) for x <= 0 in float: 2^n * p(r), x = n ln 2 + r, |r| <= ln 2 / 2. Within 2 ulp; 0 below
// -87.3, where the result would be subnormal; NaN stays NaN.
// p = 1 + r + r^2 q(r), q fitted for the smallest largest relative error (3.1e-9 before rounding).
// ln 2 is cut in two so that n ln 2 loses nothing. Adding 1.5 * 2^23 rounds to an integer, which
// then lies in the low bits.
template <class V>
WSIS_HD V exp_nonpositive_float(V x) {
  using Bits = typename Element<V>::Bits;  // unsigned, so that shifting may overflow
  constexpr float kLowest = -87.3f, kRound = 12582912.0f;
  const V limited = x < kLowest ? V{} + kLowest : x;
  const V shifted = limited * 1.44269504f + kRound;
  const V n = shifted - kRound;
  const V r = (limited - n * 0.693359375f) + n * 2.12194440e-4f;
  V q = r * 1.3814467e-3f + 8.3687810e-3f;
  q = q * r + 4.1668393e-2f;
  q = q * r + 1.6666520e-1f;
  q = q * r + 4.9999994e-1f;
  const V p = (q * r) * r + r + 1.0f;
  const V power = bit_cast<V>((bit_cast<Bits>(shifted) << 23) + 0x3f800000u);
  return x < kLowest ? V{} : p * power;
}

template <class V>
WSIS_HD V exp_nonpositive(V x) {
  if constexpr (sizeof(typename Element<V>::Scalar) == sizeof(float))
    return exp_nonpositive_float(x);
  else
    return Element<V>::exponential(x);
}

// ---- weights -----------------------------------------------------------------------------------

// Unbiased variance in one pass, from sums of the differences to the first sample. Equal samples
// give exactly 0, on which flat regions depend; and as the reference is a sample itself,
// cancellation costs at most a factor of the sample count on the rounding error.
template <class V>
struct Spread {
  V reference, total, squares;

  Spread() = default;
  WSIS_HD explicit Spread(V first) : reference(first), total(V{}), squares(V{}) {}
  WSIS_HD void add(V sample) {
    const V difference = sample - reference;
    total += difference;
    squares += difference * difference;
  }
  // The same sample so many times.
  WSIS_HD void add(V sample, typename Element<V>::Scalar times) {
    const V difference = sample - reference;
    total += difference * times;
    squares += difference * difference * times;
  }
  WSIS_HD V deviation(int count) const {
    using T = typename Element<V>::Scalar;
    const V variance = (squares - total * total / static_cast<T>(count)) / static_cast<T>(count - 1);
    return Element<V>::square_root(variance < 0 ? V{} : variance);
  }
};

// What differences of a channel are multiplied with: 1 / (1e-8 + 0.1 sigma) for PAMR (Araslanov and
// Roth 2020), 1 / 0.3 / (sigma + 1e-8) for PAR (Ru et al. 2022), 4 / (sigma + 1e-8) for VARM (Xu et
// al. 2023).
template <Kind kKind, class V>
WSIS_HD V inverse_scale(V deviation) {
  using T = typename Element<V>::Scalar;
  constexpr T kFactor = kKind == Kind::kPar ? T(1) / T(0.3) : kKind == Kind::kVarm ? T(4) : T(1);
  constexpr T kShare = kKind == Kind::kPamr ? T(0.1) : T(1);
  return kFactor / (deviation * kShare + T(1e-8));
}

// Distance of one channel, added up over channels.
template <Kind kKind, class V>
WSIS_HD V distance(V neighbour, V centre, V inverse) {
  const V scaled = (neighbour - centre) * inverse;
  if constexpr (kKind == Kind::kPamr)
    return absolute(scaled);
  else
    return scaled * scaled;
}

// VARM's squared forward differences of one channel at a tap. `rows` and `columns` are 1, or 0 where
// the pixel itself lies in the last row or column: the differences are taken inside the frame of the
// shifted image, whose last row and column are repeated.
template <class V, class Rows>
WSIS_HD V variation(V value, V below, V right, Rows rows, V columns) {
  const V down = value - below, across = value - right;
  return down * down * rows + across * across * columns;
}

// Share of the second softmax: PAR adds that of the positions, VARM subtracts that of the variation.
template <class T>
constexpr T kSecondShare = T(0.01);

}  // namespace wsis::kernels
