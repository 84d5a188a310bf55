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
  uint32_t* next;   // of `sorted`, see write_lines(); before that, chunks of the vertices
  uint32_t* rows;   // as in Lattice
  int16_t* counts;  // as in Lattice
  uint32_t* table;  // see Table
  int64_t capacity;

  Scratch(int64_t* memory, int64_t corners) {
    const auto aligned = (reinterpret_cast<uintptr_t>(memory) + 15) / 16 * 16;
    const int64_t room = room_for(corners);
    listed = reinterpret_cast<Key*>(aligned);
    keys = listed + room;
    sorted = sizeof(Key) == 8 ? keys + room : keys;
    order = reinterpret_cast<uint32_t*>(listed);
    next = order + room;
    int64_t* rest = reinterpret_cast<int64_t*>(aligned) + kKeyWords * room;
    rows = reinterpret_cast<uint32_t*>(rest);
    counts = reinterpret_cast<int16_t*>(rest + (corners + 1) / 2);
    table = reinterpret_cast<uint32_t*>(rest + (corners + 1) / 2 + (corners + 3) / 4);
    capacity = capacity_for(corners);
  }
  static int64_t size(int64_t corners) {
    return 2 + kKeyWords * room_for(corners) + (corners + 1) / 2 + (corners + 3) / 4 +
           capacity_for(corners) / 2;
  }
  // Each chunk has a place more than vertices.
  static int64_t room_for(int64_t corners) { return corners + most_chunks(corners); }
  static int64_t capacity_for(int64_t corners) {
    int64_t capacity = 4096;
    while (capacity <= 2 * corners) capacity *= 2;
    return capacity;
  }
};

// Open addressing, at most half full: numbers of keys, or 0xffffffff.
template <class Key>
struct Table {
  uint32_t* places;
  int bits;

  // Of at least `least` places, at most `room`.
  Table(uint32_t* memory, int64_t least, int64_t room) : places(memory), bits(3) {
    while ((int64_t{1} << bits) < least && int64_t{2} << bits <= room) ++bits;
    clear();
  }
  int64_t size() const { return int64_t{1} << bits; }
  uint64_t home(Key key) const { return kernels::mix(key) >> (64 - bits); }
  // The place of a key, or the empty one where it belongs, and the key's number among the first
  // `count` of `keys`, or `count`. Nobody could predict whether a key is there. So it is written
  // behind the others, where the search ends in any case.
  uint32_t& find(Key key, Key* keys, uint32_t count, uint32_t* number) const {
    const uint64_t mask = size() - 1;
    keys[count] = key;
    uint64_t at = home(key);
    uint32_t found = std::min(places[at], count);
    while (keys[found] != key) {
      at = (at + 1) & mask;
      found = std::min(places[at], count);
    }
    *number = found;
    return places[at];
  }
  // Puts the key with a number in, which is new.
  void insert(Key* keys, uint32_t number) const {
    uint32_t found;
    find(keys[number], keys, number, &found) = number;
  }
  void clear() { std::memset(places, 0xff, sizeof(uint32_t) << bits); }
};

// ---- numbers -----------------------------------------------------------------------------------

