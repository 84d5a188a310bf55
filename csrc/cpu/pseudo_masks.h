// Two-threshold pseudo masks on the CPU. Sizes: B images, K classes, R room for present classes
// (R <= K; classes past it are dropped), H W image, h w reduced size.
#pragma once

#include "kernels/platform.h"

namespace wsis::cpu {

struct PseudoSizes {
  int64_t batch;
  int32_t classes, room, height, width, reduced_height, reduced_width;
};

// unit [B]: mean over the valid box of the largest score among the present classes. scratch [B, H].
template <class T>
void pseudo_unit(const T* cams,           // [B, K, H, W]
                 const uint8_t* present,  // [B, K], not 0 where the class is in the image
                 const int64_t* box,      // [B, 4], y0 y1 x0 x1, half open
                 PseudoSizes sizes, int32_t parts, double* scratch, T* unit);

// counts [B]: planes of each image, 2 (P + 1), or 0 without a class. ids [B, R + 1]: class ids, 0
// the background. stack [B, 2 (R + 1), h, w]: only the first counts[b] planes of an image are
// written.
template <class T>
void pseudo_stack(const T* cams,           // [B, K, H, W]
                  const uint8_t* present,  // [B, K]
                  const T* unit,           // [B], or null: 1
                  T high, T low, PseudoSizes sizes, int32_t parts, T* stack, int32_t* counts,
                  int32_t* ids);

// masks [B, H, W]: class ids, or ignore_index where undecided or outside the box.
template <class T>
void pseudo_labels(const T* stack,         // [B, 2 (R + 1), h, w]
                   const int32_t* counts,  // [B]
                   const int32_t* ids,     // [B, R + 1]
                   const int64_t* box,     // [B, 4]
                   int64_t ignore_index, PseudoSizes sizes, int32_t parts, int64_t* masks);

}  // namespace wsis::cpu
