#include "cpu/stencil_affinity.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace wsis::cpu {
namespace {

constexpr int32_t kChannels = 16;  // whose rows, of a few lines, stay in the first-level cache
constexpr int32_t kBlock = 256;    // pixels of a row

// Pixels [low, high) of a row whose partner by this offset lies in the image; none if low >= high.
struct Reach {
  int32_t low, high;

  Reach(const StencilCall& call, int32_t k, int32_t y)
      : low(std::max<int32_t>(0, -call.offsets.dx[k])),
        high(std::min<int32_t>(call.width, call.width - call.offsets.dx[k])) {
    const int32_t row = y + call.offsets.dy[k];
    if (row < 0 || row >= call.height) low = high = 0;
  }
};

int64_t pixels_of(const StencilCall& call) { return int64_t{call.height} * call.width; }

// Offsets that reach no pixel.
template <class T>
void clear_unused(const StencilCall& call, T* planes) {
  if (call.offsets.count == call.planes) return;
  int32_t next = 0;
  for (int32_t k = 0; k < call.planes; ++k) {
    if (next < call.offsets.count && call.offsets.plane[next] == k) {
      ++next;
      continue;
    }
    for (int64_t b = 0; b < call.batch; ++b)
      std::fill_n(planes + (b * call.planes + k) * pixels_of(call), pixels_of(call), T(0));
  }
}

}  // namespace

template <class T>
void pair_affinity(const T* features, const StencilCall& call, T* affinity) {
  const int64_t pixels = pixels_of(call);
  const T share = T(1) / static_cast<T>(call.channels);
  clear_unused(call, affinity);
  const auto rows = [&](int, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      const auto y = static_cast<int32_t>(row % call.height);
      const int64_t b = row / call.height;
      const T* own = features + b * call.channels * pixels + int64_t{y} * call.width;
      T* out = affinity + b * call.planes * pixels + int64_t{y} * call.width;
      for (int32_t k = 0; k < call.offsets.count; ++k)
        std::fill_n(out + call.offsets.plane[k] * pixels, call.width, T(0));
      for (int32_t first = 0; first < call.channels; first += kChannels) {
        const int32_t last = std::min(first + kChannels, call.channels);
        for (int32_t k = 0; k < call.offsets.count; ++k) {
          const Reach reach(call, k, y);
          const int64_t away = int64_t{call.offsets.dy[k]} * call.width + call.offsets.dx[k];
          T* sums = out + call.offsets.plane[k] * pixels;
          int32_t c = first;
          for (; c + 4 <= last; c += 4) {
            const T* a = own + c * pixels;
            const T* z = a + away;
            for (int32_t x = reach.low; x < reach.high; ++x)
              sums[x] += (kernels::absolute(a[x] - z[x]) +
                          kernels::absolute(a[x + pixels] - z[x + pixels])) +
                         (kernels::absolute(a[x + 2 * pixels] - z[x + 2 * pixels]) +
                          kernels::absolute(a[x + 3 * pixels] - z[x + 3 * pixels]));
          }
          for (; c < last; ++c) {
            const T* a = own + c * pixels;
            const T* z = a + away;
            for (int32_t x = reach.low; x < reach.high; ++x)
              sums[x] += kernels::absolute(a[x] - z[x]);
          }
        }
      }
      for (int32_t k = 0; k < call.offsets.count; ++k) {
        const Reach reach(call, k, y);
        T* sums = out + call.offsets.plane[k] * pixels;
        for (int32_t x = reach.low; x < reach.high; ++x)
          sums[x] = kernels::exp_nonpositive(-sums[x] * share);
      }
    }
  };
  parallel_loops(call.batch * call.height, call.parts, rows);
}

template <class T>
void pair_affinity_backward(const T* gradient, const T* features, const T* affinity,
                            const StencilCall& call, T* scratch, T* features_gradient) {
  const int64_t pixels = pixels_of(call), size = call.batch * call.planes * pixels;
  const T share = T(-1) / static_cast<T>(call.channels);
  parallel_loops(size, call.parts, [&](int, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    for (int64_t i = begin; i < end; ++i) scratch[i] = gradient[i] * affinity[i] * share;
  });
  const auto channels = [&](int, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* f = features + plane * pixels;
      const T* h = scratch + plane / call.channels * call.planes * pixels;
      T* to = features_gradient + plane * pixels;
      std::fill_n(to, pixels, T(0));
      for (int32_t y = 0; y < call.height; ++y)
        for (int32_t k = 0; k < call.offsets.count; ++k) {
          const Reach reach(call, k, y);
          const int64_t row = int64_t{y} * call.width;
          const int64_t away = int64_t{call.offsets.dy[k]} * call.width + call.offsets.dx[k];
          const T* from = h + call.offsets.plane[k] * pixels + row;
          const int32_t count = reach.high - reach.low;
          const T* a = f + row + reach.low;
          const T* z = a + away;
          T* own = to + row + reach.low;
          T* other = own + away;
          if (call.offsets.dy[k] != 0) {
            // Two rows, so nothing that is written is read.
#pragma GCC ivdep
            for (int32_t x = 0; x < count; ++x) {
              const T handed = kernels::toward(from[reach.low + x], a[x] - z[x]);
              own[x] += handed;
              other[x] -= handed;
            }
            continue;
          }
          for (int32_t x = 0; x < count; ++x)
            own[x] += kernels::toward(from[reach.low + x], a[x] - z[x]);
          for (int32_t x = 0; x < count; ++x)
            other[x] -= kernels::toward(from[reach.low + x], a[x] - z[x]);
        }
    }
  };
  parallel_loops(call.batch * call.channels, call.parts, channels);
}

