// The vertices of an image: their numbers, and the lines that they form along the axes.
//
// Lines are sorted into chunks so that the blur, which passes over all vertices once per axis, finds
// them in the cache. The axes are halved. A step along one of a half adds the same to all
// coordinates of the other half, so differences of those stay what they are along all lines of this
// half. Vertices that agree in them are a set that the blur along this half never leaves: about a
// thousand of them (or one set, if it is larger) make a chunk. In a chunk neighbours are looked up
// in a table of its own, which stays in the cache, too.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/permutohedral.h"

namespace wsis::cpu {

using kernels::KeyLayout;
using kernels::kMaxDims;

#if defined(__SIZEOF_INT128__)
using WideKey = unsigned __int128;
#else
using WideKey = uint64_t;
#endif

// ---- memory ------------------------------------------------------------------------------------

constexpr int64_t kKeyWords = std::max<int64_t>(3, 2 * sizeof(WideKey) / 8);  // a corner

template <class Key>
struct Scratch {
  Key* listed;      // vertex lists of the tiles
  Key* keys;        // of the vertices
  Key* sorted;      // the same by chunks; where there is but one, this is `keys`
  uint32_t* order;  // numbers of the vertices by chunks, in place of `listed`
  uint32_t* next;   // of `order`: place in the chunk of the next on the line plus 1, or 0
  uint32_t* rows;   // as in Lattice
  int16_t* counts;  // as in Lattice
  uint32_t* table;  // open addressing: number of a vertex plus 1, or 0
  int64_t capacity;

  Scratch(int64_t* memory, int64_t corners) {
    const auto aligned = (reinterpret_cast<uintptr_t>(memory) + 15) / 16 * 16;
    listed = reinterpret_cast<Key*>(aligned);
    keys = listed + corners;
    sorted = sizeof(Key) == 8 ? keys + corners : keys;
    order = reinterpret_cast<uint32_t*>(listed);
    next = order + corners;
    int64_t* rest = reinterpret_cast<int64_t*>(aligned) + kKeyWords * corners;
    rows = reinterpret_cast<uint32_t*>(rest);
    counts = reinterpret_cast<int16_t*>(rest + (corners + 1) / 2);
    table = reinterpret_cast<uint32_t*>(rest + (corners + 1) / 2 + (corners + 3) / 4);
    capacity = capacity_for(corners);
  }
  static int64_t size(int64_t corners) {
    return 2 + kKeyWords * corners + (corners + 1) / 2 + (corners + 3) / 4 +
           capacity_for(corners) / 2;
  }
  static int64_t capacity_for(int64_t corners) {
    int64_t capacity = 4096;
    while (capacity <= 2 * corners) capacity *= 2;
    return capacity;
  }
};

// At most half full.
template <class Key>
struct Table {
  uint32_t* places;
  int bits;

  Table(uint32_t* memory, int64_t vertices) : places(memory), bits(3) {
    while ((int64_t{1} << bits) < 2 * vertices) ++bits;
    clear();
  }
  int64_t size() const { return int64_t{1} << bits; }
  uint64_t home(Key key) const { return kernels::mix(key) >> (64 - bits); }
  // The place of a key, or the empty one where it belongs.
  uint32_t& find(Key key, const Key* keys) const {
    const uint64_t mask = size() - 1;
    uint64_t at = home(key);
    while (places[at] && keys[places[at] - 1] != key) at = (at + 1) & mask;
    return places[at];
  }
  void clear() { std::memset(places, 0, sizeof(uint32_t) << bits); }
};

// ---- numbers -----------------------------------------------------------------------------------

// Moves the lists of the parts together and numbers their vertices; returns M.
template <class Key>
int64_t number(const int32_t* first, int64_t num_tiles, int32_t parts, const Tiles& tiles, int dims,
               Scratch<Key>& scratch) {
  // Of two steps of looking up a key, each waits for memory: both are asked for long before.
  constexpr int64_t kFar = 24, kNear = 12;
  Table<Key> table(scratch.table, std::max<int64_t>(2048, first[num_tiles] / 8));
  int64_t vertices = 0, to = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = num_tiles * part / parts, end = num_tiles * (part + 1) / parts;
    if (begin == end) continue;
    int64_t from = tiles[begin].first * (dims + 1);
    for (const int64_t stop = from + first[end] - first[begin]; from < stop; ++from, ++to) {
      if (from + kFar < stop) {
        __builtin_prefetch(&table.places[table.home(scratch.listed[from + kFar])]);
        const uint32_t near = table.places[table.home(scratch.listed[from + kNear])];
        __builtin_prefetch(&scratch.keys[near]);
      }
      const Key key = scratch.listed[from];
      uint32_t* place = &table.find(key, scratch.keys);
      scratch.rows[to] = *place - 1;
      scratch.counts[to] = scratch.counts[from];
      if (*place) continue;
      scratch.keys[vertices] = key;
      scratch.rows[to] = static_cast<uint32_t>(vertices) | kFlag;
      *place = static_cast<uint32_t>(++vertices);
      if (2 * vertices < table.size()) continue;
      table = Table<Key>(table.places, table.size());
      for (int64_t v = 0; v < vertices; ++v)
        table.find(scratch.keys[v], scratch.keys) = static_cast<uint32_t>(v + 1);
    }
  }
  return vertices;
}

