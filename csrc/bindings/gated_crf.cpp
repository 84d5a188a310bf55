// Guards of the windowed Gaussian filter, and the shapes of its arrays.
//
// Sizes: B images, C values, F feature channels, H W image, G kernels.
#include "cpu/gated_crf.h"

#include <pybind11/stl.h>

#include <numeric>

#include "bindings/bindings.h"
#if defined(WSIS_WITH_CUDA)
#include "cuda/gated_crf.h"
#endif

namespace wsis {
namespace {

using D = DType;
using Channels = std::vector<int64_t>;  // [G], of every kernel
using Numbers = std::vector<double>;    // [G]

cpu::WindowCall call_of(int64_t batch, int64_t values, int64_t features, int64_t height,
                        int64_t width, int64_t radius, int64_t parts) {
  require(radius >= 1 && radius <= kernels::kMaxRadius, "radius must be 1 to 32");
  require(parts >= 1, "parts must be positive");
  require(batch >= 0 && height >= 0 && width >= 0 && values >= 0 && features >= 0 &&
              values < (1 << 20) && features < (1 << 20) && height < (1 << 24) &&
              width < (1 << 24) && height * width <= int64_t{1} << 30,
          "height and width must be below 2^24, their product at most 2^30, channels below 2^20");
  return {batch,          int32_t(values), int32_t(features), int32_t(height),
          int32_t(width), int32_t(radius), int32_t(parts)};
}

cpu::WindowCall check_window(const Array& values, const Array& features, const Array& result,
                             int64_t radius, int64_t parts, Device device) {
  require(values.shape.size() == 4 && features.shape.size() == 4,
          "values must be [B, C, H, W] and features [B, F, H, W]");
  const auto& s = values.shape;
  expect(values, "values", device, {D::kFloat32, D::kFloat64}, s);
  expect(features, "features", device, {values.dtype}, {s[0], features.shape[1], s[2], s[3]});
  expect_output(result, "result", device, values.dtype, s);
  return call_of(s[0], s[1], features.shape[1], s[2], s[3], radius, parts);
}

template <class T>
kernels::WindowKernels<T> kernels_of(const Channels& channels, const Numbers& weights,
                                     const Numbers& closeness, int64_t features) {
  require(channels.size() >= 1 && channels.size() <= kernels::kMaxWindowKernels,
          "there must be 1 to 8 kernels");
  require(weights.size() == channels.size() && closeness.size() == channels.size(),
          "channels, weights and closeness must be as many as the kernels");
  kernels::WindowKernels<T> made{};
  made.count = static_cast<int32_t>(channels.size());
  for (size_t k = 0; k < channels.size(); ++k) {
    require(channels[k] >= 0 && closeness[k] >= 0, "channels and closeness must be 0 or more");
    made.channels[k] = static_cast<int32_t>(channels[k]);
    made.weight[k] = static_cast<T>(weights[k]);
    made.closeness[k] = static_cast<T>(closeness[k]);
  }
  require(std::accumulate(channels.begin(), channels.end(), int64_t{0}) == features,
          "channels must add up to the channels of the features");
  return made;
}

template <class Body>
void with_float(const Array& array, Body body) {
  array.dtype == D::kFloat32 ? body(float{}) : body(double{});
}

// Elements of the scratch of the function below.
int64_t window_filter_scratch(int64_t values, int64_t features, int64_t height, int64_t width,
                              int64_t radius) {
  return cpu::window_scratch(call_of(1, values, features, height, width, radius, 1));
}

void window_filter_cpu(const Array& values,    // [B, C, H, W] float32 or float64
                       const Array& features,  // [B, F, H, W]
                       const Array& result,    // [B, C, H, W], out
                       const Array& scratch,   // [window_filter_scratch]
                       const Channels& channels, const Numbers& weights, const Numbers& closeness,
                       int64_t radius, int64_t parts) {
  const cpu::WindowCall call = check_window(values, features, result, radius, parts, Device::kCpu);
  expect_output(scratch, "scratch", Device::kCpu, values.dtype, {cpu::window_scratch(call)});
  with_float(values, [&](auto type) {
    using T = decltype(type);
    const auto made = kernels_of<T>(channels, weights, closeness, call.features);
    if (values.size() > 0)
      cpu::window_filter(values.data<const T>(), features.data<const T>(), made, call,
                         scratch.data<T>(), result.data<T>());
  });
}

#if defined(WSIS_WITH_CUDA)
void window_filter_cuda(const Array& values,    // [B, C, H, W] float32 or float64
                        const Array& features,  // [B, F, H, W]
                        const Array& result,    // [B, C, H, W], out
                        const Channels& channels, const Numbers& weights, const Numbers& closeness,
                        int64_t radius, uintptr_t stream) {
  const cpu::WindowCall call = check_window(values, features, result, radius, 1, kGpu);
  with_float(values, [&](auto type) {
    using T = decltype(type);
    const auto made = kernels_of<T>(channels, weights, closeness, call.features);
    if (values.size() > 0)
      cuda::window_filter(values.data<const T>(), features.data<const T>(), made, call,
                          result.data<T>(), values.device_id, stream);
  });
}
#endif

}  // namespace

void bind_gated_crf(py::module_& m) {
  m.def("window_filter_scratch", &window_filter_scratch);
  m.def("window_filter_cpu", &window_filter_cpu, NoGil());
#if defined(WSIS_WITH_CUDA)
  m.def("window_filter_cuda", &window_filter_cuda, NoGil());
#endif
}

}  // namespace wsis
