// Rows of channels in vector registers.
//
// A row of `stride` channels is 1 channel, 4, or a multiple of 8: whole vectors. They are at most 32
// bytes wide: reading rows is limited by the bytes that the first-level cache delivers, which wider
// registers do not raise on the machines at hand, and 21 labels would be 32 channels instead of 24.
#pragma once

#include <type_traits>

#include "cpu/simd.h"
#include "kernels/local_affinity.h"  // bit_cast

#define WSIS_LAMBDA_INLINE __attribute__((always_inline))

namespace wsis::cpu {

inline int32_t stride_for(int32_t channels) {
  return channels == 1 ? 1 : channels <= 4 ? 4 : (channels + 7) / 8 * 8;
}

template <class V, class T>
constexpr int kLanes = static_cast<int>(sizeof(V) / sizeof(T));

// Masks of a vector (or a scalar) of T.
template <class T>
using IntegerLike = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class V, class T>
struct MaskOf {
  using type = Vector<IntegerLike<T>, sizeof(V)>;
};
template <class T>
struct MaskOf<T, T> {
  using type = IntegerLike<T>;
};
template <class V, class T>
using BitsOf = typename MaskOf<V, T>::type;

template <class V, class Bits>
WSIS_INLINE V masked(V value, Bits mask) {
  return kernels::bit_cast<V>(kernels::bit_cast<Bits>(value) & mask);
}

// A vector whose lanes all hold the sum (largest) of the lanes of another.
template <class V, class Op>
WSIS_INLINE V over_lanes(V v, Op op) {
  if constexpr (sizeof(V) == sizeof(typename kernels::Element<V>::Scalar)) {
    return v;
  } else {
    constexpr int kCount = kLanes<V, typename kernels::Element<V>::Scalar>;
    if constexpr (kCount == 8) {
      v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
      v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
      return op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
    } else if constexpr (kCount == 4) {
      v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
      return op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
    } else {
      static_assert(kCount == 2, "rows are made of vectors of 2, 4 or 8");
      return op(v, __builtin_shufflevector(v, v, 1, 0));
    }
  }
}

// Steps of adding lanes in the order of over_lanes(). In each half of 4 lanes the results for a come
// first: lanes 0 + 2 and 1 + 3, then the same for b; or lanes 0 + 1 and 2 + 3.
template <class V>
WSIS_INLINE V add_halves(V a, V b) {
  if constexpr (kLanes<V, typename kernels::Element<V>::Scalar> == 8)
    return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  else
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
}
template <class V>
WSIS_INLINE V add_neighbours(V a, V b) {
  constexpr int kCount = kLanes<V, typename kernels::Element<V>::Scalar>;
  if constexpr (kCount == 8)
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  else if constexpr (kCount == 4)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
  else
    return __builtin_shufflevector(a, b, 0, 2) + __builtin_shufflevector(a, b, 1, 3);
}

// Lane i of the result is the sum of the lanes of rows[i], to the bit that of over_lanes().
template <class V>
WSIS_INLINE V sums_of_rows(V* rows) {
  constexpr int kCount = sizeof(V) / sizeof(typename kernels::Element<V>::Scalar);
  if constexpr (kCount == 1) {
    return rows[0];
  } else if constexpr (kCount == 2) {
    return add_neighbours(rows[0], rows[1]);
  } else {
    if constexpr (kCount == 8)
      for (int i = 0; i < 4; ++i)
        rows[i] = __builtin_shufflevector(rows[i], rows[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
                  __builtin_shufflevector(rows[i], rows[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    return add_neighbours(add_halves(rows[0], rows[1]), add_halves(rows[2], rows[3]));
  }
}

// A square of numbers, vectors of `rows` becoming columns. Halves are exchanged at growing distance.
template <class V>
WSIS_INLINE void transpose(V* rows) {
  constexpr int kCount = kLanes<V, typename kernels::Element<V>::Scalar>;
  const auto exchange = [&](int distance, auto low, auto high) WSIS_LAMBDA_INLINE {
    for (int i = 0; i < kCount; ++i) {
      if (i & distance) continue;
      const V a = rows[i], b = rows[i + distance];
      rows[i] = low(a, b);
      rows[i + distance] = high(a, b);
    }
  };
#define WSIS_SHUFFLE(...) [](V a, V b) WSIS_LAMBDA_INLINE { return __builtin_shufflevector(a, b, __VA_ARGS__); }
  if constexpr (kCount == 8) {
    exchange(1, WSIS_SHUFFLE(0, 8, 2, 10, 4, 12, 6, 14), WSIS_SHUFFLE(1, 9, 3, 11, 5, 13, 7, 15));
    exchange(2, WSIS_SHUFFLE(0, 1, 8, 9, 4, 5, 12, 13), WSIS_SHUFFLE(2, 3, 10, 11, 6, 7, 14, 15));
    exchange(4, WSIS_SHUFFLE(0, 1, 2, 3, 8, 9, 10, 11), WSIS_SHUFFLE(4, 5, 6, 7, 12, 13, 14, 15));
  } else if constexpr (kCount == 4) {
    exchange(1, WSIS_SHUFFLE(0, 4, 2, 6), WSIS_SHUFFLE(1, 5, 3, 7));
    exchange(2, WSIS_SHUFFLE(0, 1, 4, 5), WSIS_SHUFFLE(2, 3, 6, 7));
  } else {
    static_assert(kCount == 2, "rows are made of vectors of 2, 4 or 8");
    exchange(1, WSIS_SHUFFLE(0, 2), WSIS_SHUFFLE(1, 3));
  }
#undef WSIS_SHUFFLE
}

// The vectors of rows, and those that turn planes into rows: of long ones, and of 4 channels.
template <class T, int kBytes>
using RowVector = Vector<T, (kBytes < 32 ? kBytes : 32)>;
template <class T, int kBytes>
using ShortVector = Vector<T, (kBytes < 4 * sizeof(T) ? kBytes : 4 * sizeof(T))>;

// Calls body(V{}) with the vectors of a stride.
template <class T, int kBytes, class Body>
WSIS_INLINE void with_row_vector(int32_t stride, Body body) {
  if (stride == 1) return body(T{});
  if (stride == 4) return body(ShortVector<T, kBytes>{});
  body(RowVector<T, kBytes>{});
}

// kCount neighbouring vectors of a row, in registers.
template <class T, class V, int kCount>
struct Piece {
  static constexpr int kStep = kLanes<V, T>;
  V part[kCount];

  WSIS_INLINE void clear() {
    for (V& v : part) v = V{};
  }
  WSIS_INLINE void read(const T* from) {
    for (int i = 0; i < kCount; ++i) part[i] = load<V>(from + i * kStep);
  }
  WSIS_INLINE void write(T* to) const {
    for (int i = 0; i < kCount; ++i) store(to + i * kStep, part[i]);
  }
  WSIS_INLINE void write_product(T* to, const T* from) const {
    for (int i = 0; i < kCount; ++i) store(to + i * kStep, load<V>(from + i * kStep) * part[i]);
  }
  WSIS_INLINE void add(const T* from, T factor) {
    for (int i = 0; i < kCount; ++i) part[i] += load<V>(from + i * kStep) * factor;
  }
  WSIS_INLINE void add(const Piece& other) {
    for (int i = 0; i < kCount; ++i) part[i] += other.part[i];
  }
  // Adds where `keep` is -1, nothing (whatever lies there) where it is 0.
  WSIS_INLINE void add_if(const T* from, IntegerLike<T> keep) {
    const BitsOf<V, T> mask = BitsOf<V, T>{} + keep;
    for (int i = 0; i < kCount; ++i) part[i] += masked(load<V>(from + i * kStep), mask);
  }
  WSIS_INLINE void add_if(const Piece& other, IntegerLike<T> keep) {
    const BitsOf<V, T> mask = BitsOf<V, T>{} + keep;
    for (int i = 0; i < kCount; ++i) part[i] += masked(other.part[i], mask);
  }
  WSIS_INLINE void keep_if(IntegerLike<T> keep) {
    const BitsOf<V, T> mask = BitsOf<V, T>{} + keep;
    for (V& v : part) v = masked(v, mask);
  }
  WSIS_INLINE void scale(T factor) {
    for (V& v : part) v *= factor;
  }
};

// Calls body(Piece, first channel) for the pieces of a row, at most kMost vectors each.
template <class T, int kBytes, class Body>
WSIS_INLINE void for_pieces(int32_t stride, Body body) {
  constexpr int kMost = 4;
  if (stride == 1) return body(Piece<T, T, 1>{}, 0);
  if (stride == 4) {
    using Short = ShortVector<T, kBytes>;
    return body(Piece<T, Short, 4 / kLanes<Short, T>>{}, 0);
  }
  using V = RowVector<T, kBytes>;
  int32_t first = 0, vectors = stride / kLanes<V, T>;
  for (; vectors > kMost; vectors -= kMost, first += kMost * kLanes<V, T>)
    body(Piece<T, V, kMost>{}, first);
  switch (vectors) {
    case 1:
      return body(Piece<T, V, 1>{}, first);
    case 2:
      return body(Piece<T, V, 2>{}, first);
    case 3:
      return body(Piece<T, V, 3>{}, first);
    default:
      return body(Piece<T, V, kMost>{}, first);
  }
}

}  // namespace wsis::cpu
