// Dense CRF and lattice filter on CUDA: launchers.
#pragma once

#include "cuda/permutohedral_rows.h"

namespace wsis::cuda {

// Arrays [B, C, N] but for labels.
template <class T>
struct FieldCall {
  const T* unary;       // energies
  const T* start;       // null: softmax(-unary)
  T* probs;             // null: not wanted
  uint8_t* few_labels;  // [B, N], or null
  int32_t* labels;      // [B, N], or null
  Tiling tiling;
  int64_t batch;
  int32_t classes;
};

// Mean field. One launch, and per iteration one and what blur_rows needs. Nothing is read back.
template <class T>
void mean_field(const FieldCall<T>& call, const Terms<T>& terms, int64_t iterations,
                int64_t shared_bytes, int device, uintptr_t stream);

// `start` filtered with one term, into `probs`; reverse: the axes backwards. Two launches and
// blur_rows.
template <class T>
void lattice_filter(const FieldCall<T>& call, const Terms<T>& terms, bool reverse,
                    int64_t shared_bytes, int device, uintptr_t stream);

}  // namespace wsis::cuda
