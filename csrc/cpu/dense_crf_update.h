// The new Q of a tile's pixels: logits plus slices, then softmax, one pixel after the other.
//
// A row of up to 32 channels stays in registers from the first number that is read to the result.
#pragma once

#include <limits>

#include "cpu/permutohedral_rows.h"
#include "kernels/dense_crf.h"

namespace wsis::cpu {

// What became of the sums that softmax divides by.
template <class T>
struct Sums {
  T least = std::numeric_limits<T>::max(), most = 0, nothing = 0;
  // Comparisons pass over a sum that is not a number; its difference from itself is none either.
  bool sound() const { return least > T(1e-30) && most < T(1e30) && nothing == 0; }
};

// The same while a tile is walked over; all lanes hold the same.
template <class V, class T>
struct TileSums {
  Sums<T>* kept;
  V least, most, nothing{};

  WSIS_INLINE explicit TileSums(Sums<T>* sums)
      : kept(sums), least(V{} + sums->least), most(V{} + sums->most) {}
  WSIS_INLINE void add(V sum) {
    least = kernels::smaller(sum, least);
    most = kernels::larger(sum, most);
    nothing += sum - sum;
  }
  // A pixel's largest logit. Where channels fill up the row, minus infinity would not show.
  WSIS_INLINE void add_logit(V highest) {
    constexpr T kNone = std::numeric_limits<T>::quiet_NaN();
    nothing += highest > static_cast<T>(kernels::kNoLabel) ? V{} : V{} + kNone;
  }
  WSIS_INLINE void keep() const {
    T lanes[3][kLanes<V, T>];
    store(lanes[0], least);
    store(lanes[1], most);
    store(lanes[2], nothing);
    kept->least = lanes[0][0];
    kept->most = lanes[1][0];
    kept->nothing += lanes[2][0];
  }
};

// Softmax of the rows of a tile, in place. With kShift a row's largest logit is taken off first; it
// costs a sixth of the whole walk and is only there to keep the exponentials in range. So in between
// the first and the last pass logits have the largest of -unary taken off already, and the messages
// of usual terms do not lead far away from it; the sums tell if they did.
template <class T, bool kShift>
struct Softmax {
  T* rows;
  int32_t pixels, stride;
  Sums<T>* sums;

  template <int kBytes>
  WSIS_INLINE void run() const {
    with_row_vector<T, kBytes>(stride, [&](auto v) WSIS_LAMBDA_INLINE { all<decltype(v)>(); });
  }

  template <class V>
  WSIS_INLINE void all() const {
    constexpr int kStep = kLanes<V, T>;
    TileSums<V, T> seen(sums);
    for (T* row = rows; row != rows + int64_t{pixels} * stride; row += stride) {
      V highest{};
      if constexpr (kShift) {
        highest = load<V>(row);
        for (int32_t i = kStep; i < stride; i += kStep)
          highest = kernels::larger(highest, load<V>(row + i));
        highest = over_lanes(highest, [](V a, V b) WSIS_LAMBDA_INLINE { return a > b ? a : b; });
        seen.add_logit(highest);
      }
      V sum{};
      for (int32_t i = 0; i < stride; i += kStep) {
        V v = load<V>(row + i);
        v = kShift ? kernels::unnormalised(v, highest) : kernels::exp_moderate(v);
        store(row + i, v);
        sum += v;
      }
      sum = over_lanes(sum, [](V a, V b) WSIS_LAMBDA_INLINE { return a + b; });
      seen.add(sum);
      const V inverse = T(1) / sum;
      for (int32_t i = 0; i < stride; i += kStep) store(row + i, load<V>(row + i) * inverse);
    }
    seen.keep();
  }
};

// What a tile slices from one lattice: weights with all factors of the pixels, and the rows of the
// tile's vertices with those of the channels.
template <class T>
struct Source {
  const int16_t* slots;
  const T *weights, *rows;
  int32_t corners;
};

// pixels <- softmax(logits + slices), without a shift. Logits are rows of `labels` numbers, of which
// whole vectors are read.
template <class T>
struct Update {
  const T* logits;
  int32_t labels, num_sources, count, stride;
  const Source<T>* sources;
  T* pixels;
  Sums<T>* sums;

