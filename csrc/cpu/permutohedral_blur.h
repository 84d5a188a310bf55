// The blur of the vertices' rows along the axes.
#pragma once

#include <algorithm>

#include "cpu/crew.h"
#include "cpu/permutohedral.h"
#include "cpu/row_vectors.h"

namespace wsis::cpu {

// v + (previous + next) / 2 along lines of vertices, in place: every row is read and written once.
template <class T>
struct BlurLines {
  T* table;
  int32_t stride;
  const uint32_t* lines;
  int64_t begin, end;

  template <int kBytes>
  WSIS_INLINE void run() const {
    for_pieces<T, kBytes>(
        stride, [&](auto piece, int32_t at) WSIS_LAMBDA_INLINE { blur(piece, table + at); });
  }

  template <class Row>
  WSIS_INLINE void blur(Row before, T* base) const {
    constexpr int64_t kAhead = 32;
    constexpr bool kAsk = sizeof(Row) >= 32;  // tables of short rows are small
    const uint32_t *line = lines + begin, *stop = lines + end;  // see SplatTile::add()
    const int32_t step = stride;
    Row here, next;
    T* to = base + int64_t{*line & ~kFlag} * step;
    before.clear();
    here.read(to);
    while (line != stop) {
      if (kAsk && stop - line > kAhead) {
        const T* later = base + int64_t{line[kAhead] & ~kFlag} * step;
        __builtin_prefetch(later, 1);
        __builtin_prefetch(later + 64 / sizeof(T), 1);
      }
      // The next vertex in memory; it counts if it continues the line.
      const uint32_t follows = ++line != stop ? *line : line[-1] | kFlag;
      T* from = base + int64_t{follows & ~kFlag} * step;
      const auto same = ~(static_cast<int32_t>(follows) >> 31);
      next.read(from);
      before.add_if(next, same);
      before.scale(T(0.5));
      before.add(here);
      before.write(to);
      before = here;
      before.keep_if(same);
      here = next;
      to = from;
    }
  }
};

// Some axes, first to last, chunk by chunk.
template <class T>
struct BlurChunks {
  const Lattice& lattice;
  T* table;
  int32_t stride, chunks, first_axis, last_axis;  // last < first to go backwards
  int64_t begin, end;                             // chunks

  template <int kBytes>
  WSIS_INLINE void run() const {
    const int32_t step = first_axis <= last_axis ? 1 : -1;
    for (int64_t c = begin; c < end; ++c)
      for (int32_t axis = first_axis; axis != last_axis + step; axis += step) {
        if (axis == last_axis && c + 1 < end) prefetch(cut_of(first_axis, c + 1), first_axis);
        const int32_t* cut = cut_of(axis, c);
        if (cut[0] < cut[1])
          dispatch(BlurLines<T>{table, stride, lattice.lines + axis * lattice.vertices, cut[0],
                                cut[1]});
      }
  }

  WSIS_INLINE const int32_t* cut_of(int32_t axis, int64_t chunk) const {
    return lattice.cuts + 2 * (axis * int64_t{chunks} + chunk);
  }
  // The first rows of a chunk; BlurLines asks for the others itself.
  WSIS_INLINE void prefetch(const int32_t* cut, int32_t axis) const {
    const uint32_t* line = lattice.lines + axis * lattice.vertices;
    for (int32_t i = cut[0]; i < std::min(cut[1], cut[0] + 32); ++i)
      for (int32_t at = 0; at < stride; at += 64 / sizeof(T))
        __builtin_prefetch(table + int64_t{line[i] & ~kFlag} * stride + at, 1);
  }
};

template <class T>
void blur(const Lattice& lattice, int32_t stride, bool reverse, const Crew& crew, T* table) {
  const int32_t dims = lattice.dims, chunks = chunks_for(lattice.vertices, dims);
  if (chunks == 1) {
    for (int32_t i = 0; i <= dims; ++i) {
      const int32_t axis = reverse ? dims - i : i;
      const uint32_t* lines = lattice.lines + axis * lattice.vertices;
      const int64_t count = lattice.cuts[2 * axis + 1];
      // Handing rows to another thread costs more than blurring some of them.
      const int64_t most = 1 + count * stride / (1 << 15);
      crew.share(count, most, [&](int, int64_t begin, int64_t end) {
        while (begin < end && !(lines[begin] & kFlag)) ++begin;  // whole lines
        while (end < count && !(lines[end] & kFlag)) ++end;
        if (begin < end) dispatch(BlurLines<T>{table, stride, lines, begin, end});
      });
    }
    return;
  }
  const int32_t halves = axis_halves(dims);
  for (int32_t i = 0; i < halves; ++i) {
    const int32_t half = reverse ? halves - 1 - i : i;
    int32_t first = half_begin(half, dims), last = half_begin(half + 1, dims) - 1;
    if (reverse) std::swap(first, last);
    crew.share(chunks, [&](int, int64_t begin, int64_t end) {
      dispatch(BlurChunks<T>{lattice, table, stride, chunks, first, last, begin, end});
    });
  }
}

}  // namespace wsis::cpu
