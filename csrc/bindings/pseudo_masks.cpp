// Guards of the pseudo mask functions and the shapes of their arrays.
//
// Sizes: B images, K classes, R room for present classes, H W image, h w reduced size. All floating
// arrays of a call are float32, or all float64.
#include "cpu/pseudo_masks.h"

#include "bindings/bindings.h"
#include "kernels/pseudo_masks.h"
#if defined(WSIS_WITH_CUDA)
#include "cuda/pseudo_masks.h"
#endif

namespace wsis {
namespace {

using D = DType;
using cpu::PseudoSizes;

constexpr int64_t kMostPixels = int64_t{1} << 30;  // of a plane, which 32 bits number
constexpr int64_t kMostImages = 65535;             // the second axis of a grid

int32_t small(int64_t value) { return static_cast<int32_t>(value); }

// Guards the arrays that describe images: cams and present.
PseudoSizes sizes_of(const Array& cams, const Array& present, Device device) {
  require(cams.shape.size() == 4, "cams must be [B, K, H, W]");
  const auto& s = cams.shape;
  require(s[0] <= kMostImages, "at most 65535 images");
  require(s[1] <= kernels::kMostClasses, "at most 12000 classes");
  require(s[2] * s[3] <= kMostPixels, "planes must have at most 2^30 pixels");
  expect_float(cams, "cams", device);
  expect(present, "present", device, {D::kUint8}, {s[0], s[1]});
  return {s[0], small(s[1]), 0, small(s[2]), small(s[3]), 0, 0};
}

void check_box(const Array& box, int64_t batch, Device device) {
  expect(box, "valid_box", device, {D::kInt64}, {batch, 4});
}

PseudoSizes unit_sizes(const Array& cams, const Array& present, const Array& box,
                       const Array& scratch, const Array& unit, Device device) {
  const PseudoSizes sizes = sizes_of(cams, present, device);
  check_box(box, sizes.batch, device);
  expect_output(scratch, "scratch", device, D::kFloat64, {sizes.batch, sizes.height});
  expect_output(unit, "unit", device, cams.dtype, {sizes.batch});
  return sizes;
}

PseudoSizes stack_sizes(const Array& cams, const Array& present, const Array& unit,
                        const Array& stack, const Array& counts, const Array& ids, Device device) {
  PseudoSizes sizes = sizes_of(cams, present, device);
  require(stack.shape.size() == 4 && stack.shape[1] >= 2 && stack.shape[1] % 2 == 0,
          "stack must be [B, 2 (R + 1), h, w]");
  const auto& s = stack.shape;
  require(s[1] / 2 - 1 <= sizes.classes, "room must not exceed the classes");
  require(s[2] * s[3] <= kMostPixels, "planes must have at most 2^30 pixels");
  sizes.room = small(s[1] / 2 - 1);
  sizes.reduced_height = small(s[2]);
  sizes.reduced_width = small(s[3]);
  require(s[2] * s[3] == 0 || sizes.height * sizes.width > 0, "cams must have pixels");
  require(unit.size() == 0 || unit.size() == sizes.batch, "unit must be [B] or empty");
  expect(unit, "unit", device, {cams.dtype}, {unit.size()});
  expect_output(stack, "stack", device, cams.dtype, {sizes.batch, s[1], s[2], s[3]});
  expect_output(counts, "counts", device, D::kInt32, {sizes.batch});
  expect_output(ids, "ids", device, D::kInt32, {sizes.batch, s[1] / 2});
  return sizes;
}

PseudoSizes label_sizes(const Array& stack, const Array& counts, const Array& ids,
                        const Array& box, const Array& masks, Device device) {
  require(stack.shape.size() == 4 && stack.shape[1] >= 2 && stack.shape[1] % 2 == 0,
          "stack must be [B, 2 (R + 1), h, w]");
  require(masks.shape.size() == 3, "masks must be [B, H, W]");
  const auto &s = stack.shape, &m = masks.shape;
  require(s[0] <= kMostImages, "at most 65535 images");
  require(s[2] * s[3] <= kMostPixels && m[1] * m[2] <= kMostPixels,
          "planes must have at most 2^30 pixels");
  require(m[1] * m[2] == 0 || s[2] * s[3] > 0, "stack must have pixels");
  expect_float(stack, "stack", device);
  expect(counts, "counts", device, {D::kInt32}, {s[0]});
  expect(ids, "ids", device, {D::kInt32}, {s[0], s[1] / 2});
  check_box(box, s[0], device);
  expect_output(masks, "masks", device, D::kInt64, {s[0], m[1], m[2]});
  return {s[0],        0,           small(s[1] / 2 - 1), small(m[1]),
          small(m[2]), small(s[2]), small(s[3])};
}

template <class T>
const T* unit_or_null(const Array& unit) {
  return unit.size() ? unit.data<const T>() : nullptr;
}

void check_parts(int64_t parts) {
  require(parts >= 1 && parts <= 4096, "parts must be in [1, 4096]");
}

void pseudo_unit_cpu(const Array& cams,     // [B, K, H, W]
                     const Array& present,  // [B, K] uint8
                     const Array& box,      // [B, 4] int64
                     const Array& scratch,  // [B, H] float64
                     const Array& unit,     // [B], out
                     int64_t parts) {
  check_parts(parts);
  const PseudoSizes sizes = unit_sizes(cams, present, box, scratch, unit, Device::kCpu);
  visit_float(cams, [&](auto type) {
    using T = decltype(type);
    cpu::pseudo_unit(cams.data<const T>(), present.data<const uint8_t>(),
                     box.data<const int64_t>(), sizes, small(parts), scratch.data<double>(),
                     unit.data<T>());
  });
}

void pseudo_stack_cpu(const Array& cams,     // [B, K, H, W]
                      const Array& present,  // [B, K] uint8
                      const Array& unit,     // [B], or [0]: constants
                      double high, double low,
                      const Array& stack,   // [B, 2 (R + 1), h, w], out
                      const Array& counts,  // [B] int32, out
                      const Array& ids,     // [B, R + 1] int32, out
                      int64_t parts) {
  check_parts(parts);
  const PseudoSizes sizes = stack_sizes(cams, present, unit, stack, counts, ids, Device::kCpu);
  visit_float(cams, [&](auto type) {
    using T = decltype(type);
    cpu::pseudo_stack(cams.data<const T>(), present.data<const uint8_t>(), unit_or_null<T>(unit),
                      T(high), T(low), sizes, small(parts), stack.data<T>(),
                      counts.data<int32_t>(), ids.data<int32_t>());
  });
}

void pseudo_labels_cpu(const Array& stack,   // [B, 2 (R + 1), h, w]
                       const Array& counts,  // [B] int32
                       const Array& ids,     // [B, R + 1] int32
                       const Array& box,     // [B, 4] int64
                       const Array& masks,   // [B, H, W] int64, out
                       int64_t ignore_index, int64_t parts) {
  check_parts(parts);
  const PseudoSizes sizes = label_sizes(stack, counts, ids, box, masks, Device::kCpu);
  for (int64_t b = 0; b < sizes.batch; ++b) {
    const int32_t count = counts.data<int32_t>()[b];
    require(count >= 0 && count <= stack.shape[1] && count % 2 == 0, "counts must fit the stack");
  }
  visit_float(stack, [&](auto type) {
    using T = decltype(type);
    cpu::pseudo_labels(stack.data<const T>(), counts.data<const int32_t>(),
                       ids.data<const int32_t>(), box.data<const int64_t>(), ignore_index, sizes,
                       small(parts), masks.data<int64_t>());
  });
}

#if defined(WSIS_WITH_CUDA)
// The arrays of the functions above, on the device.
void pseudo_unit_cuda(const Array& cams, const Array& present, const Array& box,
                      const Array& scratch, const Array& unit, uintptr_t stream) {
  const PseudoSizes sizes = unit_sizes(cams, present, box, scratch, unit, kGpu);
  visit_float(cams, [&](auto type) {
    using T = decltype(type);
    cuda::pseudo_unit(cams.data<const T>(), present.data<const uint8_t>(),
                      box.data<const int64_t>(), sizes, scratch.data<double>(), unit.data<T>(),
                      cams.device_id, stream);
  });
}

void pseudo_stack_cuda(const Array& cams, const Array& present, const Array& unit, double high,
                       double low, const Array& stack, const Array& counts, const Array& ids,
                       uintptr_t stream) {
  const PseudoSizes sizes = stack_sizes(cams, present, unit, stack, counts, ids, kGpu);
  visit_float(cams, [&](auto type) {
    using T = decltype(type);
    cuda::pseudo_stack(cams.data<const T>(), present.data<const uint8_t>(), unit_or_null<T>(unit),
                       T(high), T(low), sizes, stack.data<T>(), counts.data<int32_t>(),
                       ids.data<int32_t>(), cams.device_id, stream);
  });
}

void pseudo_labels_cuda(const Array& stack, const Array& counts, const Array& ids,
                        const Array& box, const Array& masks, int64_t ignore_index,
                        uintptr_t stream) {
  const PseudoSizes sizes = label_sizes(stack, counts, ids, box, masks, kGpu);
  visit_float(stack, [&](auto type) {
    using T = decltype(type);
    cuda::pseudo_labels(stack.data<const T>(), counts.data<const int32_t>(),
                        ids.data<const int32_t>(), box.data<const int64_t>(), ignore_index, sizes,
                        masks.data<int64_t>(), stack.device_id, stream);
  });
}
#endif

}  // namespace

void bind_pseudo_masks(py::module_& m) {
  m.def("pseudo_unit_cpu", &pseudo_unit_cpu, NoGil());
  m.def("pseudo_stack_cpu", &pseudo_stack_cpu, NoGil());
  m.def("pseudo_labels_cpu", &pseudo_labels_cpu, NoGil());
#if defined(WSIS_WITH_CUDA)
  m.def("pseudo_unit_cuda", &pseudo_unit_cuda, NoGil());
  m.def("pseudo_stack_cuda", &pseudo_stack_cuda, NoGil());
  m.def("pseudo_labels_cuda", &pseudo_labels_cuda, NoGil());
#endif
}

}  // namespace wsis
