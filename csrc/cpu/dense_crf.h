// The mean field of a dense CRF on the CPU, one image at a time. Sizes: C labels, N pixels.
#pragma once

#include "cpu/permutohedral.h"

namespace wsis::cpu {

// A pairwise term: logits += mix (after * filter(before * Q)).
struct Term {
  Lattice lattice;
  const float *before, *after;  // [N] row-major, or null
  const double* mix;            // [C], or [C, C] if `full`
  bool full;
};

constexpr int32_t kMostTerms = 16;

struct CrfCall {
  const Term* terms;
  int32_t num_terms, labels, height, width, iterations, parts;
};

// Elements of the scratch of dense_crf(); `with_probs`: there is a `probs` to write to.
int64_t crf_scratch_size(const CrfCall& call, bool with_probs);

// Q = softmax(-unary), or `start` if not null; then `iterations` times softmax(-unary + terms(Q)).
// Writes Q to probs [C, N] and the first best label to bytes or integers [N], where not null. Returns
// false if Q is NaN somewhere.
template <class T>
bool dense_crf(const CrfCall& call, const T* unary, const T* start, T* scratch, T* probs,
               uint8_t* bytes, int32_t* integers);

}  // namespace wsis::cpu
