#include "cpu/memory.h"
#include "cpu/pixel_correlation.h"
#include "cpu/pixel_correlation_layout.h"

namespace wsis::cpu {
namespace {

template <class T>
struct Prepare {
  const T* gradient;  // [C, N]
  const T* cams;      // [C, N]
  const T* features;  // [D, N]
  const T* saved;     // [C + 1, N]
  const Correlation& call;
  const CorrelationLayout& layout;
  int64_t strip;
  T* image;

  // Source rows are (a, 1, h, t), factors of a pair in panels (h, t, a, 1); see
  // kernels/pixel_correlation.h.
  template <int kBytes>
  WSIS_INLINE void run() const {
    prepare_features(features, call, layout, strip, image);
    const int64_t n = call.pixels;
    const int32_t middle = call.classes + 1;
    for (int64_t j = strip * kStrip; j < (strip + 1) * kStrip; ++j) {
      T* source = image + layout.source + j * layout.sources;
      std::fill_n(source, layout.sources, T(0));
      if (j < n) {
        const T scale = saved[call.classes * n + j] * static_cast<T>(call.share);
        T* both = source + middle;
        for (int32_t c = 0; c < call.classes; ++c) {
          source[c] = cams[c * n + j];
          both[c] = gradient[c * n + j] * scale;
          both[call.classes] -= both[c] * saved[c * n + j];
        }
        source[call.classes] = T(1);
      }
      T* panel = image + layout.terms_panels + j / kPanel * kPanel * layout.terms + j % kPanel;
      for (int32_t c = 0; c < middle; ++c) {
        panel[c * kPanel] = source[middle + c];
        panel[(middle + c) * kPanel] = source[c];
      }
    }
  }
};

template <class T, Similarity kSimilarity>
struct Pair {
  const Correlation& call;
  const CorrelationLayout& layout;
  int64_t first, second;
  bool maps, units;  // what is wanted
  T* image;

  template <int kBytes>
  WSIS_INLINE void run() const {
    using Tile = CorrelationTile<T, kBytes>;
    using V = typename Tile::V;
    Tile tile(layout, first, second);
    const T inverse = static_cast<T>(call.inverse);
    tile.compare(image + layout.rows, layout.stride, image + layout.panels, call.depth,
                 [&](V z, V) __attribute__((always_inline)) {
                   return kernels::similarity<kSimilarity>(z, inverse);
                 });
    if (maps)
      tile.spread(image + layout.source + call.classes + 1, layout.sources,
                  static_cast<int32_t>(layout.classes), image + layout.maps_rows,
                  image + layout.maps_panels);
    if (!units) return;
    tile.compare(image + layout.source, layout.sources, image + layout.terms_panels,
                 static_cast<int32_t>(layout.terms),
                 [&](V sum, V s) __attribute__((always_inline)) {
                   return kernels::pair_gradient<kSimilarity>(s, sum, inverse);
                 });
    tile.spread(image + layout.rows, layout.stride, static_cast<int32_t>(layout.width),
                image + layout.units_rows, image + layout.units_panels);
  }
};

template <class T>
struct Finish {
  const Correlation& call;
  const CorrelationLayout& layout;
  int64_t strip;
  T* image;
  T* cams_gradient;
  T* features_gradient;

  template <int kBytes>
  WSIS_INLINE void run() const {
    const int64_t n = call.pixels;
    for (int64_t first = strip * kStrip; first < std::min(n, (strip + 1) * kStrip);
         first += kPanel) {
      const int64_t count = std::min<int64_t>(n - first, kPanel);
      if (cams_gradient) {
        const T* rows = image + layout.maps_rows + first * layout.classes;
        const T* panel = image + layout.maps_panels + first * layout.classes;
        for (int32_t c = 0; c < call.classes; ++c)
          for (int64_t j = 0; j < count; ++j)
            cams_gradient[c * n + first + j] +=
                rows[j * layout.classes + c] + panel[c * kPanel + j];
      }
      if (features_gradient) finish_features(first, count);
    }
  }

  WSIS_INLINE void finish_features(int64_t first, int64_t count) const {
    const T* rows = image + layout.units_rows + first * layout.width;
    T* sums = image + layout.units_panels + first * layout.width;
    const T* units = image + layout.panels + first * call.depth;
    const T* norms = image + layout.norms + first;
    T dots[kPanel] = {}, scale[kPanel] = {};
    for (int32_t k = 0; k < call.depth; ++k) {
      for (int64_t j = 0; j < kPanel; ++j) sums[k * kPanel + j] += rows[j * layout.width + k];
      for (int64_t j = 0; j < kPanel; ++j) dots[j] += sums[k * kPanel + j] * units[k * kPanel + j];
    }
    for (int64_t j = 0; j < kPanel; ++j) {
      dots[j] = kernels::along_feature(dots[j], norms[j]);
      scale[j] = static_cast<T>(1 / (static_cast<double>(norms[j]) + call.eps));
    }
    for (int32_t k = 0; k < call.depth; ++k) {
      T* to = features_gradient + k * int64_t{call.pixels} + first;
      for (int64_t j = 0; j < count; ++j)
        to[j] = sums[k * kPanel + j] * scale[j] - units[k * kPanel + j] * dots[j];
    }
  }
};

template <class T, Similarity kSimilarity>
void run(const T* gradient, const T* cams, const T* features, const T* saved,
         const Correlation& call, T* scratch, T* cams_gradient, T* features_gradient) {
  const CorrelationLayout layout(call, true);
  const int64_t together = images_at_once(call, layout), n = call.pixels;
  prefer_huge_pages(scratch, together * layout.size * static_cast<int64_t>(sizeof(T)));
  for (int64_t b = 0; b < call.batch; b += together) {
    const int64_t images = std::min(together, call.batch - b);
    const int64_t maps = call.classes * n, all = maps + n, units = call.depth * n;
    for_strips(call, layout, images, [&](int64_t i, int64_t strip) {
      dispatch(Prepare<T>{gradient + (b + i) * maps, cams + (b + i) * maps,
                          features + (b + i) * units, saved + (b + i) * all, call, layout, strip,
                          scratch + i * layout.size});
    });
    for_pairs(call, layout, images, [&](int64_t i, int64_t first, int64_t second) {
      dispatch(Pair<T, kSimilarity>{call, layout, first, second, cams_gradient != nullptr,
                                    features_gradient != nullptr, scratch + i * layout.size});
    });
    for_strips(call, layout, images, [&](int64_t i, int64_t strip) {
      dispatch(Finish<T>{call, layout, strip, scratch + i * layout.size,
                         cams_gradient ? cams_gradient + (b + i) * maps : nullptr,
                         features_gradient ? features_gradient + (b + i) * units : nullptr});
    });
  }
}

}  // namespace

template <class T>
void pixel_correlation_backward(const T* gradient, const T* cams, const T* features, const T* saved,
                                const Correlation& call, T* scratch, T* cams_gradient,
                                T* features_gradient) {
  auto* all = call.similarity == Similarity::kRelu ? &run<T, Similarity::kRelu>
                                                   : &run<T, Similarity::kSoftmax>;
  all(gradient, cams, features, saved, call, scratch, cams_gradient, features_gradient);
}

template void pixel_correlation_backward(const float*, const float*, const float*, const float*,
                                         const Correlation&, float*, float*, float*);
template void pixel_correlation_backward(const double*, const double*, const double*, const double*,
                                         const Correlation&, double*, double*, double*);

}  // namespace wsis::cpu
