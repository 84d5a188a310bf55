// CAM normalisation on the CPU: the maps of several passes to scores.
//
// Sizes: B images, K classes, planes = B K, M passes, h w grid of a pass, H W size that passes are
// resized to, rows x columns its top left part that is kept (all of it, or less).
#pragma once

#include <cstdint>

#include "kernels/normalize.h"

namespace wsis::cpu {

constexpr int32_t kMostPasses = 64;

// The class maps of one pass over the image: [planes, h, w].
template <class T>
struct Pass {
  const T* maps;
  int32_t h, w;
  bool flip;  // the image was mirrored, so the maps are mirrored back
};

template <class T>
struct Passes {
  Pass<T> pass[kMostPasses];
  int32_t count;
};

struct Frame {
  int32_t height, width, rows, columns;  // H, W and the part that is kept
};

// How a method merges its passes.
struct Merge {
  bool positive_each;  // ReLU of each pass before the resize
  bool flip_max;       // passes in pairs: ReLU of the larger of both, then the sum
  kernels::Norm norm;
};

// How much scratch a call needs, in elements.
struct Scratch {
  int64_t tables;    // int32
  int64_t weights;   // T
  int64_t per_part;  // T
};

template <class T>
Scratch normalize_cams_scratch(const Passes<T>& passes, Merge merge, Frame frame);

// Scores of the classes into scores [B, skip + K, rows, columns], whose first `skip` channels are
// not touched; planes of weight 0 are a constant and cost nothing else. extrema [planes, 2]: of the
// merged maps, (0, 0) for weight 0, NaN as maximum where a value was not finite.
template <class T>
void normalize_cams(const Passes<T>& passes, Merge merge, Frame frame, T eps,
                    const T* weights,  // [planes], or null for 1
                    int64_t batch, int32_t num_classes, int32_t skip, int32_t parts,
                    int32_t* tables, T* table_weights, T* scratch, T* scores, T* extrema);

}  // namespace wsis::cpu
