// The permutohedral lattice (Adams, Baek, Davis 2010): where a point lies in it, and its packed keys.
//
// A point of d features is lifted onto the plane sum = 0 of d + 1 dimensions. There it lies in a
// simplex whose d + 1 corners are lattice vertices; corner r has coordinates with remainder r modulo
// d + 1. The point spreads its value onto them with its barycentric weights.
//
// V is float, or a vector of them (cpu/simd.h). Everything here must be rounded as written: which
// vertices exist depends on it. So products go through product(), and the pages of the CPU that
// include this switch contraction to FMA off.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/platform.h"

namespace wsis::kernels {

constexpr int kMaxDims = 32;

WSIS_HD float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
template <class V>
WSIS_HD V product(V a, V b) {
  return a * b;
}

// Feature i is multiplied with this: the lattice's blur then has unit variance along each feature.
// Rounded as the densecrf library does it.
WSIS_HD float axis_scale(int i, int dims) {
  const float deviation = static_cast<float>(std::sqrt(2.0 / 3.0) * (dims + 1));
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>((i + 2) * (i + 1))) * deviation);
}

// What is left of a value that is splat, blurred and sliced at one vertex, to be divided away.
inline double slice_factor(int dims) { return 1.0 / (1.0 + std::pow(2.0, -dims)); }

// Corner 0 of the point's simplex, `corner` [d + 1], the order of the point's residuals, `rank`
// [d + 1] (a permutation of 0..d, 0 the largest), and the weights of the corners [d + 1].
// kDims = 0: `dims` features; else kDims.
template <int kDims, class V>
WSIS_HD void embed(const V* features, const float* scale, int dims, V* corner, V* rank, V* weight) {
  constexpr int kMost = kDims ? kDims : kMaxDims;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
  const int d = kDims ? kDims : dims;
  const float inverse = 1.0f / static_cast<float>(d + 1);
  const float period = static_cast<float>(d + 1);
  const V zero{}, one = zero + 1.0f;
  V elevated[kMost + 1], sum = zero;
  for (int j = d; j > 0; --j) {
    const V scaled = product(features[j - 1], zero + scale[j - 1]);
    elevated[j] = sum - product(zero + static_cast<float>(j), scaled);
    sum = sum + scaled;
  }
  elevated[0] = sum;
  // The nearest vertex of remainder 0, unless the coordinates do not sum to 0.
  V excess = zero;
  for (int i = 0; i <= d; ++i) {
    const V rounded = (product(elevated[i], zero + inverse) + kRound) - kRound;
    corner[i] = product(rounded, zero + period);
    excess = excess + rounded;
    rank[i] = zero;
  }
  for (int i = 0; i < d; ++i) {
    const V residual = elevated[i] - corner[i];
    for (int j = i + 1; j <= d; ++j) {
      const V less = residual < elevated[j] - corner[j] ? one : zero;
      rank[i] = rank[i] + less;
      rank[j] = rank[j] + (one - less);
    }
  }
  // Coordinates that were rounded too far come back by a period each.
  for (int i = 0; i <= d; ++i) {
    rank[i] = rank[i] + excess;
    const V back = rank[i] > zero + static_cast<float>(d) ? zero - period : zero;
    const V shift = rank[i] < zero ? zero + period : back;
    rank[i] = rank[i] + shift;
    corner[i] = corner[i] + shift;
  }
  // Residuals in falling order; a corner's weight is the difference of two neighbours.
  V sorted[kMost + 1];
  for (int p = 0; p <= d; ++p) sorted[p] = zero;
  for (int i = 0; i <= d; ++i) {
    const V residual = product(elevated[i] - corner[i], zero + inverse);
    for (int p = 0; p <= d; ++p)
      sorted[p] = rank[i] == zero + static_cast<float>(p) ? residual : sorted[p];
  }
  weight[0] = sorted[d] + (one - sorted[0]);
  for (int r = 1; r <= d; ++r) weight[r] = sorted[d - r] - sorted[d - r + 1];
}

// ---- keys --------------------------------------------------------------------------------------

// A vertex as one number: d coordinates side by side (the last one follows from them), each shifted
// to be positive, in as few bits as its range needs. Corner r is corner 0 plus 1 everywhere, minus
// d + 1 where rank > d - r; a neighbour along axis j differs by 1 everywhere, minus d + 1 at j.
template <class Key>
struct KeyLayout {
  Key unit[kMaxDims + 1];  // 1 in the field of a coordinate; 0 for the last
  Key ones;                // all of them
  int32_t shift[kMaxDims], bias[kMaxDims];  // bits; what is added to the coordinate
  int32_t dims;

