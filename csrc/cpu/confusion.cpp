#include "cpu/confusion.h"

#include <algorithm>

#include "cpu/simd.h"
#include "kernels/confusion.h"

namespace wsis::cpu {
namespace {

using kernels::kIgnored;
using kernels::kOutOfRange;

// Pixels are taken in blocks whose intermediate values stay in the first-level cache.
constexpr int32_t kBlock = 1024;

template <class T>
WSIS_INLINE void target_codes(const T* values, int32_t n, int32_t num_classes, int64_t ignore_index,
                            int32_t* codes) {
  for (int32_t i = 0; i < n; ++i)
    codes[i] = kernels::class_code(values[i], num_classes, ignore_index);
}

template <class T>
WSIS_INLINE void pred_codes(const T* values, int32_t n, int32_t num_classes, int32_t* codes) {
  for (int32_t i = 0; i < n; ++i) codes[i] = kernels::class_code(values[i], num_classes);
}

// Calls body with a typed pointer to element `offset`.
template <class Body>
WSIS_INLINE void with_type(ClassMap map, int64_t offset, Body body) {
  switch (map.dtype) {
    case DType::kUint8:
      return body(static_cast<const uint8_t*>(map.data) + offset);
    case DType::kInt16:
      return body(static_cast<const int16_t*>(map.data) + offset);
    case DType::kInt32:
      return body(static_cast<const int32_t*>(map.data) + offset);
    default:
      return body(static_cast<const int64_t*>(map.data) + offset);
  }
}

WSIS_INLINE void load_targets(ClassMap map, int64_t offset, int32_t n, int32_t num_classes,
                              int64_t ignore_index, int32_t* codes) {
  with_type(map, offset, [&](const auto* values) WSIS_INLINE_LAMBDA {
    target_codes(values, n, num_classes, ignore_index, codes);
  });
}

WSIS_INLINE void load_preds(ClassMap map, int64_t offset, int32_t n, int32_t num_classes,
                            int32_t* codes) {
  with_type(map, offset, [&](const auto* values) WSIS_INLINE_LAMBDA {
    pred_codes(values, n, num_classes, codes);
  });
}

// The two status cells: how many, and pixels left at the first (so that 0 means none).
void report_bad(int64_t* status, int64_t left) {
  status[0] += 1;
  status[1] = std::max(status[1], left);
}

void merge_status(const int64_t* part, int64_t* status) {
  status[0] += part[0];
  status[1] = std::max(status[1], part[1]);
}

// kernels::take_better for a block, the channels outside and the pixels inside.
template <class T>
WSIS_INLINE void best_channel(const T* scores, int64_t stride, int32_t num_channels, int32_t n,
                            T* __restrict best, int32_t* __restrict channel) {
  for (int32_t i = 0; i < n; ++i) {
    best[i] = kernels::kLowest;
    channel[i] = 0;
  }
  for (int32_t k = 0; k < num_channels; ++k) {
    const T* plane = scores + k * stride;
    for (int32_t i = 0; i < n; ++i) kernels::take_better(plane[i], k, best[i], channel[i]);
  }
}

// kernels::bucket_of for a block, the steps outside and the pixels inside.
template <class T>
WSIS_INLINE void buckets(const T* thresholds, int32_t num_thresholds, const T* __restrict best,
                       int32_t n, int32_t* __restrict bucket) {
  for (int32_t i = 0; i < n; ++i) bucket[i] = 0;
  for (int32_t left = num_thresholds; left > 0;) {
    const int32_t half = (left + 1) / 2;
    for (int32_t i = 0; i < n; ++i)
      bucket[i] = kernels::bucket_step(bucket[i], half, thresholds, best[i]);
    left -= half;
  }
}

}  // namespace

void confusion_matrix(ClassMap pred, ClassMap target, int64_t n, int32_t num_classes,
                      int64_t ignore_index, int32_t parts, int64_t* scratch, int64_t* tally) {
  const int64_t cells = static_cast<int64_t>(num_classes) * num_classes;
  parallel_loops(n, parts, [&](int part, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    int64_t* counts = scratch + part * (cells + 2);
    std::fill_n(counts, cells + 2, 0);
    int32_t targets[kBlock], preds[kBlock];
    for (int64_t start = begin; start < end; start += kBlock) {
      const int32_t size = static_cast<int32_t>(std::min<int64_t>(kBlock, end - start));
      load_targets(target, start, size, num_classes, ignore_index, targets);
      load_preds(pred, start, size, num_classes, preds);
      for (int32_t i = 0; i < size; ++i) {
        if (targets[i] == kIgnored) continue;
        if (targets[i] == kOutOfRange || preds[i] == kOutOfRange)
          report_bad(counts + cells, n - start - i);
        else
          ++counts[kernels::cell_index(targets[i], preds[i], num_classes)];
      }
    }
  });
  std::fill_n(tally, cells + 2, 0);
  for (int part = 0; part < parts; ++part) {
    const int64_t* counts = scratch + part * (cells + 2);
    for (int64_t i = 0; i < cells; ++i) tally[i] += counts[i];
    merge_status(counts + cells, tally + cells);
  }
}

template <class T>
void threshold_curve(const T* scores, ClassMap target, const T* thresholds,
                     const int64_t* class_ids, int64_t batch, int32_t num_channels, int64_t n,
                     int32_t num_thresholds, int32_t num_classes, int64_t ignore_index,
                     int32_t parts, int64_t* scratch, int64_t* tally) {
  const int32_t row = num_thresholds + 1;
  const int64_t cells = static_cast<int64_t>(num_classes) * num_channels * row;
  const int64_t blocks = (n + kBlock - 1) / kBlock;  // an image ends its last block early
  parallel_loops(batch * blocks, parts,
                 [&](int part, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    int64_t* counts = scratch + part * (cells + 2);
    std::fill_n(counts, cells + 2, 0);
    T best[kBlock];
    int32_t channel[kBlock], bucket[kBlock], targets[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / blocks, start = block % blocks * kBlock;
      const int32_t size = static_cast<int32_t>(std::min<int64_t>(kBlock, n - start));
      best_channel(scores + image * num_channels * n + start, n, num_channels, size, best, channel);
      buckets(thresholds, num_thresholds, best, size, bucket);
      load_targets(target, image * n + start, size, num_classes, ignore_index, targets);
      for (int32_t i = 0; i < size; ++i) {
        if (targets[i] == kIgnored) continue;
        if (targets[i] == kOutOfRange)
          report_bad(counts + cells, batch * n - (image * n + start + i));
        else
          ++counts[kernels::histogram_index(targets[i], channel[i], bucket[i], num_channels,
                                            num_thresholds)];
      }
    }
  });

  const int64_t curve = static_cast<int64_t>(num_thresholds) * num_classes * num_classes;
  std::fill_n(tally, curve + 2, 0);
  for (int part = 1; part < parts; ++part)
    for (int64_t i = 0; i < cells; ++i) scratch[i] += scratch[part * (cells + 2) + i];
  for (int part = 0; part < parts; ++part)
    merge_status(scratch + part * (cells + 2) + cells, tally + curve);
  for (int32_t y = 0; y < num_classes; ++y)
    for (int32_t k = 0; k < num_channels; ++k)
      kernels::spread_row(scratch + (static_cast<int64_t>(y) * num_channels + k) * row, y,
                          static_cast<int32_t>(class_ids[k]), num_classes, num_thresholds,
                          [&](int64_t cell, int64_t count) { tally[cell] += count; });
}

template void threshold_curve(const float*, ClassMap, const float*, const int64_t*, int64_t,
                              int32_t, int64_t, int32_t, int32_t, int64_t, int32_t, int64_t*,
                              int64_t*);
template void threshold_curve(const double*, ClassMap, const double*, const int64_t*, int64_t,
                              int32_t, int64_t, int32_t, int32_t, int64_t, int32_t, int64_t*,
                              int64_t*);

}  // namespace wsis::cpu
