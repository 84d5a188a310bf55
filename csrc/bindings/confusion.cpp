// Guards of the confusion counting functions and the shapes of their arrays.
//
// Sizes: B images, C classes, K channels, T thresholds, n pixels.
#include "cpu/confusion.h"

#include "bindings/bindings.h"
#if defined(WSIS_WITH_CUDA)
#include "cuda/confusion.h"
#endif

namespace wsis {
namespace {

using D = DType;

cpu::ClassMap class_map(const Array& array, const char* name, Device device,
                        const std::vector<int64_t>& shape) {
  expect(array, name, device, {D::kUint8, D::kInt16, D::kInt32, D::kInt64}, shape);
  return {array.pointer, array.dtype};
}

void check_classes(int64_t num_classes) {
  require(num_classes >= 1 && num_classes <= 46340, "num_classes must be in [1, 46340]");
}

void confusion_matrix_cpu(const Array& pred,     // [n] integer
                          const Array& target,   // [n] integer
                          const Array& tally,    // [C * C + 2] int64, out
                          const Array& scratch,  // [parts, C * C + 2] int64
                          int64_t num_classes, int64_t ignore_index) {
  check_classes(num_classes);
  const int64_t n = pred.size(), cells = num_classes * num_classes + 2;
  require(scratch.shape.size() == 2 && scratch.shape[0] >= 1, "scratch must be [parts, cells]");
  expect_output(tally, "tally", Device::kCpu, D::kInt64, {cells});
  expect_output(scratch, "scratch", Device::kCpu, D::kInt64, {scratch.shape[0], cells});
  cpu::confusion_matrix(
      class_map(pred, "pred", Device::kCpu, {n}), class_map(target, "target", Device::kCpu, {n}), n,
      static_cast<int32_t>(num_classes), ignore_index, static_cast<int32_t>(scratch.shape[0]),
      scratch.data<int64_t>(), tally.data<int64_t>());
}

struct CurveSizes {
  int64_t batch, channels, n, thresholds, histogram, tally;
};

// Guards what both devices have in common.
CurveSizes curve_sizes(const Array& scores, const Array& thresholds, const Array& class_ids,
                       const Array& tally, int64_t num_classes, Device device) {
  check_classes(num_classes);
  require(scores.shape.size() == 3 && scores.shape[1] >= 1, "scores must be [B, K, n]");
  require(thresholds.size() >= 1, "thresholds must be [T] with T >= 1");
  CurveSizes sizes{scores.shape[0], scores.shape[1], scores.shape[2], thresholds.size(), 0, 0};
  sizes.histogram = num_classes * sizes.channels * (sizes.thresholds + 1);
  sizes.tally = sizes.thresholds * num_classes * num_classes + 2;
  require(sizes.histogram <= INT32_MAX, "num_classes * K * (T + 1) must be below 2^31");
  expect_float(scores, "scores", device);
  expect(thresholds, "thresholds", device, {scores.dtype}, {sizes.thresholds});
  expect(class_ids, "class_ids", device, {D::kInt64}, {sizes.channels});
  expect_output(tally, "tally", device, D::kInt64, {sizes.tally});
  return sizes;
}

void threshold_curve_cpu(const Array& scores,      // [B, K, n] float32 or float64
                         const Array& target,      // [B, n] integer
                         const Array& thresholds,  // [T] like scores, ascending
                         const Array& class_ids,   // [K] int64 in [0, C)
                         const Array& tally,       // [T * C * C + 2] int64, out
                         const Array& scratch,     // [parts, C * K * (T + 1) + 2] int64
                         int64_t num_classes, int64_t ignore_index) {
  const CurveSizes s = curve_sizes(scores, thresholds, class_ids, tally, num_classes, Device::kCpu);
  require(scratch.shape.size() == 2 && scratch.shape[0] >= 1, "scratch must be [parts, cells]");
  expect_output(scratch, "scratch", Device::kCpu, D::kInt64, {scratch.shape[0], s.histogram + 2});
  const cpu::ClassMap map = class_map(target, "target", Device::kCpu, {s.batch, s.n});
  for (int64_t k = 0; k < s.channels; ++k)
    require(class_ids.data<int64_t>()[k] >= 0 && class_ids.data<int64_t>()[k] < num_classes,
            "class_ids must be in [0, C)");
  visit_float(scores, [&](auto type) {
    using T = decltype(type);
    cpu::threshold_curve(scores.data<const T>(), map, thresholds.data<const T>(),
                         class_ids.data<const int64_t>(), s.batch, int32_t(s.channels), s.n,
                         int32_t(s.thresholds), int32_t(num_classes), ignore_index,
                         int32_t(scratch.shape[0]), scratch.data<int64_t>(), tally.data<int64_t>());
  });
}

#if defined(WSIS_WITH_CUDA)
void confusion_matrix_cuda(const Array& pred,    // [n] integer
                           const Array& target,  // [n] integer
                           const Array& tally,   // [C * C + 2] int64, zeroed, out
                           int64_t num_classes, int64_t ignore_index, uintptr_t stream) {
  check_classes(num_classes);
  const int64_t n = pred.size();
  expect_output(tally, "tally", kGpu, D::kInt64, {num_classes * num_classes + 2});
  cuda::confusion_matrix(class_map(pred, "pred", kGpu, {n}), class_map(target, "target", kGpu, {n}),
                         n, static_cast<int32_t>(num_classes), ignore_index, tally.data<int64_t>(),
                         pred.device_id, stream);
}

void threshold_curve_cuda(const Array& scores,      // [B, K, n] float32 or float64
                          const Array& target,      // [B, n] integer
                          const Array& thresholds,  // [T] like scores, ascending
                          const Array& class_ids,   // [K] int64 in [0, C), checked by the caller
                          const Array& tally,       // [T * C * C + 2] int64, zeroed, out
                          const Array& histogram,   // [C * K * (T + 1)] int64, zeroed, scratch
                          int64_t num_classes, int64_t ignore_index, uintptr_t stream) {
  const CurveSizes s = curve_sizes(scores, thresholds, class_ids, tally, num_classes, kGpu);
  expect_output(histogram, "histogram", kGpu, D::kInt64, {s.histogram});
  const cpu::ClassMap map = class_map(target, "target", kGpu, {s.batch, s.n});
  visit_float(scores, [&](auto type) {
    using T = decltype(type);
    cuda::threshold_curve(
        scores.data<const T>(), map, thresholds.data<const T>(), class_ids.data<const int64_t>(),
        s.batch, int32_t(s.channels), s.n, int32_t(s.thresholds), int32_t(num_classes),
        ignore_index, histogram.data<int64_t>(), tally.data<int64_t>(), scores.device_id, stream);
  });
}
#endif

}  // namespace

void bind_confusion(py::module_& m) {
  m.def("confusion_matrix_cpu", &confusion_matrix_cpu, NoGil());
  m.def("threshold_curve_cpu", &threshold_curve_cpu, NoGil());
#if defined(WSIS_WITH_CUDA)
  m.def("confusion_matrix_cuda", &confusion_matrix_cuda, NoGil());
  m.def("threshold_curve_cuda", &threshold_curve_cuda, NoGil());
#endif
}

}  // namespace wsis
