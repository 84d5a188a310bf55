// Where pixel correlation keeps its operands, and the products of tiles that both directions share.
//
// Operands have one row per pixel ("rows") or blocks of kPanel pixels side by side ("panels", where
// element (k, j) of a panel lies at k * kPanel + j). Pixels are padded with zeros to whole strips:
// S of a padded pixel is phi(0), and as its sources are 0 it adds nothing.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/multiply.h"
#include "cpu/parallel.h"
#include "cpu/pixel_correlation.h"

namespace wsis::cpu {

constexpr int32_t kUnit = 8;  // rows and columns of results come in multiples of this

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct CorrelationLayout {
  int64_t strips, padded;         // strips, and pixels in whole strips
  int64_t width, stride;          // features in whole units, and from row to row
  int64_t classes, sources;       // C + 1 in whole units; backward: from row to row of sources
  int64_t terms;                  // 2 (C + 1): factors of a pair's gradient
  bool backward;
  // Offsets into the scratch of an image.
  int64_t rows, panels, norms, source, terms_panels, maps_rows, maps_panels, units_rows,
      units_panels, size;

  CorrelationLayout(const Correlation& call, bool backward_) : backward(backward_) {
    strips = (int64_t{call.pixels} + kStrip - 1) / kStrip;
    padded = strips * kStrip;
    width = round_up(call.depth, kUnit);
    stride = width % 64 ? width : width + 16;  // rows apart by 256 bytes share few cache sets
    classes = round_up(call.classes + 1, kUnit);
    terms = 2 * (int64_t{call.classes} + 1);
    sources = backward ? call.classes + 1 + classes : classes;
    int64_t end = 0;
    const auto take = [&](int64_t elements) {
      const int64_t offset = end;
      end += round_up(elements, 64 / sizeof(float));
      return offset;
    };
    rows = take(padded * stride);
    panels = take(padded * call.depth);
    norms = take(padded);
    source = take(padded * sources);
    maps_rows = take(padded * classes);
    maps_panels = take(padded * classes);
    terms_panels = take(backward ? padded * terms : 0);
    units_rows = take(backward ? padded * width : 0);
    units_panels = take(backward ? padded * width : 0);
    size = end;
  }
};

// Images that are worked on at once: more than one where an image has too few pairs of strips for
// the threads.
inline int64_t images_at_once(const Correlation& call, const CorrelationLayout& layout) {
  const int64_t pairs = (layout.strips + 1) / 2;
  return std::clamp<int64_t>((2 * call.parts + pairs - 1) / pairs, 1, call.batch);
}

// Calls body(image, strip) for `images` images, on threads.
template <class Body>
void for_strips(const Correlation& call, const CorrelationLayout& layout, int64_t images,
                Body body) {
  parallel_for(images * layout.strips, call.parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / layout.strips, i % layout.strips);
  });
}

// Calls body(image, I, J) for all pairs of strips I <= J; see the top of pixel_correlation.h.
template <class Body>
void for_pairs(const Correlation& call, const CorrelationLayout& layout, int64_t images,
               Body body) {
  const int64_t n = layout.strips;
  for (int64_t round = 0; round < n; ++round) {
    // Pairs I + J = round, then pairs I + J = round + n.
    const int64_t low = round / 2 + 1, pairs = low + (n - round) / 2;
    parallel_for(images * pairs, call.parts, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t p = i % pairs;
        const int64_t first = p < low ? p : round + 1 + (p - low);
        const int64_t second = p < low ? round - p : round + n - first;
        body(i / pairs, first, second);
      }
    });
  }
}

// Unit features of a strip as rows and panels, norms, and what is added up set to 0.
template <class T>
WSIS_INLINE void prepare_features(const T* features, const Correlation& call,
                                  const CorrelationLayout& layout, int64_t strip, T* image) {
  const auto clear = [&](int64_t offset, int64_t width) __attribute__((always_inline)) {
    std::fill_n(image + offset + strip * kStrip * width, kStrip * width, T(0));
  };
  clear(layout.rows, layout.stride);
  clear(layout.maps_rows, layout.classes);
  clear(layout.maps_panels, layout.classes);
  if (layout.backward) {
    clear(layout.units_rows, layout.width);
    clear(layout.units_panels, layout.width);
  }
  for (int64_t first = strip * kStrip; first < (strip + 1) * kStrip; first += kPanel) {
    const int64_t count = std::clamp<int64_t>(call.pixels - first, 0, kPanel);
    double squares[kPanel] = {};  // of features beyond 1e19, too
    for (int32_t k = 0; k < call.depth; ++k) {
      const T* from = features + k * int64_t{call.pixels} + first;
      for (int64_t j = 0; j < count; ++j)
        squares[j] += static_cast<double>(from[j]) * static_cast<double>(from[j]);
    }
    T scale[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) {
      const double norm = std::sqrt(squares[j]);
      image[layout.norms + first + j] = static_cast<T>(norm);
      scale[j] = static_cast<T>(1 / (norm + call.eps));
    }
    T* panel = image + layout.panels + first * call.depth;
    T* rows = image + layout.rows + first * layout.stride;
    for (int32_t k = 0; k < call.depth; ++k, panel += kPanel) {
      const T* from = features + k * int64_t{call.pixels} + first;
      for (int64_t j = 0; j < count; ++j) panel[j] = from[j] * scale[j];
      for (int64_t j = count; j < kPanel; ++j) panel[j] = T(0);
      for (int64_t j = 0; j < count; ++j) rows[j * layout.stride + k] = panel[j];
    }
  }
}

