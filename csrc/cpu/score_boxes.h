// Boxes of a score map at every threshold, on the CPU. Sizes: N maps of H W pixels, M true boxes.
#pragma once

#include "kernels/platform.h"

namespace wsis::cpu {

// Corners, both of them inside.
struct Box {
  int32_t x0, y0, x1, y1;
};

enum class Contours {
  kAll,      // of every component, and of every hole in one
  kLargest,  // the one whose polygon has the largest area
};

// int32 words of scratch per thread.
inline int64_t score_boxes_words(int64_t height, int64_t width) {
  return 7 * (height + 2) * (width + 2) + 2 * height * width;
}

// best [N, 256]: the largest overlap of a true box of the map with a box found above level t.
void score_box_overlaps(const uint8_t* levels,  // [N, H, W]
                        const Box* truth,       // [M], those of a map one after the other
                        const int64_t* ends,    // [N], one past the last true box of each map
                        int64_t maps, int64_t height, int64_t width, Contours contours,
                        int32_t parts, int32_t* scratch, double* best);

// The boxes found above one level of one map, as many as returned; found has room for H * W.
int64_t score_boxes(const uint8_t* levels, int64_t height, int64_t width, int32_t level,
                    Contours contours, int32_t* scratch, Box* found);

}  // namespace wsis::cpu