// Moves the lists of the parts together and numbers their vertices; returns M.
template <class Key>
int64_t number(const int32_t* first, int64_t num_tiles, int32_t parts, const Tiles& tiles, int dims,
               Scratch<Key>& scratch) {
  // Of two steps of looking up a key, each waits for memory: both are asked for long before.
  constexpr int64_t kFar = 24, kNear = 12;
  Table<Key> table(scratch.table, std::max<int64_t>(4096, first[num_tiles] / 4), scratch.capacity);
  uint32_t vertices = 0;
  int64_t to = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = num_tiles * part / parts, end = num_tiles * (part + 1) / parts;
    if (begin == end) continue;
    int64_t from = tiles[begin].first * (dims + 1);
    for (const int64_t stop = from + first[end] - first[begin]; from < stop; ++from, ++to) {
      if (from + kFar < stop) {
        __builtin_prefetch(&table.places[table.home(scratch.listed[from + kFar])]);
        const uint32_t near = table.places[table.home(scratch.listed[from + kNear])];
        __builtin_prefetch(&scratch.keys[std::min(near, vertices)]);
      }
      uint32_t found;
      uint32_t& place = table.find(scratch.listed[from], scratch.keys, vertices, &found);
      place = found;
      scratch.counts[to] = scratch.counts[from];
      scratch.rows[to] = found | (found == vertices ? kFlag : 0);
      vertices += found == vertices;
      if (2 * int64_t{vertices} < table.size()) continue;
      table = Table<Key>(table.places, 2 * table.size(), scratch.capacity);
      for (uint32_t v = 0; v < vertices; ++v) table.insert(scratch.keys, v);
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

// The lines of one chunk along an axis; returns how many vertices they have. `order` [count] are
// the chunk's numbers; `next` [count]: place of the next on the line, or `count`; kFlag: there is one
// before.
inline int64_t write_lines(const uint32_t* order, const uint32_t* next, uint32_t count,
                           uint32_t* lines) {
  uint32_t* to = lines;
  for (uint32_t i = 0; i < count; ++i) {
    if (next[i] >= count) continue;  // no neighbour after it, or one before
    *to++ = order[i] | kFlag;
    for (uint32_t at = next[i]; at != count; at = next[at] & ~kFlag) *to++ = order[at];
  }
  return to - lines;
}

template <class Key>
void find_lines(const KeyLayout<Key>& layout, int64_t vertices, int32_t parts,
                Scratch<Key>& scratch, uint32_t* lines, int32_t* cuts) {
  constexpr int64_t kSparse = 4;
  const int dims = layout.dims;
  const int32_t chunks = chunks_for(vertices, dims);
  std::vector<int64_t> first(chunks + 1), end(chunks);
  for (int half = 0; half < axis_halves(dims); ++half) {
    const int first_axis = half_begin(half, dims), last_axis = half_begin(half + 1, dims);
    const ChunkOf<Key> chunk_of(layout, first_axis, last_axis, sizeof(Key) == 8 ? chunks : 1);
    std::fill(first.begin(), first.end(), 0);
    for (int64_t v = 0; v < vertices; ++v) {
      scratch.next[v] = chunk_of(scratch.keys[v]);
      ++first[scratch.next[v] + 1];
    }
    int64_t largest = 0;
    for (int32_t c = 0; c < chunks; ++c) {
      largest = std::max(largest, first[c + 1]);
      end[c] = first[c + 1] += first[c];
    }
    for (int64_t v = vertices; v-- > 0;) {
      const uint32_t c = scratch.next[v];
      const int64_t at = --end[c];
      scratch.order[at] = static_cast<uint32_t>(v);
      scratch.sorted[at + c] = scratch.keys[v];
    }
    // Each thread has a table for the largest chunk, a quarter full if there is room: searches that
    // do not end where they begin are the ones that take long.
    int64_t room = 8;
    while (room < kSparse * largest && 2 * room <= scratch.capacity) room *= 2;
    const int32_t threads = static_cast<int32_t>(std::min<int64_t>(parts, scratch.capacity / room));
    parallel_for(chunks, threads, [&](int part, int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        const int64_t begin = first[c];
        const auto count = static_cast<uint32_t>(first[c + 1] - begin);
        Key* keys = scratch.sorted + begin + c;
        uint32_t* next = scratch.next + begin + c;
        const Table<Key> table(scratch.table + part * room, kSparse * count, room);
        for (uint32_t i = 0; i < count; ++i) table.insert(keys, i);
        for (int axis = first_axis; axis < last_axis; ++axis) {
          const Key step = layout.step(axis);
          std::memset(next, 0, (count + 1) * sizeof(uint32_t));
          for (uint32_t i = 0; i < count; ++i) {
            uint32_t after;
            table.find(keys[i] + step, keys, count, &after);
            next[i] |= after;
            next[after] |= kFlag;
          }
          uint32_t* of_chunk = lines + axis * vertices + begin;
          const int64_t written = write_lines(scratch.order + begin, next, count, of_chunk);
          int32_t* cut = cuts + 2 * (axis * int64_t{chunks} + c);
          cut[0] = static_cast<int32_t>(begin);
          cut[1] = static_cast<int32_t>(begin + written);
        }
      }
    });
  }
}

}  // namespace wsis::cpu
