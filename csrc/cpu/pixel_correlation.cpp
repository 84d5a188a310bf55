#include "cpu/pixel_correlation.h"

#include "cpu/memory.h"
#include "cpu/pixel_correlation_layout.h"

namespace wsis::cpu {
namespace {

template <class T>
struct Prepare {
  const T* cams;      // [C, N]
  const T* features;  // [D, N]
  const Correlation& call;
  const CorrelationLayout& layout;
  int64_t strip;
  T* image;

  template <int kBytes>
  WSIS_INLINE void run() const {
    prepare_features(features, call, layout, strip, image);
    T* source = image + layout.source + strip * kStrip * layout.sources;
    for (int64_t j = strip * kStrip; j < (strip + 1) * kStrip; ++j, source += layout.sources) {
      const bool inside = j < call.pixels;
      for (int32_t c = 0; c < layout.sources; ++c)
        source[c] = !inside || c > call.classes ? T(0)
                    : c == call.classes         ? T(1)
                                                : cams[c * int64_t{call.pixels} + j];
    }
  }
};

template <class T, Similarity kSimilarity>
struct Pair {
  const Correlation& call;
  const CorrelationLayout& layout;
  int64_t first, second;
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
    tile.spread(image + layout.source, layout.sources, static_cast<int32_t>(layout.classes),
                image + layout.maps_rows, image + layout.maps_panels);
  }
};

template <class T>
void finish(const Correlation& call, const CorrelationLayout& layout, int64_t strip, const T* image,
            T* saved, T* result) {
  const T share = static_cast<T>(call.share);
  const int64_t n = call.pixels;
  for (int64_t first = strip * kStrip; first < std::min(n, (strip + 1) * kStrip); first += kPanel) {
    const int64_t count = std::min<int64_t>(n - first, kPanel);
    const T* rows = image + layout.maps_rows + first * layout.classes;
    const T* panel = image + layout.maps_panels + first * layout.classes;
    T scale[kPanel];
    for (int32_t c = call.classes; c >= 0; --c) {
      for (int64_t j = 0; j < count; ++j) {
        const T sum = rows[j * layout.classes + c] + panel[c * kPanel + j];
        T* keep = saved + c * n + first + j;
        if (c == call.classes) {
          *keep = scale[j] = T(1) / (sum + static_cast<T>(call.sum_eps));
        } else {
          *keep = sum * scale[j];
          result[c * n + first + j] += share * *keep;
        }
      }
    }
  }
}

template <class T, Similarity kSimilarity>
void run(const T* cams, const T* features, const Correlation& call, T* scratch, T* saved,
         T* result) {
  const CorrelationLayout layout(call, false);
  const int64_t together = images_at_once(call, layout), n = call.pixels;
  prefer_huge_pages(scratch, together * layout.size * static_cast<int64_t>(sizeof(T)));
  for (int64_t b = 0; b < call.batch; b += together) {
    const int64_t images = std::min(together, call.batch - b);
    for_strips(call, layout, images, [&](int64_t i, int64_t strip) {
      dispatch(Prepare<T>{cams + (b + i) * call.classes * n, features + (b + i) * call.depth * n,
                          call, layout, strip, scratch + i * layout.size});
    });
    for_pairs(call, layout, images, [&](int64_t i, int64_t first, int64_t second) {
      dispatch(Pair<T, kSimilarity>{call, layout, first, second, scratch + i * layout.size});
    });
    for_strips(call, layout, images, [&](int64_t i, int64_t strip) {
      finish(call, layout, strip, scratch + i * layout.size,
             saved + (b + i) * (call.classes + 1) * n, result + (b + i) * call.classes * n);
    });
  }
}

}  // namespace

int64_t pixel_correlation_scratch(const Correlation& call, bool backward) {
  if (call.pixels == 0 || call.batch == 0) return 0;
  const CorrelationLayout layout(call, backward);
  return images_at_once(call, layout) * layout.size;
}

template <class T>
void pixel_correlation(const T* cams, const T* features, const Correlation& call, T* scratch,
                       T* saved, T* result) {
  if (call.similarity == Similarity::kRelu)
    run<T, Similarity::kRelu>(cams, features, call, scratch, saved, result);
  else
    run<T, Similarity::kSoftmax>(cams, features, call, scratch, saved, result);
}

template void pixel_correlation(const float*, const float*, const Correlation&, float*, float*,
                                float*);
template void pixel_correlation(const double*, const double*, const Correlation&, double*, double*,
                                double*);

}  // namespace wsis::cpu
