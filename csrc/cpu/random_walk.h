// Random walks on the CPU (formulas: kernels/random_walk.h). Sizes: B images, C maps, K offsets,
// H W image.
//
// All weights of a step, divided by the column sums, are stored in the order in which they are used:
// by kRows rows and vector of columns, then by neighbour, so that a step reads one stream. A
// neighbour's value is loaded once for the kRows rows whose stencils reach it: a sum costs 1.33
// instructions, not 2. A group of up to four maps has its sums in registers.
// Threads share the rows and wait for each other after every step. The order of every sum depends on
// the row alone.
#pragma once

#include "kernels/random_walk.h"

namespace wsis::cpu {

struct Walk {
  int64_t batch;
  int32_t maps, planes, height, width;  // planes: K
  kernels::Offsets offsets;             // inside the grid
  bool symmetric;                       // an affinity counts for both directions
  bool transposed;                      // T^n x instead of x T^n
  int32_t exponent;                     // beta
  int64_t steps;                        // products with T
  const double* coefficients;  // [steps + 1] of the Chebyshev polynomials of T, or null for T^steps
  int32_t parts;               // threads
};

// Elements of scratch for a call.
int64_t random_walk_scratch(const Walk& walk);

template <class T>
void random_walk(const T* maps,      // [B, C, H, W]
                 const T* affinity,  // [B, K, H, W], of pixel i to i + offset k at i
                 const Walk& walk,
                 T* scratch,  // [random_walk_scratch]
                 T* result);  // [B, C, H, W]

}  // namespace wsis::cpu
