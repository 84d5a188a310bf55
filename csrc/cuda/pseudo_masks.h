// Two-threshold pseudo masks on CUDA: launchers. Arrays as in cpu/pseudo_masks.h, on the device.
#pragma once

#include "cpu/pseudo_masks.h"

namespace wsis::cuda {

using cpu::PseudoSizes;

// Two launches.
template <class T>
void pseudo_unit(const T* cams, const uint8_t* present, const int64_t* box, PseudoSizes sizes,
                 double* scratch, T* unit, int device, uintptr_t stream);

// One launch.
template <class T>
void pseudo_stack(const T* cams, const uint8_t* present, const T* unit, T high, T low,
                  PseudoSizes sizes, T* stack, int32_t* counts, int32_t* ids, int device,
                  uintptr_t stream);

// One launch.
template <class T>
void pseudo_labels(const T* stack, const int32_t* counts, const int32_t* ids, const int64_t* box,
                   int64_t ignore_index, PseudoSizes sizes, int64_t* masks, int device,
                   uintptr_t stream);

}  // namespace wsis::cuda
