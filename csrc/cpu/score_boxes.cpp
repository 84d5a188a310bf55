// All thresholds of a map in two sweeps over its pixels in the order of their levels.
//
// Above level t lie components of pixels (8 neighbours), around holes (4 neighbours, not reaching
// the border of the map). Components only grow and merge while t falls, holes while it rises, so
// that a union-find which keeps the box of each set sees every box there is: it reports a box with
// the range of levels for which it stands. The outline of a hole runs over the pixels around it.
//
// The contour with the largest polygon is always an outer one: the outline of a hole lies inside
// that of its component, and an island inside the hole. Outlines are followed where the box leaves
// room for a larger polygon.
#include "cpu/score_boxes.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace wsis::cpu {
namespace {

struct Map {
  const uint8_t* levels;
  int32_t height, width;
  int32_t size() const { return height * width; }
};

bool operator==(const Box& a, const Box& b) {
  return a.x0 == b.x0 && a.y0 == b.y0 && a.x1 == b.x1 && a.y1 == b.y1;
}

Box hull(const Box& a, const Box& b) {
  return {std::min(a.x0, b.x0), std::min(a.y0, b.y0), std::max(a.x1, b.x1), std::max(a.y1, b.y1)};
}

// Sets of pixels. Their arrays have a frame of one pixel around the map, which is in no set.
struct Sets {
  int32_t* parent;  // -1 before the pixel's turn
  int32_t* since;   // of a root: the step its box came to be
  int32_t* first;   // of a root: its first pixel in the order of the map
  Box* box;         // of a root
  int32_t around[8];  // to the neighbours: four sides, then the diagonals

  Sets(const Map& map, int32_t* words) {
    const int32_t row = map.width + 2, n = row * (map.height + 2);
    box = reinterpret_cast<Box*>(words);
    parent = words + 4 * n;
    since = words + 5 * n;
    first = words + 6 * n;
    const int32_t offsets[8] = {-1, -row, 1, row, -row - 1, 1 - row, row + 1, row - 1};
    std::copy_n(offsets, 8, around);
    std::fill_n(parent, n, -1);
  }

  int32_t find(int32_t pixel) const {
    while (parent[pixel] != pixel) {
      parent[pixel] = parent[parent[pixel]];
      pixel = parent[pixel];
    }
    return pixel;
  }

  // Adds the pixel; stands(box, first step, last step) for every box that ends here. Most pixels
  // lie inside the box of the only set they touch, and cost a look at their neighbours.
  // Returns whether a set was made.
  template <int kNeighbours, class Stands>
  bool add(int32_t pixel, int32_t x, int32_t y, int32_t step, Stands stands) const {
    int32_t root = -1;
    for (int side = 0; side < kNeighbours; ++side) {
      const int32_t up = parent[pixel + around[side]];
      if (up < 0 || up == root) continue;
      const int32_t other = find(up);
      if (other == root) continue;
      if (root < 0) {
        root = parent[pixel] = other;
        first[root] = std::min(first[root], pixel);
        const Box grown = hull(box[root], {x, y, x, y});
        if (!(grown == box[root])) {
          if (since[root] < step) stands(box[root], since[root], step - 1);
          box[root] = grown;
          since[root] = step;
        }
      } else {
        root = merge(root, other, step, stands);
      }
    }
    if (root >= 0) return false;
    parent[pixel] = first[pixel] = pixel;
    since[pixel] = step;
    box[pixel] = {x, y, x, y};
    return true;
  }

  template <class Stands>
  int32_t merge(int32_t a, int32_t b, int32_t step, Stands stands) const {
    const Box both = hull(box[a], box[b]);
    int32_t came = step;
    for (int32_t set : {a, b}) {
      if (box[set] == both)
        came = std::min(came, since[set]);
      else if (since[set] < step)
        stands(box[set], since[set], step - 1);
    }
    const auto extent = [&](int32_t set) {
      return box[set].x1 - box[set].x0 + box[set].y1 - box[set].y0;
    };
    if (extent(a) < extent(b)) std::swap(a, b);
    parent[b] = a;
    first[a] = std::min(first[a], first[b]);
    box[a] = both;
    since[a] = came;
    return a;
  }
};

struct Pixel {
  int16_t x, y;
};

// The pixels of a map sorted by level, and the scratch of a thread.
struct Sweep {
  Map map;
  int32_t* words;  // of `Sets`
  Pixel* order;    // [n]
  int32_t* roots;  // [n]
  int32_t begin[257] = {};  // where the pixels of a level begin in `order`
  int32_t highest = 0;

