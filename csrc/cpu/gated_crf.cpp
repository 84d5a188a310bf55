#include "cpu/gated_crf.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace wsis::cpu {
namespace {

using kernels::kMaxWindow;
using kernels::WindowKernels;

constexpr int32_t kTile = 16;  // pixels; a vector of floats is at most as long
constexpr int kGroup = 8;      // values whose sums are in registers together

// Planes with `radius` zeros around them; rows are filled up to a whole tile. An odd number of tiles
// per row and per plane spreads what is read together over the sets of the first-level cache.
struct Bordered {
  int64_t width, height, radius, stride, plane, first;

  explicit Bordered(const WindowCall& call)
      : width(call.width), height(call.height), radius(call.radius) {
    const int64_t tiles = (width + kTile - 1) / kTile;
    stride = ((tiles * kTile + 2 * radius + kTile - 1) / kTile | 1) * kTile;
    plane = ((height + 2 * radius) * stride / kTile | 1) * kTile;
    first = radius * stride + radius;
  }
  int64_t rows() const { return height + 2 * radius; }
};

template <class T>
void copy_bordered(const T* planes, int64_t count, const Bordered& layout, int parts, T* to) {
  parallel_for(count * layout.rows(), parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / layout.rows(), row = i % layout.rows();
      T* line = to + n * layout.plane + row * layout.stride;
      std::fill_n(line, layout.stride, T(0));
      const int64_t y = row - layout.radius;
      if (y >= 0 && y < layout.height)
        std::copy_n(planes + (n * layout.height + y) * layout.width, layout.width,
                    line + layout.radius);
    }
  });
}

// Some rows of one image. For a vector of pixels the weights of the whole window are computed once
// and stay in the first-level cache; then every value is summed up with them. Outside the image the
// values are 0, and whatever the weights are there, they are finite.
template <class T>
struct WindowRows {
  const T* values;    // bordered planes, at the first pixel
  const T* features;  // the same
  const WindowKernels<T>& kernels;
  const WindowCall& call;
  const Bordered& layout;
  int64_t begin, end;  // rows
  T* result;           // [C, H, W]

  template <int kBytes>
  WSIS_INLINE void run() const {
    using V = Vector<T, kBytes>;
    constexpr int32_t kLanes = kBytes / sizeof(T);
    V weights[kMaxWindow];
    int64_t offsets[kMaxWindow];
    int32_t distances[kMaxWindow], count = 0;
    for (int32_t dy = -call.radius; dy <= call.radius; ++dy)
      for (int32_t dx = -call.radius; dx <= call.radius; ++dx) {
        if (dy == 0 && dx == 0) continue;
        offsets[count] = dy * layout.stride + dx;
        distances[count++] = dy * dy + dx * dx;
      }
    for (int64_t y = begin; y < end; ++y)
      for (int64_t x = 0; x < layout.width; x += kLanes) {
        const T* here = features + y * layout.stride + x;
        for (int32_t p = 0; p < count; ++p)
          weights[p] = kernels::window_weight<V>(kernels, here, here + offsets[p], layout.plane,
                                                 distances[p]);
        sums<V>(weights, offsets, count, y, x);
      }
  }

  template <class V>
  WSIS_INLINE void sums(const V* weights, const int64_t* offsets, int32_t count, int64_t y,
                        int64_t x) const {
    int32_t c = 0;
    for (; c + kGroup <= call.values; c += kGroup) group<V, kGroup>(weights, offsets, count, y, x, c);
    if (call.values & 4) group<V, 4>(weights, offsets, count, y, x, c);
    if (call.values & 2) group<V, 2>(weights, offsets, count, y, x, c + (call.values & 4));
    if (call.values & 1) group<V, 1>(weights, offsets, count, y, x, call.values - 1);
  }

  template <class V, int kValues>
  WSIS_INLINE void group(const V* weights, const int64_t* offsets, int32_t count, int64_t y,
                         int64_t x, int32_t c) const {
    const T* from = values + c * layout.plane + y * layout.stride + x;
    V sum[kValues] = {};
    for (int32_t p = 0; p < count; ++p) {
      const T* there = from + offsets[p];
      for (int g = 0; g < kValues; ++g) sum[g] += weights[p] * load<V>(there + g * layout.plane);
    }
    const int64_t left = std::min<int64_t>(layout.width - x, sizeof(V) / sizeof(T));
    T* to = result + (c * layout.height + y) * layout.width + x;
    for (int g = 0; g < kValues; ++g, to += layout.height * layout.width)
      std::memcpy(to, &sum[g], left * sizeof(T));
  }
};

}  // namespace

int64_t window_scratch(const WindowCall& call) {
  // A vector may begin at the last column and reach over the end of the last row.
  return (call.values + call.features) * Bordered(call).plane + kTile;
}

template <class T>
void window_filter(const T* values, const T* features, const WindowKernels<T>& kernels,
                   const WindowCall& call, T* scratch, T* result) {
  const Bordered layout(call);
  const int64_t pixels = layout.width * layout.height;
  T* bordered_features = scratch + call.values * layout.plane;
  for (int64_t b = 0; b < call.batch; ++b) {
    copy_bordered(values + b * call.values * pixels, call.values, layout, call.parts, scratch);
    copy_bordered(features + b * call.features * pixels, call.features, layout, call.parts,
                  bordered_features);
    parallel_for(layout.height, call.parts, [&](int, int64_t begin, int64_t end) {
      dispatch(WindowRows<T>{scratch + layout.first, bordered_features + layout.first, kernels,
                             call, layout, begin, end, result + b * call.values * pixels});
    });
  }
}

template void window_filter(const float*, const float*, const WindowKernels<float>&,
                            const WindowCall&, float*, float*);
template void window_filter(const double*, const double*, const WindowKernels<double>&,
                            const WindowCall&, double*, double*);

}  // namespace wsis::cpu
