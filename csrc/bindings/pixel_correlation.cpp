// Guards of pixel correlation and the shapes of its arrays.
//
// Sizes: B images, C maps, D features, N pixels. All arrays have one dtype, float32 or float64.
// `similarity` as in kernels::Similarity.
#include "cpu/pixel_correlation.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#if defined(WSIS_WITH_CUDA)
#include "cuda/pixel_correlation.h"
#endif

namespace wsis {
namespace {

using D = DType;
using MaybeArray = std::optional<Array>;

constexpr int64_t kMostPixels = 1 << 26, kMostChannels = 1 << 20;

template <class Body>
void with_float(const Array& array, Body body) {
  array.dtype == D::kFloat32 ? body(float{}) : body(double{});
}

cpu::Correlation make_call(int64_t batch, int64_t classes, int64_t depth, int64_t pixels,
                           int64_t parts) {
  require(batch >= 0 && classes >= 0 && depth >= 0 && pixels >= 0 && pixels < kMostPixels &&
              classes < kMostChannels && depth < kMostChannels,
          "there must be fewer than 2^26 pixels and 2^20 channels");
  require(parts >= 1 && parts <= INT32_MAX, "parts must be positive");
  cpu::Correlation call{};
  call.batch = batch;
  call.classes = static_cast<int32_t>(classes);
  call.depth = static_cast<int32_t>(depth);
  call.pixels = static_cast<int32_t>(pixels);
  call.parts = static_cast<int32_t>(parts);
  return call;
}

// What the arrays of both directions and devices have in common.
cpu::Correlation check(const Array& cams, const Array& features, const Array& saved,
                       int64_t similarity, double eps, double sum_eps, double inverse, double share,
                       int64_t parts, Device device) {
  require(cams.shape.size() == 3 && features.shape.size() == 3,
          "cams must be [B, C, N], features [B, D, N]");
  require(similarity == 0 || similarity == 1, "similarity must be 0 (relu) or 1 (softmax)");
  const auto& s = cams.shape;
  cpu::Correlation call = make_call(s[0], s[1], features.shape[1], s[2], parts);
  call.similarity = static_cast<kernels::Similarity>(similarity);
  call.eps = eps;
  call.sum_eps = sum_eps;
  call.inverse = inverse;
  call.share = share;
  expect(cams, "cams", device, {D::kFloat32, D::kFloat64}, s);
  expect(features, "features", device, {cams.dtype}, {s[0], features.shape[1], s[2]});
  expect(saved, "saved", device, {cams.dtype}, {s[0], s[1] + 1, s[2]});
  return call;
}

template <class T>
T* pointer_of(const MaybeArray& array) {
  return array ? array->data<T>() : nullptr;
}

// Elements of the scratch of the functions below.
int64_t pixel_correlation_scratch(int64_t batch, int64_t classes, int64_t depth, int64_t pixels,
                                  bool backward, int64_t parts) {
  return cpu::pixel_correlation_scratch(make_call(batch, classes, depth, pixels, parts), backward);
}

void pixel_correlation_cpu(const Array& cams,      // [B, C, N]
                           const Array& features,  // [B, D, N]
                           const Array& saved,     // [B, C + 1, N], out
                           const Array& result,    // [B, C, N], added to
                           const Array& scratch,   // [pixel_correlation_scratch]
                           int64_t similarity, double eps, double sum_eps, double inverse,
                           double share, int64_t parts) {
  const cpu::Correlation call = check(cams, features, saved, similarity, eps, sum_eps, inverse,
                                      share, parts, Device::kCpu);
  expect_output(saved, "saved", Device::kCpu, cams.dtype, saved.shape);
  expect_output(result, "result", Device::kCpu, cams.dtype, cams.shape);
  expect_output(scratch, "scratch", Device::kCpu, cams.dtype,
                {cpu::pixel_correlation_scratch(call, false)});
  if (saved.size() == 0) return;
  with_float(cams, [&](auto type) {
    using T = decltype(type);
    cpu::pixel_correlation(cams.data<const T>(), features.data<const T>(), call, scratch.data<T>(),
                           saved.data<T>(), result.data<T>());
  });
}

void check_gradients(const Array& gradient, const Array& cams, const Array& features,
                     const MaybeArray& cams_gradient, const MaybeArray& features_gradient,
                     Device device) {
  expect(gradient, "gradient", device, {cams.dtype}, cams.shape);
  if (cams_gradient)
    expect_output(*cams_gradient, "cams_gradient", device, cams.dtype, cams.shape);
  if (features_gradient)
    expect_output(*features_gradient, "features_gradient", device, cams.dtype, features.shape);
}

void pixel_correlation_backward_cpu(const Array& gradient,         // [B, C, N]
                                    const Array& cams,             // [B, C, N]
                                    const Array& features,         // [B, D, N]
                                    const Array& saved,            // [B, C + 1, N]
                                    const MaybeArray& cams_gradient,      // [B, C, N], added to
                                    const MaybeArray& features_gradient,  // [B, D, N], out
                                    const Array& scratch,  // [pixel_correlation_scratch]
                                    int64_t similarity, double eps, double sum_eps, double inverse,
                                    double share, int64_t parts) {
  const cpu::Correlation call = check(cams, features, saved, similarity, eps, sum_eps, inverse,
                                      share, parts, Device::kCpu);
  check_gradients(gradient, cams, features, cams_gradient, features_gradient, Device::kCpu);
  expect_output(scratch, "scratch", Device::kCpu, cams.dtype,
                {cpu::pixel_correlation_scratch(call, true)});
  if (saved.size() == 0) return;
  with_float(cams, [&](auto type) {
    using T = decltype(type);
    cpu::pixel_correlation_backward(gradient.data<const T>(), cams.data<const T>(),
                                    features.data<const T>(), saved.data<const T>(), call,
                                    scratch.data<T>(), pointer_of<T>(cams_gradient),
                                    pointer_of<T>(features_gradient));
  });
}

#if defined(WSIS_WITH_CUDA)
void check_grid(const cpu::Correlation& call) {
  require(call.classes <= 65535 * 63 && call.depth <= 65535 * 128, "there are too many channels");
}

void pixel_correlation_cuda(const Array& cams,      // [B, C, N]
                            const Array& features,  // [B, D, N]
                            const Array& saved,     // [B, C + 1, N], out
                            const Array& result,    // [B, C, N], added to
                            const Array& units,     // [B, D, N], scratch
                            const Array& norms,     // [B, N], scratch
                            int64_t similarity, double eps, double sum_eps, double inverse,
                            double share, uintptr_t stream) {
  const cpu::Correlation call =
      check(cams, features, saved, similarity, eps, sum_eps, inverse, share, 1, kGpu);
  check_grid(call);
  expect_output(saved, "saved", kGpu, cams.dtype, saved.shape);
  expect_output(result, "result", kGpu, cams.dtype, cams.shape);
  expect_output(units, "units", kGpu, cams.dtype, features.shape);
  expect_output(norms, "norms", kGpu, cams.dtype, {call.batch, call.pixels});
  if (cams.size() == 0) return;
  with_float(cams, [&](auto type) {
    using T = decltype(type);
    cuda::pixel_correlation(cams.data<const T>(), features.data<const T>(), call,
                            {cams.device_id, stream}, units.data<T>(), norms.data<T>(),
                            saved.data<T>(), result.data<T>());
  });
}

void pixel_correlation_backward_cuda(const Array& gradient,                // [B, C, N]
                                     const Array& cams,                    // [B, C, N]
                                     const Array& features,                // [B, D, N]
                                     const Array& saved,                   // [B, C + 1, N]
                                     const MaybeArray& cams_gradient,      // [B, C, N], added to
                                     const MaybeArray& features_gradient,  // [B, D, N], out
                                     const Array& units,                   // [B, D, N], scratch
                                     const Array& norms,                   // [B, N], scratch
                                     const Array& terms,  // [B, 2 (C + 1), N], scratch
                                     int64_t similarity, double eps, double sum_eps,
                                     double inverse, double share, uintptr_t stream) {
  const cpu::Correlation call =
      check(cams, features, saved, similarity, eps, sum_eps, inverse, share, 1, kGpu);
  check_grid(call);
  check_gradients(gradient, cams, features, cams_gradient, features_gradient, kGpu);
  expect_output(units, "units", kGpu, cams.dtype, features.shape);
  expect_output(norms, "norms", kGpu, cams.dtype, {call.batch, call.pixels});
  expect_output(terms, "terms", kGpu, cams.dtype,
                {call.batch, 2 * (int64_t{call.classes} + 1), call.pixels});
  if (cams.size() == 0) return;
  with_float(cams, [&](auto type) {
    using T = decltype(type);
    cuda::pixel_correlation_backward(gradient.data<const T>(), cams.data<const T>(),
                                     features.data<const T>(), saved.data<const T>(), call,
                                     {cams.device_id, stream}, units.data<T>(), norms.data<T>(),
                                     terms.data<T>(), pointer_of<T>(cams_gradient),
                                     pointer_of<T>(features_gradient));
  });
}
#endif

}  // namespace

void bind_pixel_correlation(py::module_& m) {
  m.def("pixel_correlation_scratch", &pixel_correlation_scratch);
  m.def("pixel_correlation_cpu", &pixel_correlation_cpu, NoGil());
  m.def("pixel_correlation_backward_cpu", &pixel_correlation_backward_cpu, NoGil());
#if defined(WSIS_WITH_CUDA)
  m.def("pixel_correlation_cuda", &pixel_correlation_cuda, NoGil());
  m.def("pixel_correlation_backward_cuda", &pixel_correlation_backward_cuda, NoGil());
#endif
}

}  // namespace wsis