  Sweep(const Map& m, int32_t* scratch) : map(m) {
    words = scratch;
    roots = scratch + 7 * (map.width + 2) * (map.height + 2);
    order = reinterpret_cast<Pixel*>(roots + map.size());
    for (int32_t i = 0; i < map.size(); ++i) ++begin[map.levels[i] + 1];
    for (int level = 0; level < 256; ++level) {
      if (begin[level + 1] > 0) highest = level;
      begin[level + 1] += begin[level];
    }
    int32_t next[256];
    std::copy_n(begin, 256, next);
    for (int32_t y = 0; y < map.height; ++y)
      for (int32_t x = 0; x < map.width; ++x)
        order[next[map.levels[y * map.width + x]]++] = {int16_t(x), int16_t(y)};
  }

  int32_t place(Pixel p) const { return (p.y + 1) * (map.width + 2) + p.x + 1; }

  // Adds the pixels of a level in the order of the map; made(pixel) for every set that begins.
  template <int kNeighbours, class Stands, class Made>
  void add_level(const Sets& sets, int32_t level, int32_t step, Stands stands, Made made) const {
    for (int32_t k = begin[level]; k < begin[level + 1]; ++k) {
      const int32_t pixel = place(order[k]);
      if (sets.add<kNeighbours>(pixel, order[k].x, order[k].y, step, stands)) made(pixel);
    }
  }

  // Sweeps levels [from, to) in steps of 1 or -1 and reports all boxes that ever stood.
  template <int kNeighbours, class Stands>
  void run(int32_t from, int32_t to, Stands stands) const {
    const Sets sets(map, words);
    int32_t num_roots = 0, step = 0;
    const auto made = [&](int32_t pixel) { roots[num_roots++] = pixel; };
    for (int32_t level = from; level != to; level += from < to ? 1 : -1, ++step)
      add_level<kNeighbours>(sets, level, step, stands, made);
    for (int32_t k = 0; k < num_roots; ++k)
      if (const int32_t i = roots[k]; sets.parent[i] == i)
        stands(sets.box[i], sets.since[i], step - 1);
  }
};

// A contour's box: OpenCV's rectangle is one wider than the last pixel, cut at the border.
Box contour_box(const Map& map, Box pixels) {
  return {pixels.x0, pixels.y0, std::min(pixels.x1 + 1, map.width - 1),
          std::min(pixels.y1 + 1, map.height - 1)};
}

// Components above every level: emit(box, lowest level, highest level).
template <class Emit>
void sweep_components(const Sweep& sweep, Emit emit) {
  const int32_t top = sweep.highest - 1;  // at step s the pixels above level top - s are in
  sweep.run<8>(sweep.highest, 0, [&](const Box& box, int32_t first, int32_t last) {
    emit(contour_box(sweep.map, box), top - last, top - first);
  });
}

// Holes in them, likewise.
template <class Emit>
void sweep_holes(const Sweep& sweep, Emit emit) {
  const Map& map = sweep.map;
  sweep.run<4>(0, sweep.highest, [&](const Box& box, int32_t first, int32_t last) {
    if (box.x0 > 0 && box.y0 > 0 && box.x1 < map.width - 1 && box.y1 < map.height - 1)
      emit(contour_box(map, {box.x0 - 1, box.y0 - 1, box.x1 + 1, box.y1 + 1}), first, last);
  });
}

// Twice the area of the polygon through the outermost pixels of the component above `level` whose
// first pixel is x0 y0: the outline is followed with the component to its right (Suzuki and Abe
// 1985, Appendix I; 8 neighbours).
int64_t outline_area(const Map& map, int32_t level, int32_t x0, int32_t y0) {
  // Clockwise on the screen from the left; y points down.
  static constexpr int32_t dx[8] = {-1, -1, 0, 1, 1, 1, 0, -1};
  static constexpr int32_t dy[8] = {0, -1, -1, -1, 0, 1, 1, 1};
  const auto lit = [&](int32_t x, int32_t y) {
    return x >= 0 && y >= 0 && x < map.width && y < map.height &&
           map.levels[y * map.width + x] > level;
  };
  int32_t first = 0;  // the way to the first lit neighbour, clockwise from the left, which is dark
  while (first < 8 && !lit(x0 + dx[first], y0 + dy[first])) ++first;
  if (first == 8) return 0;
  int64_t area = 0;
  int32_t x = x0, y = y0, from = first;  // from: the way back to the pixel before
  while (true) {
    int32_t way = (from + 7) % 8;  // counterclockwise, beginning beside where we came from
    while (!lit(x + dx[way], y + dy[way])) way = (way + 7) % 8;
    const int32_t nx = x + dx[way], ny = y + dy[way];
    area += int64_t(x) * ny - int64_t(nx) * y;
    // Closed when it arrives at the start from the pixel that it set out to find first.
    if (nx == x0 && ny == y0 && x == x0 + dx[first] && y == y0 + dy[first]) break;
    x = nx;
    y = ny;
    from = (way + 4) % 8;
  }
  return std::abs(area);
}

// The largest contour above every level: emit(box, level, level). Of equal ones the one that begins
// last in the order of the map, which OpenCV lists first.
template <class Emit>
void sweep_largest(const Sweep& sweep, Emit emit) {
  const Map& map = sweep.map;
  const Sets sets(map, sweep.words);
  int32_t num_roots = 0;
  for (int32_t level = sweep.highest; level > 0; --level) {
    sweep.add_level<8>(
        sets, level, 0, [](const Box&, int32_t, int32_t) {},
        [&](int32_t pixel) { sweep.roots[num_roots++] = pixel; });
    int32_t* const end = std::remove_if(sweep.roots, sweep.roots + num_roots,
                                        [&](int32_t i) { return sets.parent[i] != i; });
    num_roots = int32_t(end - sweep.roots);
    const auto room = [&](int32_t root) {  // no polygon in the box is larger, doubled
      const Box& box = sets.box[root];
      return 2 * int64_t(box.x1 - box.x0) * (box.y1 - box.y0);
    };
    const auto area = [&](int32_t root) {
      const int32_t row = map.width + 2, first = sets.first[root];
      return outline_area(map, level - 1, first % row - 1, first / row - 1);
    };
    // The widest first, so that most others need not be followed.
    int32_t best = *std::max_element(sweep.roots, end, [&](int32_t a, int32_t b) {
      return room(a) < room(b);
    });
    int64_t largest = area(best);
    for (const int32_t* root = sweep.roots; root < end; ++root) {
      if (*root == best || room(*root) < largest) continue;
      const int64_t other = area(*root);
      if (other > largest || (other == largest && sets.first[*root] > sets.first[best])) {
        largest = other;
        best = *root;
      }
    }
    emit(contour_box(map, sets.box[best]), level - 1, level - 1);
  }
}

template <class Emit>
void sweep_all(const Map& map, Contours contours, int32_t* scratch, Emit emit) {
  const Sweep sweep(map, scratch);
  if (contours == Contours::kLargest) return sweep_largest(sweep, emit);
  sweep_components(sweep, emit);
  sweep_holes(sweep, emit);
}

// Intersection over union, corners inside.
double overlap(const Box& a, const Box& b) {
  const auto area = [](int64_t x0, int64_t y0, int64_t x1, int64_t y1) {
    return std::max<int64_t>(x1 - x0 + 1, 0) * std::max<int64_t>(y1 - y0 + 1, 0);
  };
  const int64_t both = area(std::max(a.x0, b.x0), std::max(a.y0, b.y0), std::min(a.x1, b.x1),
                            std::min(a.y1, b.y1));
  const int64_t either = area(a.x0, a.y0, a.x1, a.y1) + area(b.x0, b.y0, b.x1, b.y1) - both;
  return either <= 0 ? 0 : double(both) / double(either);
}

// Maxima over ranges of the 256 levels: a range is kept in the few nodes of a binary tree that make
// it up.
struct RangeMaxima {
  double node[512] = {};

