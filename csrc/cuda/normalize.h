// CAM normalisation on CUDA: launchers. Shapes as in the headers of csrc/cpu. No atomics, and sums
// in an order that depends on shapes only, so results are the same at every call.
#pragma once

#include "cpu/normalize.h"
#include "cpu/normalize_pixels.h"
#include "cpu/normalize_planes.h"

namespace wsis::cuda {

using cpu::Frame;
using cpu::LabelRule;
using cpu::Merge;
using cpu::Passes;
using cpu::Planes;

// Tiles of a frame: each leaves one pair of extrema in `partial` [planes, tiles, 2].
int64_t merge_tiles(Frame frame);

// Two launches: extrema of each tile; then the scores, the maps being merged anew.
template <class T>
void normalize_cams(const Passes<T>& passes, Merge merge, Frame frame, T eps, const T* weights,
                    int64_t batch, int32_t num_classes, int32_t skip, T* partial, T* scores,
                    int device, uintptr_t stream);

// Channel 0 of scores [B, 1 + K, n] from the others; one launch.
template <class T>
void add_background(kernels::Background kind, T value, const T* weights, T absent, int64_t batch,
                    int32_t num_classes, int64_t n, T* scores, int device, uintptr_t stream);

template <class T>
void share_background(const T* gradient, const T* scores, int64_t batch, int32_t num_classes,
                      int64_t n, T* shares, int device, uintptr_t stream);

template <class T>
void cams_to_labels(const T* scores, const T* weights, const int64_t* boxes, int64_t batch,
                    int32_t num_classes, int32_t rows, int32_t columns, LabelRule rule,
                    int64_t* labels, int device, uintptr_t stream);

// Chunks of a plane: each leaves one row in `partial` and, in the backward pass, in `positions`.
int64_t plane_chunks(int64_t n);

// Two launches. partial [planes, chunks, 2].
template <class T>
void norm_planes(const T* maps, Planes planes, kernels::Norm norm, T eps, T* partial, T* scores,
                 T* extrema, int device, uintptr_t stream);

// Two launches. partial [planes, chunks, 2], positions [planes, chunks, 2] int32.
template <class T>
void norm_planes_backward(const T* gradient, const T* maps, const T* extrema, Planes planes,
                          kernels::Norm norm, T eps, T* partial, int32_t* positions,
                          T* maps_gradient, int device, uintptr_t stream);

}  // namespace wsis::cuda
