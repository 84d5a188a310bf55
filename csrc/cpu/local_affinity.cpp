#include "cpu/local_affinity_layout.h"

namespace wsis::cpu {
namespace {

using kernels::Kind;

template <class V>
WSIS_INLINE V normalised(V* values, int32_t count, V lowest) {
  using T = typename kernels::Element<V>::Scalar;
  V sum{};
  for (int32_t p = 0; p < count; ++p) {
    values[p] = kernels::exp_nonpositive(lowest - values[p]);
    sum += values[p];
  }
  return T(1) / sum;
}

// Weights of some rows. For every vector of pixels the distances of all taps stay in the
// first-level cache: two passes over the neighbours per channel, then a softmax.
template <class T, Kind kKind>
struct AffinityRows {
  const T* padded;    // [B, channels] planes, at the first pixel
  const kernels::Position<T>& position;
  int32_t channels;
  const Taps& taps;
  const Padded& layout;
  int64_t begin, end;  // of the B * H rows
  T* packed;

  template <int kBytes>
  WSIS_INLINE void run() const {
    using V = Vector<T, kBytes>;
    constexpr int32_t kLanes = kBytes / sizeof(T);
    const int32_t count = taps.count * kDirections;
    const int64_t tiles = tiles_of(layout.width);
    int64_t here[kMaxTaps], below[kMaxTaps];
    for (int64_t row = begin; row < end; ++row) {
      const int32_t y = static_cast<int32_t>(row % layout.height);
      const T* image = padded + row / layout.height * channels * layout.plane;
      tap_offsets(taps, layout, y, 0, here);
      if (kKind == Kind::kVarm) tap_offsets(taps, layout, y, 1, below);
      T* to = packed + row * tiles * count * kTile;
      for (int64_t x = 0; x < tiles * kTile; x += kLanes)
        pixels<V>(image, here, below, y, static_cast<int32_t>(x), count,
                  to + x / kTile * count * kTile + x % kTile);
    }
  }

  template <class V>
  WSIS_INLINE void pixels(const T* image, const int64_t* here, const int64_t* below, int32_t y,
                          int32_t x, int32_t count, T* to) const {
    V away[kMaxTaps], variation[kKind == Kind::kVarm ? kMaxTaps : 1];
    const T* plane = image + x;
    const V column = lane_numbers<V, T>() + static_cast<T>(x);
    for (int32_t c = 0; c < channels; ++c, plane += layout.plane) {
      const V centre = load<V>(plane + y * layout.stride);
      kernels::Spread<V> spread(load<V>(plane + here[0]));
      for (int32_t p = 1; p < count; ++p) spread.add(load<V>(plane + here[p]));
      int32_t samples = count;
      if (kKind == Kind::kPamr) {
        spread.add(centre, static_cast<T>(taps.count));
        samples += taps.count;
      }
      const V inverse = kernels::inverse_scale<kKind>(spread.deviation(samples));
      for (int32_t p = 0; p < count; ++p) {
        const V far = kernels::distance<kKind>(load<V>(plane + here[p]), centre, inverse);
        away[p] = c == 0 ? far : away[p] + far;
      }
      if constexpr (kKind == Kind::kVarm) {
        const T rows = y + 1 < layout.height ? T(1) : T(0);
        const V columns = column < static_cast<T>(layout.width - 1) ? V{} + T(1) : V{};
        for (int32_t p = 0; p < count; ++p) {
          const V value = load<V>(plane + here[p]);
          const V change =
              kernels::variation(value, load<V>(plane + below[p]), load<V>(plane + here[p] + 1), rows,
                                 columns);
          variation[p] = c == 0 ? change : variation[p] + change;
        }
      }
    }
    soften(away, variation, count, column, to);
  }

  template <class V>
  WSIS_INLINE void soften(V* away, V* variation, int32_t count, V column, T* to) const {
    const T share = T(1) / static_cast<T>(channels);
    V lowest = away[0] * share;
    for (int32_t p = 0; p < count; ++p) {
      away[p] *= share;
      lowest = kernels::smaller(lowest, away[p]);
    }
    const V factor = normalised(away, count, lowest);
    V second{};
    if constexpr (kKind == Kind::kVarm) {
      V highest = -variation[0] * share;
      for (int32_t p = 0; p < count; ++p) {
        variation[p] *= -share;
        highest = kernels::smaller(highest, variation[p]);
      }
      second = normalised(variation, count, highest) * kernels::kSecondShare<T>;
    }
    for (int32_t p = 0; p < count; ++p) {
      V weight = away[p] * factor;
      if (kKind == Kind::kPar) weight += position[p];
      if constexpr (kKind == Kind::kVarm) weight -= variation[p] * second;
      weight = column < static_cast<T>(layout.width) ? weight : V{};
      store(to + p * kTile, weight);
    }
  }
};

}  // namespace

int64_t padded_size(int64_t planes, const AffinityCall& call) {
  return Padded(call, taps_of(call)).size(planes);
}

template <class T>
void local_affinity(const T* image, int64_t batch, int32_t channels, const AffinityCall& call,
                    T* scratch, T* packed) {
  const Taps taps = taps_of(call);
  const Padded layout(call, taps);
  kernels::Position<T> position{};
  if (call.kind == Kind::kPar)
    position = kernels::make_position<T>(call.position, call.num_dilations);
  prefer_huge_pages(packed, tiles_of(call.width) * kTile * taps.count * kDirections * call.height *
                                batch * static_cast<int64_t>(sizeof(T)));
  copy_padded(image, batch * channels, layout, true, call.parts, scratch);
  parallel_for(batch * call.height, call.parts, [&](int, int64_t begin, int64_t end) {
    const T* first = scratch + layout.lead;
    switch (call.kind) {
      case Kind::kPamr:
        return dispatch(AffinityRows<T, Kind::kPamr>{first, position, channels, taps, layout, begin,
                                                     end, packed});
      case Kind::kPar:
        return dispatch(AffinityRows<T, Kind::kPar>{first, position, channels, taps, layout, begin,
                                                    end, packed});
      case Kind::kVarm:
        return dispatch(AffinityRows<T, Kind::kVarm>{first, position, channels, taps, layout, begin,
                                                     end, packed});
    }
  });
}

template void local_affinity(const float*, int64_t, int32_t, const AffinityCall&, float*, float*);
template void local_affinity(const double*, int64_t, int32_t, const AffinityCall&, double*,
                             double*);

}  // namespace wsis::cpu
