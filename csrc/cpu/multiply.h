// Products of small matrices that lie in the first- and second-level cache: the innermost block.
//
// A block of kRows x kVecs vectors of the result stays in registers while the depth is walked: per
// step kVecs loads, kRows broadcasts and kRows * kVecs multiply-adds. Loads keep up with the
// multiply-adds, of which a cycle does one (512 bits) or two, where they are at most as many:
//   AVX-512 (32 registers)   8 x 3 vectors, 11 loads per 24;
//   AVX2, SSE (16 registers) 4 x 3 vectors,  7 loads per 12.
// Measured on an EPYC core (Zen 4), depth 128: 113 GFLOP/s with AVX-512 and with AVX2, of about
// 118; 28 with SSE. torch.matmul of 2048 x 2048 reaches 90.
#pragma once

#include "cpu/simd.h"

namespace wsis::cpu {

// One operand: element (i, k) lies at data[i * stride + k * step].
template <class T>
struct Operand {
  const T* data;
  int64_t stride, step;
};

template <int kBytes>
constexpr int kBlockRows = kBytes == 64 ? 8 : 4;

// done(r, v, sum) with sum = sum_k left(r, k) * right[k * right_step + v vectors] for a block.
template <class V, int kRows, int kVecs, class T, class Done>
WSIS_INLINE void multiply_block(Operand<T> left, const T* right, int64_t right_step, int32_t depth,
                                Done done) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  V sums[kRows][kVecs] = {};
  const T* from = left.data;
  for (int32_t k = 0; k < depth; ++k, from += left.step, right += right_step) {
    V vectors[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) vectors[v] = load<V>(right + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T scalar = from[r * left.stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] += scalar * vectors[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) done(r, v, sums[r][v]);
}

}  // namespace wsis::cpu
