// Local affinity and propagation on the CPU. Sizes: B images, N planes of an image, D dilations,
// P = 8 D taps, H W image, L = 16 pixels of a tile, T = ceil(W / L) tiles.
#pragma once

#include "kernels/local_affinity.h"

namespace wsis::cpu {

constexpr int32_t kTile = 16;

struct AffinityCall {
  kernels::Kind kind;
  const int64_t* dilations;  // [D], positive
  int32_t num_dilations;
  const double* position;  // [P], added to the weights of PAR; else not read
  int32_t height, width;
  int32_t parts;  // threads
};

// Elements of so many planes with a border of their own.
int64_t padded_size(int64_t planes, const AffinityCall& call);

// Elements of the scratch of propagate: two copies of a few planes per thread.
int64_t propagate_scratch(int32_t planes, bool transposed, const AffinityCall& call);

// packed [B, H, T, P, L]: tap p of pixel (y, x) at [y, x / L, p, x % L]; 0 beyond the width.
template <class T>
void local_affinity(const T* image,  // [B, channels, H, W]
                    int64_t batch, int32_t channels, const AffinityCall& call,
                    T* scratch,  // [padded_size(B * channels)]
                    T* packed);

// m_i <- sum_p w_p(i) m(i + p), `iterations` times, or its transpose. Of image b the first counts[b]
// planes (all, if null) are read and written, the others of the result are 0.
template <class T>
void propagate(const T* masks,  // [B, N, H, W]
               const T* packed,
               const int32_t* counts,  // [B] or null
               int64_t batch, int32_t planes, int32_t iterations, bool transposed,
               const AffinityCall& call,
               T* scratch,  // [propagate_scratch(N)]
               T* result);  // [B, N, H, W]

}  // namespace wsis::cpu
