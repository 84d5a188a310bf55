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
    Row at{};
    for (int32_t p = 0; p < count; ++p) at.position[p] = position[p];
    for (int64_t row = begin; row < end; ++row) {
      at.y = static_cast<int32_t>(row % layout.height);
      tap_offsets(taps, layout, at.y, 0, at.here);
      if (kKind == Kind::kVarm) tap_offsets(taps, layout, at.y, 1, at.below);
      const T* image = padded + row / layout.height * channels * layout.plane;
      T* to = packed + row * tiles * count * kTile;
      for (int64_t x = 0; x < tiles * kTile; x += kLanes)
        pixels<V>(image, at, static_cast<int32_t>(x), count,
                  to + x / kTile * count * kTile + x % kTile);
    }
  }

  // Where the taps of a row lie, and what PAR adds to them.
  struct Row {
    int64_t here[kMaxTaps], below[kMaxTaps];
    T position[kMaxTaps];
    int32_t y;
  };

  template <class V>
  WSIS_INLINE void pixels(const T* image, const Row& at, int32_t x, int32_t count, T* to) const {
    V away[kMaxTaps], variation[kKind == Kind::kVarm ? kMaxTaps : 1];
    const V column = lane_numbers<V, T>() + static_cast<T>(x);
    const T* plane = image + x;
    for (int32_t c = 0; c < channels; c += 3, plane += 3 * layout.plane) {
      if (channels - c >= 3)
        measure<V, 3>(plane, at, count, column, c == 0, away, variation);
      else if (channels - c == 2)
        measure<V, 2>(plane, at, count, column, c == 0, away, variation);
      else
        measure<V, 1>(plane, at, count, column, c == 0, away, variation);
    }
    soften(away, variation, count, column, at, to);
  }

  // Sums of distances and variations over some channels; `start` sets, otherwise they are added.
  template <class V, int kChannels>
  WSIS_INLINE void measure(const T* plane, const Row& at, int32_t count, V column, bool start,
                           V* away, V* variation) const {
    const int64_t stride = layout.plane;
    V centre[kChannels], inverse[kChannels];
    kernels::Spread<V> spread[kChannels];  // together, as each alone waits for its own sums
    for (int c = 0; c < kChannels; ++c)
      spread[c] = kernels::Spread<V>(load<V>(plane + c * stride + at.here[0]));
    for (int32_t p = 1; p < count; ++p)
      for (int c = 0; c < kChannels; ++c)
        spread[c].add(load<V>(plane + c * stride + at.here[p]));
    for (int c = 0; c < kChannels; ++c) {
      centre[c] = load<V>(plane + c * stride + at.y * layout.stride);
      if (kKind == Kind::kPamr) spread[c].add(centre[c], static_cast<T>(taps.count));
      const int32_t samples = kKind == Kind::kPamr ? count + taps.count : count;
      inverse[c] = kernels::inverse_scale<kKind>(spread[c].deviation(samples));
    }
    for (int32_t p = 0; p < count; ++p) {
      V sum = start ? V{} : away[p];
      for (int c = 0; c < kChannels; ++c)
        sum += kernels::distance<kKind>(load<V>(plane + c * stride + at.here[p]), centre[c],
                                        inverse[c]);
      away[p] = sum;
    }
    if constexpr (kKind == Kind::kVarm) {
      const T rows = at.y + 1 < layout.height ? T(1) : T(0);
      const V columns = column < static_cast<T>(layout.width - 1) ? V{} + T(1) : V{};
      for (int32_t p = 0; p < count; ++p) {
        V sum = start ? V{} : variation[p];
        for (int c = 0; c < kChannels; ++c) {
          const T* here = plane + c * stride + at.here[p];
          sum += kernels::variation(load<V>(here), load<V>(plane + c * stride + at.below[p]),
                                    load<V>(here + 1), rows, columns);
        }
        variation[p] = sum;
      }
    }
  }

  template <class V>
  WSIS_INLINE void soften(V* away, V* variation, int32_t count, V column, const Row& at,
                          T* to) const {
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
      if (kKind == Kind::kPar) weight += at.position[p];
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
