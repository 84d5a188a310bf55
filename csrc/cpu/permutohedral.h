// The permutohedral lattice on the CPU, one image at a time. Sizes: d features, N = H W pixels in the
// order of permutohedral_tiles.h, T tiles, V entries of all tiles' vertex lists, M vertices.
#pragma once

#include <cstdint>

#include "cpu/permutohedral_tiles.h"
#include "kernels/permutohedral.h"

namespace wsis::cpu {

// Where features come from: first x / sx, y / sy (unless `widths_xy` is null), then channel i of the
// image divided by widths[i].
struct Points {
  int32_t height, width;
  const float* widths_xy;  // [2] or null
  const void* image;       // [channels, N], or [N, channels] if interleaved
  bool bytes;              // uint8, else float
  bool interleaved;
  int32_t channels;
  const float* widths;  // [channels]
  int32_t dims() const { return channels + (widths_xy ? 2 : 0); }
};

// First and last bit of a number that stands for a vertex or an entry.
constexpr uint32_t kFlag = 1u << 31;

// The axes in one or two halves, [half_begin(h), half_begin(h + 1)), and the number of chunks that
// lines along each of them come in, see permutohedral_vertices.h.
inline int axis_halves(int32_t dims) { return dims < 3 ? 1 : 2; }
inline int half_begin(int half, int32_t dims) {
  return half == 0 ? 0 : half == axis_halves(dims) ? dims + 1 : (dims + 1) / 2;
}
inline int32_t most_chunks(int64_t vertices) {
  int32_t chunks = 1;
  while (chunks < 1 << 16 && vertices / chunks > 1024) chunks *= 2;
  return chunks;
}
inline int32_t chunks_for(int64_t vertices, int32_t dims) {
  return dims < 3 ? 1 : most_chunks(vertices);
}

struct Lattice {
  const int16_t* slots;     // [N, d + 1]: the corner's place in the vertex list of its tile
  const float* weights;     // [N, d + 1]
  const int16_t* entries;   // [N, d + 1]: a tile's (pixel, corner) pairs p (d + 1) + r, by vertex
  const int32_t* first;     // [T + 1]: where a tile's vertex list begins
  const uint32_t* rows;     // [V]: vertices of a tile; kFlag: no earlier tile has it
  const int16_t* counts;    // [V]: entries of each, in falling order within a tile
  const uint32_t* lines;    // [d + 1, M]: vertices along each axis; kFlag: no neighbour before it.
                            // Those without any neighbour are left out.
  const int32_t* cuts;      // [d + 1, chunks, 2]: where in its row of `lines` a chunk begins and ends
  int64_t vertices;
  int32_t dims;
  Tiles tiles;
};

struct Sizes {
  int64_t vertices, listed;  // M, V; vertices < 0: features not finite (-1) or too wide apart (-2)
};

// 8-byte words of the scratch of embed() and finish().
int64_t lattice_scratch_size(int64_t pixels, int32_t dims);

// Finds every pixel's corners. Vertices are numbered in the order of the tiles.
Sizes embed(const Points& points, int32_t parts, int64_t* scratch, int16_t* slots, float* weights,
            int16_t* entries, int32_t* first);

// The rest, once M and V are known, from the same scratch.
void finish(const Points& points, Sizes sizes, int32_t parts, int64_t* scratch, uint32_t* rows,
            int16_t* counts, uint32_t* lines, int32_t* cuts);

struct FilterCall {
  int32_t channels;
  const float *before, *after;  // [N] in row-major order, or null: factors of the pixels
  bool reverse;
  int32_t parts;
};

// Elements of the scratch of filter().
int64_t filter_scratch_size(const Lattice& lattice, const FilterCall& call);

// result [channels, N] = slice(blur(splat(values [channels, N]))), row-major pixels.
template <class T>
void filter(const Lattice& lattice, const FilterCall& call, const T* values, T* scratch, T* result);

// factors [count] of ones that were filtered: 1 / sqrt(f + 1e-20) if symmetric, else 1 / (f + 1e-20).
void normalise(float* factors, int64_t count, bool symmetric);

}  // namespace wsis::cpu
