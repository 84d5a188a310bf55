#include "cpu/normalize_planes.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace wsis::cpu {
namespace {

using kernels::Affine;
using kernels::Extrema;
using kernels::GradientSums;
using kernels::Norm;

// Vectors that a reduction runs over at a time, so that it does not wait for its own latency.
constexpr int32_t kVectors = 4;
// Sums are moved to double after this many elements: float would lose digits of a whole plane.
constexpr int64_t kSumBlock = 4096;

template <class T>
struct FindExtrema {
  const T* x;
  int64_t n;
  Extrema<T>* result;

  template <int kBytes>
  WSIS_INLINE void run() const {
    using V = Vector<T, kBytes>;
    constexpr int64_t kLanes = kBytes / sizeof(T), kStep = kVectors * kLanes;
    V low[kVectors], high[kVectors], poison[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) {
      low[v] = INFINITY - V{};
      high[v] = -INFINITY - V{};
    }
    const int64_t whole = n / kStep * kStep;
    for (int64_t i = 0; i < whole; i += kStep)
      for (int v = 0; v < kVectors; ++v) {
        const V value = load<V>(x + i + v * kLanes);
        low[v] = kernels::lesser(low[v], value);
        high[v] = kernels::greater(high[v], value);
        poison[v] += kernels::poisoned(kernels::positive(value));
      }
    Extrema<T> all = kernels::no_extrema<T>();
    for (int v = 0; v < kVectors; ++v)
      for (int l = 0; l < kLanes; ++l)
        all = kernels::join(all, Extrema<T>{low[v][l], high[v][l] + poison[v][l]});
    for (int64_t i = whole; i < n; ++i) {
      const T bad = kernels::poisoned(kernels::positive(x[i]));
      all = kernels::join(all, Extrema<T>{x[i], x[i] + bad});
    }
    *result = all;
  }
};

template <class T>
struct WriteScores {
  const T* x;
  int64_t n;
  Affine<T> affine;
  T* out;

  template <int kBytes>
  WSIS_INLINE void run() const {
    using V = Vector<T, kBytes>;
    constexpr int64_t kLanes = kBytes / sizeof(T);
    const Affine<V> wide{affine.shift - V{}, affine.below - V{}, affine.scale - V{}};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      store(out + i, kernels::score_of(load<V>(x + i), wide));
    for (; i < n; ++i) out[i] = kernels::score_of(x[i], affine);
  }
};

template <class T>
struct SumGradient {
  const T *g, *x;
  int64_t n;
  Norm norm;
  Affine<T> affine;
  GradientSums<double>* result;

  template <int kBytes>
  WSIS_INLINE void run() const {
    norm == Norm::kShifted ? sum<kBytes, Norm::kShifted>() : sum<kBytes, Norm::kDeadZone>();
  }

  template <int kBytes, Norm kNorm>
  WSIS_INLINE void sum() const {
    using V = Vector<T, kBytes>;
    constexpr int64_t kLanes = kBytes / sizeof(T), kStep = 2 * kLanes;
    const Affine<V> wide{affine.shift - V{}, affine.below - V{}, affine.scale - V{}};
    GradientSums<double> all{0, 0};
    int64_t i = 0;
    while (i + kStep <= n) {
      const int64_t end = std::min(n / kStep * kStep, i + kSumBlock);
      V shifted[2] = {}, scaled[2] = {};
      for (; i < end; i += kStep)
        for (int v = 0; v < 2; ++v) {
          const V gradient = load<V>(g + i + v * kLanes), value = load<V>(x + i + v * kLanes);
          const V kept = value > wide.shift ? gradient : V{};
          shifted[v] += kNorm == Norm::kShifted ? gradient : kept;
          scaled[v] += gradient * kernels::score_of(value, wide);
        }
      for (int v = 0; v < 2; ++v)
        for (int l = 0; l < kLanes; ++l) {
          all.shifted += shifted[v][l];
          all.scaled += scaled[v][l];
        }
    }
    for (; i < n; ++i) {
      const GradientSums<T> term = kernels::gradient_terms(norm, x[i], g[i], affine);
      all.shifted += term.shifted;
      all.scaled += term.scaled;
    }
    *result = all;
  }
};

template <class T>
struct WriteGradient {
  const T *g, *x;
  int64_t n;
  Norm norm;
  Affine<T> affine;
  T* out;

  template <int kBytes>
  WSIS_INLINE void run() const {
    using V = Vector<T, kBytes>;
    constexpr int64_t kLanes = kBytes / sizeof(T);
    const V shift = affine.shift - V{}, scale = affine.scale - V{};
    const bool shifted = norm == Norm::kShifted;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const V value = load<V>(x + i), gradient = load<V>(g + i) * scale;
      store(out + i, shifted ? (value >= shift ? gradient : V{})
                             : (value > shift ? gradient : V{}));
    }
    for (; i < n; ++i) out[i] = kernels::gradient_of(norm, x[i], g[i], affine);
  }
};

}  // namespace

template <class T>
void norm_planes(const T* maps, Planes planes, Norm norm, T eps, int32_t parts, T* scores,
                 T* extrema) {
  parallel_for(planes.batch * planes.num_classes, parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t image = p / planes.num_classes;
      const T* x = maps + (p + (image + 1) * planes.skip_in) * planes.n;
      Extrema<T> plane;
      dispatch(FindExtrema<T>{x, planes.n, &plane});
      const Affine<T> affine = kernels::affine_of(norm, plane, eps);
      dispatch(WriteScores<T>{x, planes.n, affine,
                              scores + (p + (image + 1) * planes.skip_out) * planes.n});
      extrema[2 * p] = plane.low;
      extrema[2 * p + 1] = plane.high;
    }
  });
}

template <class T>
void norm_planes_backward(const T* gradient, const T* maps, const T* extrema, Planes planes,
                          Norm norm, T eps, int32_t parts, T* maps_gradient) {
  parallel_for(planes.batch * planes.num_classes, parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t image = p / planes.num_classes, n = planes.n;
      const T* g = gradient + (p + (image + 1) * planes.skip_out) * n;
      const T* x = maps + (p + (image + 1) * planes.skip_in) * n;
      T* out = maps_gradient + (p + (image + 1) * planes.skip_in) * n;
      const Extrema<T> plane{extrema[2 * p], extrema[2 * p + 1]};
      const Affine<T> affine = kernels::affine_of(norm, plane, eps);
      GradientSums<double> sums;
      dispatch(SumGradient<T>{g, x, n, norm, affine, &sums});
      dispatch(WriteGradient<T>{g, x, n, norm, affine, out});
      const GradientSums<T> rounded{static_cast<T>(sums.shifted), static_cast<T>(sums.scaled)};
      const Extrema<T> slopes = kernels::gradient_of_extrema(norm, rounded, affine.scale);
      if (plane.low > T(0)) out[std::find(x, x + n, plane.low) - x] += slopes.low;
      if (plane.high > T(0)) out[std::find(x, x + n, plane.high) - x] += slopes.high;
    }
  });
}

template void norm_planes(const float*, Planes, Norm, float, int32_t, float*, float*);
template void norm_planes(const double*, Planes, Norm, double, int32_t, double*, double*);
template void norm_planes_backward(const float*, const float*, const float*, Planes, Norm, float,
                                   int32_t, float*);
template void norm_planes_backward(const double*, const double*, const double*, Planes, Norm,
                                   double, int32_t, double*);

}  // namespace wsis::cpu
