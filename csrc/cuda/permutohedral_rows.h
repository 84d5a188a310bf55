// Values on the lattice: from the partial rows of the tiles to blurred rows of the vertices.
//
// A row has the values of all channels at one vertex, in fours. Row 0 is no vertex, and zero.
#pragma once

#include "cuda/permutohedral.h"

namespace wsis::cuda {

constexpr int kMostTerms = 16;  // they are an argument of the kernels

template <class T>
struct alignas(16) Quad {
  T value[4];
};

// The neighbours of a vertex along an axis: rows, 0 where there is none.
struct alignas(8) Sides {
  int32_t next, previous;
};

// A finished lattice. Tiles t of all its images; M vertices, R entries of all lists.
struct LatticeView {
  const float* weights;      // [t, d + 1, 256]
  const uint16_t* local;     // [t, d + 1, 256]
  const uint16_t* order;     // [t, (d + 1) * 256]
  const int32_t* first;      // [t + 1]
  const int32_t* rows;       // [R] of the entries' vertices
  const uint16_t* starts;    // [R] in `order`
  const int32_t* begin;      // [M + 2] in `list`, by row
  const int32_t* list;       // [R] entries by row, in their order
  const Sides* neighbours;   // [d + 1, M + 1]
  const int32_t* image_rows; // [images + 1]: rows image_rows[b] + 1 ... image_rows[b + 1]
  int64_t vertices, entries;
  int32_t corners;  // d + 1
  int32_t most;     // vertices of the largest image
  bool shared;      // one lattice, of one image, for all images of a call
};

// One pairwise term at work.
template <class T>
struct Pairwise {
  LatticeView lattice;
  const float *before, *after;  // [images of the lattice, N], or null: 1
  const T* mix;                 // [C], or [C, C]: blurred rows are multiplied with it
  bool matrix;
  Quad<T>* partial;   // [copies, R, quads]
  Quad<T>* rows[2];   // [copies, M + 1, quads]; copies: one per image of the call if shared, else 1

  // Where the slice finds its rows.
  WSIS_HD Quad<T>* result() const { return rows[(lattice.corners + (matrix ? 1 : 0)) % 2]; }
};

template <class T>
struct Terms {
  int32_t count;
  Pairwise<T> term[kMostTerms];
};

// Partial rows to blurred and mixed ones. Lattices whose images fit into `shared_bytes`: one launch
// for all of them. The others: one to gather, one per axis. One more if there is a matrix.
template <class T>
void blur_rows(const Terms<T>& terms, int64_t batch, int32_t classes, bool reverse,
               int64_t shared_bytes, uintptr_t stream);

}  // namespace wsis::cuda