template <class T>
void path_affinity(const T* edge, const StencilCall& call, uint8_t* chosen, T* affinity) {
  const int64_t pixels = pixels_of(call);
  clear_unused(call, affinity);
  clear_unused(call, chosen);
  const auto rows = [&](int, int64_t begin, int64_t end) WSIS_INLINE_LAMBDA {
    T largest[kBlock];
    int32_t cells[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      const auto y = static_cast<int32_t>(row % call.height);
      const int64_t b = row / call.height;
      for (int32_t k = 0; k < call.offsets.count; ++k) {
        const Reach reach(call, k, y);
        const int64_t at = ((b * call.planes + call.offsets.plane[k]) * call.height + y) * call.width;
        std::fill_n(affinity + at, call.width, T(0));
        std::fill_n(chosen + at, call.width, uint8_t{0});
        for (int32_t left = reach.low; left < reach.high; left += kBlock) {
          const int32_t count = std::min(kBlock, reach.high - left);
          const T* own = edge + b * pixels + int64_t{y} * call.width + left;
          bool first = true;
          kernels::for_path(
              call.offsets.dy[k], call.offsets.dx[k],
              [&](int32_t down, int32_t right, int32_t cell) WSIS_INLINE_LAMBDA {
                const T* e = own + int64_t{down} * call.width + right;
                if (first) {
                  std::copy_n(e, count, largest);
                  std::fill_n(cells, count, cell);
                  first = false;
                  return;
                }
                for (int32_t x = 0; x < count; ++x) {
                  const bool take = kernels::is_larger(e[x], largest[x]);
                  largest[x] = take ? e[x] : largest[x];
                  cells[x] = take ? cell : cells[x];
                }
              });
          for (int32_t x = 0; x < count; ++x) {
            affinity[at + left + x] = T(1) - largest[x];
            chosen[at + left + x] = static_cast<uint8_t>(cells[x]);
          }
        }
      }
    }
  };
  parallel_loops(call.batch * call.height, call.parts, rows);
}

template <class T>
void path_affinity_backward(const T* gradient, const uint8_t* chosen, const StencilCall& call,
                            T* edge_gradient) {
  const int64_t pixels = pixels_of(call);
  parallel_for(call.batch, call.parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      T* to = edge_gradient + b * pixels;
      std::fill_n(to, pixels, T(0));
      for (int32_t k = 0; k < call.offsets.count; ++k) {
        const int32_t dx = call.offsets.dx[k], across = std::abs(dx), side = dx < 0 ? -1 : 1;
        for (int32_t y = 0; y < call.height; ++y) {
          const Reach reach(call, k, y);
          const int64_t row = int64_t{y} * call.width;
          const int64_t at = (b * call.planes + call.offsets.plane[k]) * pixels + row;
          for (int32_t x = reach.low; x < reach.high; ++x) {
            const int32_t cell = chosen[at + x];
            const int32_t down = cell / (across + 1), right = cell % (across + 1) * side;
            if (down > call.offsets.dy[k]) continue;  // not a choice of path_affinity
            to[row + x + int64_t{down} * call.width + right] -= gradient[at + x];
          }
        }
      }
    }
  });
}

#define WSIS_INSTANTIATE(T)                                                                     \
  template void pair_affinity(const T*, const StencilCall&, T*);                                \
  template void pair_affinity_backward(const T*, const T*, const T*, const StencilCall&, T*, T*); \
  template void path_affinity(const T*, const StencilCall&, uint8_t*, T*);                      \
  template void path_affinity_backward(const T*, const uint8_t*, const StencilCall&, T*);
WSIS_INSTANTIATE(float)
WSIS_INSTANTIATE(double)
#undef WSIS_INSTANTIATE

}  // namespace wsis::cpu