  // `count` is `dims`, for the sake of a compiler that knows it.
  WSIS_HD Key pack(const int32_t* coordinates, int count) const {
    Key key = 0;
    for (int i = 0; i < count; ++i)
      key += static_cast<Key>(static_cast<int64_t>(coordinates[i] + bias[i])) * unit[i];
    return key;
  }
  // From corner r - 1 to corner r, if `coordinate` has rank d - r + 1.
  WSIS_HD Key next_corner(Key key, int coordinate) const { return key + step(coordinate); }
  // To the neighbour along an axis; minus this to the other one.
  WSIS_HD Key step(int axis) const { return ones - static_cast<Key>(dims + 1) * unit[axis]; }
};

constexpr int kTooWide = 1 << 20;

// Lays out keys for features within [low, high] (of each, before scaling). Returns the bits that
// they need; the layout is only right if Key has as many. kTooWide: a coordinate leaves the range
// in which float counts integers.
template <class Key>
WSIS_HD int make_layout(const float* low, const float* high, int dims, KeyLayout<Key>* layout) {
  double from[kMaxDims + 1], to[kMaxDims + 1], sum_low = 0, sum_high = 0;
  for (int j = dims; j > 0; --j) {
    const double scale = axis_scale(j - 1, dims);
    from[j] = sum_low - j * scale * high[j - 1];
    to[j] = sum_high - j * scale * low[j - 1];
    sum_low += scale * low[j - 1];
    sum_high += scale * high[j - 1];
  }
  from[0] = sum_low;
  to[0] = sum_high;
  // Corners lie within 2.5 periods of the point, their neighbours within another one.
  const double margin = 4.0 * (dims + 1);
  int bits = 0;
  layout->dims = dims;
  layout->ones = 0;
  for (int i = 0; i <= dims; ++i) {
    layout->unit[i] = 0;
    if (!(from[i] > -4e6 && to[i] < 4e6)) return kTooWide;
    if (i == dims) continue;
    const auto first = static_cast<int64_t>(std::floor(from[i] - margin));
    const auto last = static_cast<int64_t>(std::ceil(to[i] + margin));
    layout->bias[i] = static_cast<int32_t>(-first);
    layout->shift[i] = bits;
    if (bits < static_cast<int>(8 * sizeof(Key))) layout->unit[i] = static_cast<Key>(1) << bits;
    layout->ones += layout->unit[i];
    int width = 1;
    while ((int64_t{1} << width) <= last - first) ++width;
    bits += width;
  }
  return bits;
}

// SplitMix64 (Steele, Lea, Flood 2014).
inline uint64_t next_random(uint64_t* state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Keys of any dimension and range: coordinates times random odd numbers, added up. Two vertices
// among M share a key with a probability of M^2 / 2^128, which is never (2^64: one in 10^7 images,
// where the compiler has no wider integer). Steps between vertices are differences of keys as above.
template <class Key>
void make_random_layout(int dims, KeyLayout<Key>* layout) {
  uint64_t state = 0;
  layout->dims = dims;
  layout->ones = 0;
  for (int i = 0; i <= dims; ++i) {
    Key unit = 0;
    for (size_t word = 0; word < sizeof(Key) / 8; ++word)
      unit |= static_cast<Key>(next_random(&state) | (word == 0)) << (64 * word % (8 * sizeof(Key)));
    layout->unit[i] = i < dims ? unit : 0;
    if (i < dims) layout->bias[i] = layout->shift[i] = 0;
    layout->ones += layout->unit[i];
  }
}

// A hash whose high bits are the good ones. Key is uint64_t or a vector of them.
template <class Key>
WSIS_HD Key mix(Key key) {
  return (key ^ (key >> 32)) * uint64_t{0x9e3779b97f4a7c15};
}
#if defined(__SIZEOF_INT128__) && !defined(__CUDACC__)
WSIS_HD uint64_t mix(unsigned __int128 key) {
  const uint64_t high = static_cast<uint64_t>(key >> 64) * uint64_t{0xc2b2ae3d27d4eb4f};
  return mix<uint64_t>(static_cast<uint64_t>(key) ^ high);
}
#endif

}  // namespace wsis::kernels
