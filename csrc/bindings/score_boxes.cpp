// Guards of the boxes of score maps and the shapes of their arrays.
//
// Sizes: N maps of H W pixels, M true boxes.
#include "cpu/score_boxes.h"

#include "bindings/bindings.h"

namespace wsis {
namespace {

using D = DType;

void check_size(int64_t height, int64_t width) {
  require(height >= 1 && width >= 1 && height <= 8192 && width <= 8192,
          "maps must have 1 to 8192 rows and columns");
}

cpu::Contours contours(bool largest) {
  return largest ? cpu::Contours::kLargest : cpu::Contours::kAll;
}

void score_box_overlaps_cpu(const Array& levels,   // [N, H, W] uint8
                            const Array& truth,    // [M, 4] int32: x0 y0 x1 y1
                            const Array& ends,     // [N] int64, ascending, at most M
                            const Array& best,     // [N, 256] float64, out
                            const Array& scratch,  // [parts, words] int32
                            bool largest) {
  require(levels.shape.size() == 3, "levels must be [N, H, W]");
  const int64_t maps = levels.shape[0], height = levels.shape[1], width = levels.shape[2];
  check_size(height, width);
  const int64_t boxes = truth.shape.empty() ? 0 : truth.shape[0];
  expect(levels, "levels", Device::kCpu, {D::kUint8}, levels.shape);
  expect(truth, "truth", Device::kCpu, {D::kInt32}, {boxes, 4});
  expect(ends, "ends", Device::kCpu, {D::kInt64}, {maps});
  int64_t last = 0;
  for (int64_t n = 0; n < maps; ++n) {
    const int64_t end = ends.data<const int64_t>()[n];
    require(end >= last && end <= boxes, "ends must ascend and be at most M");
    last = end;
  }
  require(scratch.shape.size() == 2 && scratch.shape[0] >= 1, "scratch must be [parts, words]");
  expect_output(scratch, "scratch", Device::kCpu, D::kInt32,
                {scratch.shape[0], cpu::score_boxes_words(height, width)});
  expect_output(best, "best", Device::kCpu, D::kFloat64, {maps, 256});
  cpu::score_box_overlaps(levels.data<const uint8_t>(), truth.data<const cpu::Box>(),
                          ends.data<const int64_t>(), maps, height, width, contours(largest),
                          int32_t(scratch.shape[0]), scratch.data<int32_t>(), best.data<double>());
}

int64_t score_boxes_cpu(const Array& levels,   // [H, W] uint8
                        const Array& found,    // [H * W, 4] int32, out: as many as returned
                        const Array& scratch,  // [words] int32
                        int64_t level, bool largest) {
  require(levels.shape.size() == 2, "levels must be [H, W]");
  const int64_t height = levels.shape[0], width = levels.shape[1];
  check_size(height, width);
  require(level >= 0 && level <= 255, "level must be in [0, 255]");
  expect(levels, "levels", Device::kCpu, {D::kUint8}, levels.shape);
  expect_output(found, "found", Device::kCpu, D::kInt32, {height * width, 4});
  expect_output(scratch, "scratch", Device::kCpu, D::kInt32,
                {cpu::score_boxes_words(height, width)});
  return cpu::score_boxes(levels.data<const uint8_t>(), height, width, int32_t(level),
                          contours(largest), scratch.data<int32_t>(), found.data<cpu::Box>());
}

}  // namespace

void bind_score_boxes(py::module_& m) {
  m.def("score_boxes_words", &cpu::score_boxes_words, py::arg("height"), py::arg("width"));
  m.def("score_box_overlaps_cpu", &score_box_overlaps_cpu, py::arg("levels"), py::arg("truth"),
        py::arg("ends"), py::arg("best"), py::arg("scratch"), py::arg("largest"), NoGil());
  m.def("score_boxes_cpu", &score_boxes_cpu, py::arg("levels"), py::arg("found"),
        py::arg("scratch"), py::arg("level"), py::arg("largest"), NoGil());
}

}  // namespace wsis
