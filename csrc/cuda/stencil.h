// What the kernels of random walks and of stencil affinities share: one thread per pixel.
#pragma once

#include "cuda/launch.h"
#include "kernels/random_walk.h"

namespace wsis::cuda {

constexpr int kStencilThreads = 128;

// The images of a call, small enough to be a kernel argument along with the offsets.
struct Grid {
  int32_t height, width, planes, blocks;  // blocks per image

  Grid(int32_t height_, int32_t width_, int32_t planes_)
      : height(height_),
        width(width_),
        planes(planes_),
        blocks((height_ * width_ + kStencilThreads - 1) / kStencilThreads) {}

  __device__ int32_t size() const { return height * width; }
  __device__ bool contains(int32_t y, int32_t x) const {
    return y >= 0 && y < height && x >= 0 && x < width;
  }
};

// The pixel of a thread; blocks image by image.
struct StencilPixel {
  int64_t image;
  int32_t index, y, x;
  bool inside;

  __device__ explicit StencilPixel(const Grid& grid) {
    image = blockIdx.x / grid.blocks;
    index = static_cast<int32_t>(blockIdx.x % grid.blocks) * kStencilThreads + threadIdx.x;
    inside = index < grid.size();
    y = index / grid.width;
    x = index % grid.width;
  }
};

}  // namespace wsis::cuda
