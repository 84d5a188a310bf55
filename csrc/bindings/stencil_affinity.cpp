// Guards of stencil affinities and the shapes of their arrays.
//
// Sizes: B images, F channels, K offsets, H W image. All floating arrays have one dtype, float32 or
// float64.
#include "cpu/stencil_affinity.h"

#include "bindings/stencil.h"
#if defined(WSIS_WITH_CUDA)
#include "cuda/stencil_affinity.h"
#endif

namespace wsis {
namespace {

using Offsets = std::vector<int64_t>;

// `input` is [B, F, H, W] or, without channels, [B, H, W]; `planes` are [B, K, H, W].
cpu::StencilCall check(const Array& input, const char* name, bool channels, const Array& planes,
                       const char* planes_name, const Offsets& offsets, int64_t parts,
                       Device device) {
  const size_t rank = channels ? 4 : 3;
  require(input.shape.size() == rank, "features must be [B, F, H, W], an edge map [B, H, W]");
  const int64_t height = input.shape[rank - 2], width = input.shape[rank - 1];
  const int64_t depth = channels ? input.shape[1] : 1;
  require(depth >= 1 && depth < kMostPixels, "there must be 1 to 2^26 channels");
  cpu::StencilCall call{};
  call.batch = input.shape[0];
  call.channels = static_cast<int32_t>(depth);
  call.offsets = check_offsets(offsets, height, width);
  call.planes = static_cast<int32_t>(offsets.size() / 2);
  call.height = static_cast<int32_t>(height);
  call.width = static_cast<int32_t>(width);
  call.parts = check_parts(parts);
  expect_float(input, name, device);
  expect(planes, planes_name, device, {input.dtype}, {call.batch, call.planes, height, width});
  return call;
}

void check_paths(const Offsets& offsets) {
  for (size_t k = 0; k + 1 < offsets.size(); k += 2)
    require(offsets[k] >= 0 &&
                (offsets[k] + 1) * (std::abs(offsets[k + 1]) + 1) <= kernels::kMostCells,
            "a path must go down or sideways and lie in at most 256 pixels");
}

void pair_affinity_cpu(const Array& features,  // [B, F, H, W]
                       const Array& affinity,  // [B, K, H, W], out
                       const Offsets& offsets, int64_t parts) {
  const auto call = check(features, "features", true, affinity, "affinity", offsets, parts,
                          Device::kCpu);
  expect_output(affinity, "affinity", Device::kCpu, features.dtype, affinity.shape);
  if (features.size() == 0) return;
  visit_float(features, [&](auto type) {
    using T = decltype(type);
    cpu::pair_affinity(features.data<const T>(), call, affinity.data<T>());
  });
}

void pair_affinity_backward_cpu(const Array& gradient,           // [B, K, H, W]
                                const Array& features,           // [B, F, H, W]
                                const Array& affinity,           // [B, K, H, W]
                                const Array& scratch,            // [B, K, H, W]
                                const Array& features_gradient,  // [B, F, H, W], out
                                const Offsets& offsets, int64_t parts) {
  const auto call = check(features, "features", true, affinity, "affinity", offsets, parts,
                          Device::kCpu);
  expect(gradient, "gradient", Device::kCpu, {features.dtype}, affinity.shape);
  expect_output(scratch, "scratch", Device::kCpu, features.dtype, affinity.shape);
  expect_output(features_gradient, "features_gradient", Device::kCpu, features.dtype,
                features.shape);
  if (features.size() == 0) return;
  visit_float(features, [&](auto type) {
    using T = decltype(type);
    cpu::pair_affinity_backward(gradient.data<const T>(), features.data<const T>(),
                                affinity.data<const T>(), call, scratch.data<T>(),
                                features_gradient.data<T>());
  });
}

void path_affinity_cpu(const Array& edge,      // [B, H, W]
                       const Array& chosen,    // [B, K, H, W] uint8, out
                       const Array& affinity,  // [B, K, H, W], out
                       const Offsets& offsets, int64_t parts) {
  check_paths(offsets);
  const auto call = check(edge, "edge", false, affinity, "affinity", offsets, parts, Device::kCpu);
  expect_output(chosen, "chosen", Device::kCpu, DType::kUint8, affinity.shape);
  expect_output(affinity, "affinity", Device::kCpu, edge.dtype, affinity.shape);
  if (edge.size() == 0) return;
  visit_float(edge, [&](auto type) {
    using T = decltype(type);
    cpu::path_affinity(edge.data<const T>(), call, chosen.data<uint8_t>(), affinity.data<T>());
  });
}

void path_affinity_backward_cpu(const Array& gradient,       // [B, K, H, W]
                                const Array& chosen,         // [B, K, H, W] uint8
                                const Array& edge_gradient,  // [B, H, W], out
                                const Offsets& offsets, int64_t parts) {
  check_paths(offsets);
  const auto call = check(edge_gradient, "edge_gradient", false, gradient, "gradient", offsets,
                          parts, Device::kCpu);
  expect(chosen, "chosen", Device::kCpu, {DType::kUint8}, gradient.shape);
  expect_output(edge_gradient, "edge_gradient", Device::kCpu, gradient.dtype, edge_gradient.shape);
  if (edge_gradient.size() == 0) return;
  visit_float(gradient, [&](auto type) {
    using T = decltype(type);
    cpu::path_affinity_backward(gradient.data<const T>(), chosen.data<const uint8_t>(), call,
                                edge_gradient.data<T>());
  });
}

#if defined(WSIS_WITH_CUDA)
void pair_affinity_cuda(const Array& features,  // [B, F, H, W]
                        const Array& affinity,  // [B, K, H, W], out
                        const Offsets& offsets, uintptr_t stream) {
  const auto call = check(features, "features", true, affinity, "affinity", offsets, 1, kGpu);
  expect_output(affinity, "affinity", kGpu, features.dtype, affinity.shape);
  check_grid(call.batch, call.height, call.width, call.planes);
  if (affinity.size() == 0) return;
  visit_float(features, [&](auto type) {
    using T = decltype(type);
    cuda::pair_affinity(features.data<const T>(), call, features.device_id, stream,
                        affinity.data<T>());
  });
}

void pair_affinity_backward_cuda(const Array& gradient,           // [B, K, H, W]
                                 const Array& features,           // [B, F, H, W]
                                 const Array& affinity,           // [B, K, H, W]
                                 const Array& features_gradient,  // [B, F, H, W], out
                                 const Offsets& offsets, uintptr_t stream) {
  const auto call = check(features, "features", true, affinity, "affinity", offsets, 1, kGpu);
  expect(gradient, "gradient", kGpu, {features.dtype}, affinity.shape);
  expect_output(features_gradient, "features_gradient", kGpu, features.dtype, features.shape);
  check_grid(call.batch, call.height, call.width, call.channels);
  if (features.size() == 0) return;
  visit_float(features, [&](auto type) {
    using T = decltype(type);
    cuda::pair_affinity_backward(gradient.data<const T>(), features.data<const T>(),
                                 affinity.data<const T>(), call, features.device_id, stream,
                                 features_gradient.data<T>());
  });
}

void path_affinity_cuda(const Array& edge,      // [B, H, W]
                        const Array& chosen,    // [B, K, H, W] uint8, out
                        const Array& affinity,  // [B, K, H, W], out
                        const Offsets& offsets, uintptr_t stream) {
  check_paths(offsets);
  const auto call = check(edge, "edge", false, affinity, "affinity", offsets, 1, kGpu);
  expect_output(chosen, "chosen", kGpu, DType::kUint8, affinity.shape);
  expect_output(affinity, "affinity", kGpu, edge.dtype, affinity.shape);
  check_grid(call.batch, call.height, call.width, call.planes);
  if (affinity.size() == 0) return;
  visit_float(edge, [&](auto type) {
    using T = decltype(type);
    cuda::path_affinity(edge.data<const T>(), call, edge.device_id, stream,
                        chosen.data<uint8_t>(), affinity.data<T>());
  });
}

void path_affinity_backward_cuda(const Array& gradient,       // [B, K, H, W]
                                 const Array& chosen,         // [B, K, H, W] uint8
                                 const Array& edge_gradient,  // [B, H, W], out
                                 const Offsets& offsets, uintptr_t stream) {
  check_paths(offsets);
  const auto call =
      check(edge_gradient, "edge_gradient", false, gradient, "gradient", offsets, 1, kGpu);
  expect(chosen, "chosen", kGpu, {DType::kUint8}, gradient.shape);
  expect_output(edge_gradient, "edge_gradient", kGpu, gradient.dtype, edge_gradient.shape);
  check_grid(call.batch, call.height, call.width, 1);
  if (edge_gradient.size() == 0) return;
  visit_float(gradient, [&](auto type) {
    using T = decltype(type);
    cuda::path_affinity_backward(gradient.data<const T>(), chosen.data<const uint8_t>(), call,
                                 gradient.device_id, stream, edge_gradient.data<T>());
  });
}
#endif

}  // namespace

void bind_stencil_affinity(py::module_& m) {
  m.def("pair_affinity_cpu", &pair_affinity_cpu, NoGil());
  m.def("pair_affinity_backward_cpu", &pair_affinity_backward_cpu, NoGil());
  m.def("path_affinity_cpu", &path_affinity_cpu, NoGil());
  m.def("path_affinity_backward_cpu", &path_affinity_backward_cpu, NoGil());
#if defined(WSIS_WITH_CUDA)
  m.def("pair_affinity_cuda", &pair_affinity_cuda, NoGil());
  m.def("pair_affinity_backward_cuda", &pair_affinity_backward_cuda, NoGil());
  m.def("path_affinity_cuda", &path_affinity_cuda, NoGil());
  m.def("path_affinity_backward_cuda", &path_affinity_backward_cuda, NoGil());
#endif
}

}  // namespace wsis
