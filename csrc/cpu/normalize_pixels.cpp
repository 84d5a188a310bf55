#include "cpu/normalize_pixels.h"

#include <algorithm>

#include "cpu/simd.h"

namespace wsis::cpu {
namespace {

// Pixels are taken in blocks whose running maximum stays in the first-level cache. Blocks begin at
// the same pixels whatever the number of threads.
constexpr int32_t kBlock = 1024;

// Calls body(image, first pixel, count) for every block.
template <class Body>
void for_blocks(int64_t batch, int64_t n, int32_t parts, Body body) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  parallel_loops(batch * blocks, parts, [&](int, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block % blocks * kBlock;
      body(block / blocks, start, static_cast<int32_t>(std::min<int64_t>(kBlock, n - start)));
    }
  });
}

template <class T>
WSIS_INLINE void raise_best(const T* __restrict scores, int32_t size, T* __restrict best) {
  for (int32_t i = 0; i < size; ++i) best[i] = kernels::greater(best[i], scores[i]);
}

template <class T>
WSIS_INLINE void write_background(const T* __restrict best, int32_t size, kernels::Background kind,
                                T value, T* __restrict out) {
  for (int32_t i = 0; i < size; ++i) out[i] = kernels::background_of(kind, best[i], value);
}

template <class T>
WSIS_INLINE void count_best(const T* __restrict scores, int32_t size, T* __restrict best,
                          T* __restrict ties) {
  for (int32_t i = 0; i < size; ++i) {
    ties[i] = scores[i] > best[i] ? T(1) : scores[i] == best[i] ? ties[i] + T(1) : ties[i];
    best[i] = kernels::greater(best[i], scores[i]);
  }
}

template <class T>
WSIS_INLINE void share(const T* __restrict scores, int32_t size, const T* __restrict best,
                     const T* __restrict ties, const T* __restrict gradient,
                     const T* __restrict background, T* __restrict shares) {
  for (int32_t i = 0; i < size; ++i)
    shares[i] = gradient[i] - (scores[i] == best[i] ? background[i] / ties[i] : T(0));
}

template <class T>
WSIS_INLINE void raise_channel(const T* __restrict scores, T weight, int32_t size, int32_t k,
                             T* __restrict best, int32_t* __restrict channel) {
  for (int32_t i = 0; i < size; ++i) {
    const T score = weight * scores[i];
    channel[i] = score > best[i] ? k : channel[i];
    best[i] = kernels::greater(best[i], score);
  }
}

template <class T>
WSIS_INLINE void raise_absent(int32_t size, int32_t k, T* best, int32_t* channel) {
  for (int32_t i = 0; i < size; ++i) {
    channel[i] = T(0) > best[i] ? k : channel[i];
    best[i] = kernels::greater(best[i], T(0));
  }
}

}  // namespace

template <class T>
void add_background(kernels::Background kind, T value, const T* weights, T absent, int64_t batch,
                    int32_t num_classes, int64_t n, int32_t parts, T* scores) {
  for_blocks(batch, n, parts, [&](int64_t image, int64_t start, int32_t size) WSIS_INLINE_LAMBDA {
    T* out = scores + image * (num_classes + 1) * n + start;
    if (kind == kernels::Background::kConstant) {
      std::fill_n(out, size, value);
      return;
    }
    T best[kBlock];
    std::fill_n(best, size, -static_cast<T>(INFINITY));
    bool any_absent = false;
    for (int32_t k = 0; k < num_classes; ++k) {
      if (weights && weights[image * num_classes + k] == T(0))
        any_absent = true;
      else
        raise_best(out + (k + 1) * n, size, best);
    }
    if (any_absent)
      for (int32_t i = 0; i < size; ++i) best[i] = kernels::greater(best[i], absent);
    write_background(best, size, kind, value, out);
  });
}

template <class T>
void share_background(const T* gradient, const T* scores, int64_t batch, int32_t num_classes,
                      int64_t n, int32_t parts, T* shares) {
  for_blocks(batch, n, parts, [&](int64_t image, int64_t start, int32_t size) WSIS_INLINE_LAMBDA {
    const int64_t first = image * num_classes * n + start, background = first + image * n;
    T best[kBlock], ties[kBlock];
    std::fill_n(best, size, -static_cast<T>(INFINITY));
    std::fill_n(ties, size, T(1));
    for (int32_t k = 0; k < num_classes; ++k)
      count_best(scores + background + (k + 1) * n, size, best, ties);
    for (int32_t k = 0; k < num_classes; ++k)
      share(scores + background + (k + 1) * n, size, best, ties, gradient + background + (k + 1) * n,
            gradient + background, shares + first + k * n);
  });
}

template <class T>
void cams_to_labels(const T* scores, const T* weights, const int64_t* boxes, int64_t batch,
                    int32_t num_classes, int32_t rows, int32_t columns, LabelRule rule,
                    int32_t parts, int64_t* labels) {
  const int64_t n = static_cast<int64_t>(rows) * columns;
  const T low = static_cast<T>(rule.low), high = static_cast<T>(rule.high);
  for_blocks(batch, n, parts, [&](int64_t image, int64_t start, int32_t size) WSIS_INLINE_LAMBDA {
    T best[kBlock];
    int32_t channel[kBlock];
    std::fill_n(best, size, -static_cast<T>(INFINITY));
    std::fill_n(channel, size, 0);
    for (int32_t k = 0; k < num_classes; ++k) {
      const T weight = weights ? weights[image * num_classes + k] : T(1);
      if (weight == T(0))
        raise_absent(size, k, best, channel);
      else
        raise_channel(scores + (image * num_classes + k) * n + start, weight, size, k, best,
                      channel);
    }
    int64_t* out = labels + image * n + start;
    const int64_t* box = boxes ? boxes + 4 * image : nullptr;
    for (int32_t i = 0; i < size; ++i) {
      const int64_t y = (start + i) / columns, x = (start + i) % columns;
      const bool valid =
          box == nullptr || (y >= box[0] && y < box[1] && x >= box[2] && x < box[3]);
      out[i] = valid ? kernels::label_of(best[i], channel[i], low, high, rule.ignore_index)
                     : rule.ignore_index;
    }
  });
}

#define WSIS_INSTANTIATE(T)                                                                       \
  template void add_background(kernels::Background, T, const T*, T, int64_t, int32_t, int64_t,    \
                               int32_t, T*);                                                      \
  template void share_background(const T*, const T*, int64_t, int32_t, int64_t, int32_t, T*);      \
  template void cams_to_labels(const T*, const T*, const int64_t*, int64_t, int32_t, int32_t,     \
                               int32_t, LabelRule, int32_t, int64_t*);
WSIS_INSTANTIATE(float)
WSIS_INSTANTIATE(double)

}  // namespace wsis::cpu