// ---- tiles -------------------------------------------------------------------------------------

// A tile S_ij of strips I and J, and what is done with it. kBytes: see simd.h.
template <class T, int kBytes>
struct CorrelationTile {
  using V = Vector<T, kBytes>;
  static constexpr int kLanes = kBytes / sizeof(T), kRows = kBlockRows<kBytes>;

  const CorrelationLayout& layout;
  int64_t first, second;  // I, J
  alignas(64) T tile[kStrip * kStrip];

  WSIS_INLINE CorrelationTile(const CorrelationLayout& of, int64_t i, int64_t j)
      : layout(of), first(i), second(j) {}

  // tile(i, j) = change(left_i . right_j, tile(i, j)) with left as rows and right as panels.
  template <class Change>
  WSIS_INLINE void compare(const T* left, int64_t stride, const T* right, int32_t depth,
                           Change change) {
    left += first * kStrip * stride;
    right += second * kStrip * depth;
    for (int32_t j = 0; j < kStrip; j += 3 * kLanes) {
      const T* panel = right + j / kPanel * kPanel * depth + j % kPanel;
      for (int32_t i = 0; i < kStrip; i += kRows) {
        T* to = tile + i * kStrip + j;
        multiply_block<V, kRows, 3>(
            Operand<T>{left + i * stride, stride, 1}, panel, kPanel, depth,
            [&](int r, int v, V sum) __attribute__((always_inline)) {
              T* at = to + r * kStrip + v * kLanes;
              store(at, change(sum, load<V>(at)));
            });
      }
    }
  }

  // sums of J += tile' source of I, and sums of I += tile source of J. `width` columns of source
  // rows; sums as panels for J, as rows for I.
  WSIS_INLINE void spread(const T* source, int64_t stride, int32_t width, T* rows, T* panels) {
    const T* above = source + first * kStrip * stride;
    panels += second * kStrip * width;
    for (int32_t j = 0; j < kStrip; j += 3 * kLanes) {
      T* panel = panels + j / kPanel * kPanel * width + j % kPanel;
      for (int32_t c = 0; c < width; c += kRows) {
        T* to = panel + c * kPanel;
        multiply_block<V, kRows, 3>(Operand<T>{above + c, 1, stride}, tile + j, kStrip, kStrip,
                                    [&](int r, int v, V sum) __attribute__((always_inline)) {
                                      T* at = to + r * kPanel + v * kLanes;
                                      store(at, load<V>(at) + sum);
                                    });
      }
    }
    if (first == second) return;
    const T* beside = source + second * kStrip * stride;
    rows += first * kStrip * width;
    int32_t c = 0;
    for (; c + 3 * kLanes <= width; c += 3 * kLanes) add_rows<V, 3>(beside, stride, width, c, rows);
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) add_rows<V, 2>(beside, stride, width, c, rows);
    for (; c + kLanes <= width; c += kLanes) add_rows<V, 1>(beside, stride, width, c, rows);
    if constexpr (kLanes > kUnit) {
      if (c < width) add_rows<Vector<T, kUnit * sizeof(T)>, 1>(beside, stride, width, c, rows);
    }
  }

  template <class Part, int kVecs>
  WSIS_INLINE void add_rows(const T* beside, int64_t stride, int64_t width, int32_t c, T* rows) {
    constexpr int kPartLanes = sizeof(Part) / sizeof(T);
    for (int32_t i = 0; i < kStrip; i += kRows) {
      T* to = rows + i * width + c;
      multiply_block<Part, kRows, kVecs>(
          Operand<T>{tile + i * kStrip, kStrip, 1}, beside + c, stride, kStrip,
          [&](int r, int v, Part sum) __attribute__((always_inline)) {
            T* at = to + r * width + v * kPartLanes;
            store(at, load<Part>(at) + sum);
          });
    }
  }
};

}  // namespace wsis::cpu
