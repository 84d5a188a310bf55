// The new Q of a tile's pixels: logits plus slices, then softmax, one pixel after the other.
//
// A row of up to 32 channels stays in registers from the first number that is read to the result.
#pragma once

#include "cpu/dense_crf_softmax.h"
#include "cpu/permutohedral_rows.h"

namespace wsis::cpu {

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
            return sorts<kBytes, V, 4>();
          case 8:
            return sorts<kBytes, V, 8>();
          case 16:
            return sorts<kBytes, V, 16>();
          case 24:
            return sorts<kBytes, V, 24>();
          default:
            return sorts<kBytes, V, 32>();
        }
    });
  }

  template <int kBytes, class V, int kStride>
  WSIS_INLINE void sorts() const {
    constexpr int kVectors = kStride / kLanes<V, T>;
    if constexpr (kVectors > 0) {
    // Nearly every CRF has a term of place and one of place and colour.
    if (num_sources == 2 && sources[0].corners == 3 && sources[1].corners == 6)
      walk<kBytes, V, kVectors>([&](auto& sum, int32_t p) WSIS_LAMBDA_INLINE {
        add<3, kStride>(sum, sources[0], p);
        add<6, kStride>(sum, sources[1], p);
      });
    else
      walk<kBytes, V, kVectors>([&](auto& sum, int32_t p) WSIS_LAMBDA_INLINE {
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

  template <int kBytes, class V, int kVectors, class Slices>
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
    if constexpr (sizeof(T) == sizeof(float) && kVectors == 1 && kStep == 4 && kBytes >= 32)
      softmax_pairs<RowVector<T, kBytes>>(pixels, count, sums);
    else
      softmax_rows<V, kVectors>(pixels, count, stride, sums);
  }
};

}  // namespace wsis::cpu