  void raise(int32_t first, int32_t last, double value) {
    for (first += 256, last += 257; first < last; first >>= 1, last >>= 1) {
      if (first & 1) node[first] = std::max(node[first], value), ++first;
      if (last & 1) --last, node[last] = std::max(node[last], value);
    }
  }
  void store(double* maxima) {
    for (int i = 2; i < 512; ++i) node[i] = std::max(node[i], node[i / 2]);
    std::copy_n(node + 256, 256, maxima);
  }
};

}  // namespace

void score_box_overlaps(const uint8_t* levels, const Box* truth, const int64_t* ends, int64_t maps,
                        int64_t height, int64_t width, Contours contours, int32_t parts,
                        int32_t* scratch, double* best) {
  parallel_for(maps, parts, [&](int part, int64_t begin, int64_t end) {
    int32_t* const words = scratch + part * score_boxes_words(height, width);
    for (int64_t n = begin; n < end; ++n) {
      const Box *first = truth + (n > 0 ? ends[n - 1] : 0), *last = truth + ends[n];
      const auto best_overlap = [&](const Box& box) {
        double value = 0;
        for (const Box* t = first; t < last; ++t) value = std::max(value, overlap(box, *t));
        return value;
      };
      RangeMaxima maxima;
      int32_t above = 0;  // from this level on nothing is found, and the box is the first pixel
      sweep_all({levels + n * height * width, int32_t(height), int32_t(width)}, contours, words,
                [&](const Box& box, int32_t lowest, int32_t highest) {
                  maxima.raise(lowest, highest, best_overlap(box));
                  above = std::max(above, highest + 1);
                });
      if (above < 256) maxima.raise(above, 255, best_overlap({0, 0, 0, 0}));
      maxima.store(best + n * 256);
    }
  });
}

int64_t score_boxes(const uint8_t* levels, int64_t height, int64_t width, int32_t level,
                    Contours contours, int32_t* scratch, Box* found) {
  int64_t count = 0;
  sweep_all({levels, int32_t(height), int32_t(width)}, contours, scratch,
            [&](const Box& box, int32_t lowest, int32_t highest) {
              if (lowest <= level && level <= highest) found[count++] = box;
            });
  return count;
}

}  // namespace wsis::cpu