  static bool serves(int32_t stride) { return stride > 1 && stride <= 32; }

  template <int kBytes>
  WSIS_INLINE void run() const {
    with_row_vector<T, kBytes>(stride, [&](auto v) WSIS_LAMBDA_INLINE {
      using V = decltype(v);
      if constexpr (!std::is_same_v<V, T>) switch (stride) {
          case 4:
            return sorts<V, 4>();
          case 8:
            return sorts<V, 8>();
          case 16:
            return sorts<V, 16>();
          case 24:
            return sorts<V, 24>();
          default:
            return sorts<V, 32>();
        }
    });
  }

  template <class V, int kStride>
  WSIS_INLINE void sorts() const {
    constexpr int kVectors = kStride / kLanes<V, T>;
    if constexpr (kVectors > 0) {
    // Nearly every CRF has a term of place and one of place and colour.
    if (num_sources == 2 && sources[0].corners == 3 && sources[1].corners == 6)
      walk<V, kVectors>([&](auto& sum, int32_t p) WSIS_LAMBDA_INLINE {
        add<3, kStride>(sum, sources[0], p);
        add<6, kStride>(sum, sources[1], p);
      });
    else
      walk<V, kVectors>([&](auto& sum, int32_t p) WSIS_LAMBDA_INLINE {
        for (int32_t k = 0; k < num_sources; ++k) add<0, kStride>(sum, sources[k], p);
      });
    }
  }

  template <int kCorners, int kStride, class Row>
  WSIS_INLINE void add(Row& sum, const Source<T>& source, int32_t p) const {
    const int32_t corners = kCorners ? kCorners : source.corners;
    const int16_t* slot = source.slots + p * corners;
    const T* weight = source.weights + p * corners;
    for (int32_t r = 0; r < corners; ++r)
      sum.add(source.rows + int64_t{slot[r]} * kStride, weight[r]);
  }

  template <class V, int kVectors, class Slices>
  WSIS_INLINE void walk(Slices slices) const {
    constexpr int kStep = kLanes<V, T>;
    // What lies beyond the labels is the next pixel's. It begins within the last 8 channels.
    constexpr int kPartial = std::min(kVectors, std::max(1, 8 / kStep));
    constexpr int kWhole = kVectors - kPartial;
    BitsOf<V, T> mask[kPartial] = {};
    V outside[kPartial] = {};
    for (int32_t i = 0; i < kPartial * kStep; ++i) {
      const bool real = kWhole * kStep + i < labels;
      mask[i / kStep][i % kStep] = real ? -1 : 0;
      outside[i / kStep][i % kStep] = real ? T(0) : static_cast<T>(kernels::kNoLabel);
    }
    const T* from = logits;
    T* to = pixels;
    for (int32_t p = 0; p < count; ++p, from += labels, to += kVectors * kStep) {
      Piece<T, V, kVectors> row;
      row.read(from);
      for (int i = 0; i < kPartial; ++i)
        row.part[kWhole + i] = masked(row.part[kWhole + i], mask[i]) + outside[i];
      slices(row, p);
      row.write(to);
    }
    // A loop of its own: several pixels are on their way at a time in a short one only.
    TileSums<V, T> seen(sums);
    to = pixels;
    for (int32_t p = 0; p < count; ++p, to += kVectors * kStep) {
      Piece<T, V, kVectors> row;
      row.read(to);
      for (V& v : row.part) v = kernels::exp_moderate(v);
      V sum = row.part[0];
      for (int32_t i = 1; i < kVectors; ++i) sum += row.part[i];
      sum = over_lanes(sum, [](V a, V b) WSIS_LAMBDA_INLINE { return a + b; });
      seen.add(sum);
      const V inverse = T(1) / sum;
      for (V& v : row.part) v *= inverse;
      row.write(to);
    }
    seen.keep();
  }
};

}  // namespace wsis::cpu