// ---- lines -------------------------------------------------------------------------------------

// Which chunk a vertex is in, for the lines along the axes [begin, end).
template <class Key>
class ChunkOf {
 public:
  ChunkOf(const KeyLayout<Key>& layout, int begin, int end, int32_t chunks) {
    // A random linear function of the coordinates of the other half whose factors sum to 0: it
    // takes only differences in. The coordinate that keys leave out is minus the sum of the others.
    // Where keys are random themselves, coordinates cannot be read, and all is one chunk.
    dims_ = sizeof(Key) == 8 ? layout.dims : 0;
    shift_ = 64;
    for (int32_t n = chunks; n > 1; n /= 2) --shift_;
    uint64_t state = 1, sum = 0, last = 0;
    for (int i = 0; i <= dims_; ++i) {
      const bool other = i < begin || i >= end;
      const bool closing = i == (end > dims_ ? begin - 1 : dims_);
      const uint64_t factor = !other ? 0 : closing ? 0 - sum : kernels::next_random(&state);
      sum += factor;
      if (i == dims_)
        last = factor;
      else
        field_[i] = {layout.shift[i], i + 1 < dims_ ? layout.shift[i + 1] : 64, factor};
    }
    for (int i = 0; i < dims_; ++i) field_[i].factor -= last;
  }
  uint32_t operator()(Key key) const {
    if (shift_ == 64) return 0;
    uint64_t value = 0;
    for (int i = 0; i < dims_; ++i)
      value += (static_cast<uint64_t>(key) << (64 - field_[i].end) >> (64 - field_[i].end) >>
                field_[i].begin) * field_[i].factor;
    return static_cast<uint32_t>(value >> shift_);
  }

 private:
  struct Field {
    int32_t begin, end;  // bits
    uint64_t factor;
  };
  Field field_[kMaxDims];
  int dims_, shift_;
};

// The lines of one chunk along an axis, in place of it; returns their end. `order` and `next` are
// the chunk's.
inline int64_t write_lines(const uint32_t* order, const uint32_t* next, int64_t count,
                           uint32_t* lines) {
  int64_t to = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (next[i] == 0 || next[i] & kFlag) continue;  // no neighbour after it, or one before
    lines[to++] = order[i] | kFlag;
    for (uint32_t at = next[i]; at &= ~kFlag; at = next[at - 1]) lines[to++] = order[at - 1];
  }
  return to;
}

template <class Key>
void find_lines(const KeyLayout<Key>& layout, int64_t vertices, int32_t parts,
                Scratch<Key>& scratch, uint32_t* lines, int32_t* cuts) {
  const int dims = layout.dims;
  const int32_t chunks = chunks_for(vertices, dims);
  std::vector<int64_t> first(chunks + 1), end(chunks);
  for (int half = 0; half < axis_halves(dims); ++half) {
    const int first_axis = half_begin(half, dims), last_axis = half_begin(half + 1, dims);
    const ChunkOf<Key> chunk_of(layout, first_axis, last_axis, sizeof(Key) == 8 ? chunks : 1);
    std::fill(first.begin(), first.end(), 0);
    for (int64_t v = 0; v < vertices; ++v) ++first[chunk_of(scratch.keys[v]) + 1];
    int64_t largest = 0;
    for (int32_t c = 0; c < chunks; ++c) {
      largest = std::max(largest, first[c + 1]);
      end[c] = first[c + 1] += first[c];
    }
    for (int64_t v = vertices; v-- > 0;) {
      const int64_t at = --end[chunk_of(scratch.keys[v])];
      scratch.order[at] = static_cast<uint32_t>(v);
      scratch.sorted[at] = scratch.keys[v];
    }
    // Each thread has a table for the largest chunk.
    int64_t room = 8;
    while (room < 2 * largest) room *= 2;
    const int32_t threads = static_cast<int32_t>(std::min<int64_t>(parts, scratch.capacity / room));
    parallel_for(chunks, threads, [&](int part, int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        const int64_t begin = first[c], count = first[c + 1] - begin;
        const Key* keys = scratch.sorted + begin;
        uint32_t* next = scratch.next + begin;
        const Table<Key> table(scratch.table + part * room, count);
        for (int64_t i = 0; i < count; ++i)
          table.find(keys[i], keys) = static_cast<uint32_t>(i + 1);
        for (int axis = first_axis; axis < last_axis; ++axis) {
          const Key step = layout.step(axis);
          std::memset(next, 0, count * sizeof(uint32_t));
          for (int64_t i = 0; i < count; ++i) {
            const uint32_t found = table.find(keys[i] + step, keys);
            next[i] |= found;
            if (found) next[found - 1] |= kFlag;
          }
          const int64_t written = write_lines(scratch.order + begin, next, count,
                                              lines + axis * vertices + begin);
          int32_t* cut = cuts + 2 * (axis * int64_t{chunks} + c);
          cut[0] = static_cast<int32_t>(begin);
          cut[1] = static_cast<int32_t>(begin + written);
        }
      }
    });
  }
}

}  // namespace wsis::cpu
