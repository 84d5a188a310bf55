// Affinities of a pixel to the pixels of a half disc around it: the arithmetic of one pair.
//
//   pairs   a_k(i) = exp(-mean_c |f_c(i) - f_c(i + o_k)|)          (AffinityNet)
//   paths   a_k(i) = 1 - max of the edge map on the path to i + o_k  (IRN)
//
// 0 where i + o_k lies outside. Gradient to f_c(i) of a pair: -g a / channels * sign(difference),
// and the opposite to f_c(i + o_k); of a path: -g to its largest pixel.
#pragma once

#include "kernels/local_affinity.h"  // exp_nonpositive
#include "kernels/random_walk.h"     // Offsets

namespace wsis::kernels {

// What a pair hands on to one channel; h is -g a / channels. 0 at 0 as in torch, not a number for one.
// All cases are computed before one is taken, or loops over it would have branches.
template <class T>
WSIS_HD T toward(T h, T difference) {
  const T opposite = -h, none = h * difference;
  const T other = difference < T(0) ? opposite : none;
  return difference > T(0) ? h : other;
}

// The pixels on the path of an offset, dy >= 0: those of the rectangle between both ends that are
// less than 1 away from the line. Calls body(y, x, cell) with the far end first, then in falling
// order of |y| + |x|, rows first: of equal pixels the first gets the gradient, as max_pool2d hands it
// out for jiwoon-ahn/irn's tables. `cell` numbers the pixels of the rectangle.
template <class Body>
WSIS_HD void for_path(int32_t dy, int32_t dx, Body body) {
  const int32_t across = dx < 0 ? -dx : dx, side = dx < 0 ? -1 : 1;
  for (int32_t sum = dy + across; sum >= 0; --sum)
    for (int32_t y = sum > across ? sum - across : 0; y <= dy && y <= sum; ++y) {
      const int32_t x = (sum - y) * side, off = dy * x - dx * y;
      if (off * off < dy * dy + dx * dx) body(y, x, y * (across + 1) + sum - y);
    }
}

// Whether a pixel of a path replaces the largest so far.
template <class T>
WSIS_HD bool is_larger(T edge, T largest) {
  return edge > largest || edge != edge;
}

constexpr int64_t kMostCells = 256;  // of a rectangle: a pixel's choice is a byte

}  // namespace wsis::kernels
