// Guards of local affinity and propagation, and the shapes of their arrays.
//
// Sizes: B images, N planes, K image channels, D dilations, P = 8 D taps, H W image.
#include "cpu/local_affinity.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#if defined(WSIS_WITH_CUDA)
#include "cuda/local_affinity.h"
#endif

namespace wsis {
namespace {

using D = DType;
using Dilations = std::vector<int64_t>;

constexpr int64_t kMostPixels = 1 << 24;  // of a side: column numbers are compared in float

struct Call {
  cpu::AffinityCall call;
  int64_t taps, tiles;
};

Call make_call(const Dilations& dilations, int64_t height, int64_t width, int64_t parts = 1) {
  require(!dilations.empty() && dilations.size() <= kernels::kMaxDilations,
          "dilations must be 1 to 64 numbers");
  for (int64_t dilation : dilations) require(dilation >= 1, "dilations must be positive");
  require(parts >= 1, "parts must be positive");
  require(height >= 0 && width >= 0 && height < kMostPixels && width < kMostPixels &&
              height * width <= int64_t{1} << 30,
          "height and width must be below 2^24 and their product at most 2^30");
  const auto count = static_cast<int32_t>(dilations.size());
  Call c{};
  c.call.dilations = dilations.data();
  c.call.num_dilations = count;
  c.call.height = static_cast<int32_t>(height);
  c.call.width = static_cast<int32_t>(width);
  c.call.parts = static_cast<int32_t>(parts);
  c.taps = count * int64_t{kernels::kDirections};
  c.tiles = (width + cpu::kTile - 1) / cpu::kTile;
  return c;
}

// `kind` as in kernels::Kind; `position` [P] for PAR, else empty.
void set_kind(Call& c, int64_t kind, const std::vector<double>& position) {
  require(kind >= 0 && kind <= 2, "kind must be 0 (PAMR), 1 (PAR) or 2 (VARM)");
  c.call.kind = static_cast<kernels::Kind>(kind);
  require(c.call.kind != kernels::Kind::kPar || static_cast<int64_t>(position.size()) == c.taps,
          "position must be one number per tap");
  c.call.position = position.data();
}

void expect_rank(const Array& array, const char* message) {
  require(array.shape.size() == 4, message);
}

void check_masks(const Array& masks, const Array& packed, const std::optional<Array>& counts,
                 const Array& result, int64_t iterations, Device device,
                 const std::vector<int64_t>& packed_shape) {
  require(iterations >= 0 && iterations <= INT32_MAX, "iterations must be in [0, 2^31)");
  expect_float(masks, "masks", device);
  expect(packed, "packed", device, {masks.dtype}, packed_shape);
  if (counts) expect(*counts, "counts", device, {D::kInt32}, {masks.shape[0]});
  expect_output(result, "result", device, masks.dtype, masks.shape);
}

const int32_t* pointer_of(const std::optional<Array>& counts) {
  return counts ? counts->data<const int32_t>() : nullptr;
}

// Elements of the scratch of propagate_cpu.
int64_t propagate_scratch_size(int64_t planes, int64_t height, int64_t width,
                               const Dilations& dilations, bool transposed, int64_t parts) {
  const Call c = make_call(dilations, height, width, parts);
  if (height * width == 0) return 0;
  return cpu::propagate_scratch(static_cast<int32_t>(planes), transposed, c.call);
}

// Elements of the scratch of local_affinity_cpu, for B * K planes.
int64_t local_affinity_padded_size(int64_t planes, int64_t height, int64_t width,
                                   const Dilations& dilations) {
  const Call c = make_call(dilations, height, width);
  return height * width == 0 ? 0 : cpu::padded_size(planes, c.call);
}

void local_affinity_cpu(const Array& image,    // [B, K, H, W] float32 or float64
                        const Array& packed,   // [B, H, ceil(W / 16), P, 16], out
                        const Array& scratch,  // [padded_size(B * K)]
                        int64_t kind, const Dilations& dilations,
                        const std::vector<double>& position, int64_t parts) {
  expect_rank(image, "image must be [B, K, H, W]");
  const auto& s = image.shape;
  require(s[1] >= 1, "image must have channels");
  Call c = make_call(dilations, s[2], s[3], parts);
  set_kind(c, kind, position);
  expect_float(image, "image", Device::kCpu);
  expect_output(packed, "packed", Device::kCpu, image.dtype,
                {s[0], s[2], c.tiles, c.taps, cpu::kTile});
  if (image.size() == 0) return;
  expect_output(scratch, "scratch", Device::kCpu, image.dtype,
                {cpu::padded_size(s[0] * s[1], c.call)});
  visit_float(image, [&](auto type) {
    using T = decltype(type);
    cpu::local_affinity(image.data<const T>(), s[0], static_cast<int32_t>(s[1]), c.call,
                        scratch.data<T>(), packed.data<T>());
  });
}

void propagate_cpu(const Array& masks,                  // [B, N, H, W] float32 or float64
                   const Array& packed,                 // [B, H, ceil(W / 16), P, 16]
                   const std::optional<Array>& counts,  // [B] int32
                   const Array& result,                 // [B, N, H, W], out
                   const Array& scratch,                // [propagate_scratch_size]
                   const Dilations& dilations, int64_t iterations, bool transposed, int64_t parts) {
  expect_rank(masks, "masks must be [B, N, H, W]");
  const auto& s = masks.shape;
  const Call c = make_call(dilations, s[2], s[3], parts);
  check_masks(masks, packed, counts, result, iterations, Device::kCpu,
              {s[0], s[2], c.tiles, c.taps, cpu::kTile});
  if (masks.size() == 0) return;
  expect_output(scratch, "scratch", Device::kCpu, masks.dtype,
                {cpu::propagate_scratch(static_cast<int32_t>(s[1]), transposed, c.call)});
  visit_float(masks, [&](auto type) {
    using T = decltype(type);
    cpu::propagate(masks.data<const T>(), packed.data<const T>(), pointer_of(counts), s[0],
                   static_cast<int32_t>(s[1]), static_cast<int32_t>(iterations), transposed, c.call,
                   scratch.data<T>(), result.data<T>());
  });
}

#if defined(WSIS_WITH_CUDA)
cuda::Images images_of(const Array& array, const Call& c, uintptr_t stream) {
  return {array.shape[0],   static_cast<int32_t>(array.shape[1]), c.call.height, c.call.width,
          array.device_id, stream};
}

void local_affinity_cuda(const Array& image,                 // [B, K, H, W] float32 or float64
                         const std::optional<Array>& packed,  // [B, P / 4, H, W, 4], out
                         const std::optional<Array>& stats,   // [B, K + 4, H, W], out
                         int64_t kind, const Dilations& dilations,
                         const std::vector<double>& position, uintptr_t stream) {
  expect_rank(image, "image must be [B, K, H, W]");
  const auto& s = image.shape;
  require(s[1] >= 1, "image must have channels");
  Call c = make_call(dilations, s[2], s[3]);
  set_kind(c, kind, position);
  expect_float(image, "image", kGpu);
  if (packed) {
    expect_output(*packed, "packed", kGpu, image.dtype, {s[0], c.taps / 4, s[2], s[3], 4});
    expect_aligned(*packed, "packed");
  }
  const bool needed = !packed || !(image.dtype == D::kFloat32 ? cuda::has_fast_path<float>(c.call)
                                                              : cuda::has_fast_path<double>(c.call));
  require(!needed || stats, "stats must be given without packed, or for these dilations");
  if (needed)
    expect_output(*stats, "stats", kGpu, image.dtype, {s[0], s[1] + 4, s[2], s[3]});
  if (image.size() == 0) return;
  visit_float(image, [&](auto type) {
    using T = decltype(type);
    cuda::local_affinity(image.data<const T>(), c.call, images_of(image, c, stream),
                         needed ? stats->data<T>() : nullptr, packed ? packed->data<T>() : nullptr);
  });
}

void propagate_cuda(const Array& masks,                  // [B, N, H, W] float32 or float64
                    const Array& packed,                 // [B, P / 4, H, W, 4]
                    const std::optional<Array>& counts,  // [B] int32
                    const Array& result,                 // [B, N, H, W], out
                    const Array& scratch,                // [B, N, H, W]
                    const Dilations& dilations, int64_t iterations, bool transposed,
                    uintptr_t stream) {
  expect_rank(masks, "masks must be [B, N, H, W]");
  const auto& s = masks.shape;
  const Call c = make_call(dilations, s[2], s[3]);
  check_masks(masks, packed, counts, result, iterations, kGpu, {s[0], c.taps / 4, s[2], s[3], 4});
  expect_aligned(packed, "packed");
  expect_output(scratch, "scratch", kGpu, masks.dtype, s);
  if (masks.size() == 0) return;
  visit_float(masks, [&](auto type) {
    using T = decltype(type);
    cuda::propagate(masks.data<const T>(), packed.data<const T>(), pointer_of(counts),
                    static_cast<int32_t>(iterations), transposed, c.call,
                    images_of(masks, c, stream), scratch.data<T>(), result.data<T>());
  });
}

// As propagate_cuda, with weights that are computed again in every iteration.
void propagate_lean_cuda(const Array& masks,  // [B, N, H, W] float32 or float64
                         const Array& image,  // [B, K, H, W]
                         const Array& stats,  // [B, K + 4, H, W], from local_affinity_cuda
                         const std::optional<Array>& counts,  // [B] int32
                         const Array& result,                 // [B, N, H, W], out
                         const Array& scratch,                // [B, N, H, W]
                         int64_t kind, const Dilations& dilations,
                         const std::vector<double>& position, int64_t iterations, bool transposed,
                         uintptr_t stream) {
  expect_rank(masks, "masks must be [B, N, H, W]");
  expect_rank(image, "image must be [B, K, H, W]");
  const auto& s = masks.shape;
  Call c = make_call(dilations, s[2], s[3]);
  set_kind(c, kind, position);
  check_masks(masks, stats, counts, result, iterations, kGpu,
              {s[0], image.shape[1] + 4, s[2], s[3]});
  expect(image, "image", kGpu, {masks.dtype}, {s[0], image.shape[1], s[2], s[3]});
  expect_output(scratch, "scratch", kGpu, masks.dtype, s);
  if (masks.size() == 0) return;
  visit_float(masks, [&](auto type) {
    using T = decltype(type);
    cuda::propagate_lean(masks.data<const T>(), image.data<const T>(), stats.data<const T>(),
                         static_cast<int32_t>(image.shape[1]), pointer_of(counts),
                         static_cast<int32_t>(iterations), transposed, c.call,
                         images_of(masks, c, stream), scratch.data<T>(), result.data<T>());
  });
}
#endif

}  // namespace

void bind_local_affinity(py::module_& m) {
  m.def("local_affinity_padded_size", &local_affinity_padded_size);
  m.def("propagate_scratch_size", &propagate_scratch_size);
  m.def("local_affinity_cpu", &local_affinity_cpu, NoGil());
  m.def("propagate_cpu", &propagate_cpu, NoGil());
#if defined(WSIS_WITH_CUDA)
  m.def("local_affinity_cuda", &local_affinity_cuda, NoGil());
  m.def("propagate_cuda", &propagate_cuda, NoGil());
  m.def("propagate_lean_cuda", &propagate_lean_cuda, NoGil());
#endif
}

}  // namespace wsis
