// Guards of CAM normalisation and the shapes of its arrays.
//
// Sizes: M passes, B images, K classes, h w grid of a pass, H W size that passes are resized to,
// rows x columns the part that is kept, n pixels. All arrays of numbers have one dtype, float32 or
// float64, unless said. `weights` is the label [B, K], or None for 1 everywhere.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "cpu/normalize.h"
#include "cpu/normalize_pixels.h"
#include "cpu/normalize_planes.h"
#if defined(WSIS_WITH_CUDA)
#include "cuda/normalize.h"
#endif

namespace wsis {
namespace {

using D = DType;
using Arrays = std::vector<Array>;
using MaybeArray = std::optional<Array>;

void expect_like(const Array& array, const char* name, const Array& like,
                 const std::vector<int64_t>& shape) {
  expect(array, name, like.device, {like.dtype}, shape);
}

template <class T>
const T* weights_of(const MaybeArray& weights, const Array& like, int64_t batch, int64_t classes) {
  if (!weights) return nullptr;
  expect_like(*weights, "weights", like, {batch, classes});
  return weights->data<const T>();
}

cpu::Frame frame_of(int64_t height, int64_t width, int64_t rows, int64_t columns) {
  require(rows >= 1 && rows <= height && columns >= 1 && columns <= width,
          "the kept part must be within the size, and not empty");
  require(height <= kernels::kMostSide && width <= kernels::kMostSide, "the size is too large");
  return {int32_t(height), int32_t(width), int32_t(rows), int32_t(columns)};
}

cpu::Merge merge_of(bool positive_each, bool flip_max, int64_t norm) {
  require(norm >= 0 && norm < kernels::kNorms, "norm must be a code of kernels/normalize.h");
  return {positive_each, flip_max, static_cast<kernels::Norm>(norm)};
}

// Sizes of passes without their maps, for the size of the scratch.
template <class T>
cpu::Passes<T> pass_sizes(const std::vector<std::pair<int64_t, int64_t>>& grids) {
  require(!grids.empty() && grids.size() <= size_t{cpu::kMostPasses}, "there must be 1 to 64 maps");
  cpu::Passes<T> passes{};
  for (const auto& [h, w] : grids) {
    require(h >= 1 && w >= 1 && h <= kernels::kMostSide && w <= kernels::kMostSide,
            "maps must have a grid of 1 to 32767 rows and columns");
    passes.pass[passes.count++] = {nullptr, int32_t(h), int32_t(w), false};
  }
  return passes;
}

template <class T>
cpu::Passes<T> passes_of(const Arrays& maps, const std::vector<bool>& flips, bool flip_max,
                         Device device) {
  require(flips.size() == maps.size(), "flips must be [M]");
  require(!flip_max || maps.size() % 2 == 0, "maps must come in pairs");
  std::vector<std::pair<int64_t, int64_t>> grids;
  for (const Array& map : maps) {
    require(map.shape.size() == 4, "maps must be [B, K, h, w]");
    grids.emplace_back(map.shape[2], map.shape[3]);
  }
  cpu::Passes<T> passes = pass_sizes<T>(grids);
  for (int32_t m = 0; m < passes.count; ++m) {
    expect(maps[m], "maps", device, {maps[0].dtype},
           {maps[0].shape[0], maps[0].shape[1], grids[m].first, grids[m].second});
    passes.pass[m].maps = maps[m].data<const T>();
    passes.pass[m].flip = flips[m];
  }
  return passes;
}

// (elements of tables, of table_weights, of scratch per part) for normalize_cams_cpu.
std::tuple<int64_t, int64_t, int64_t> normalize_cams_scratch(
    const std::vector<std::pair<int64_t, int64_t>>& grids, bool flip_max, int64_t height,
    int64_t width, int64_t rows, int64_t columns, bool wide) {
  const cpu::Merge merge = merge_of(false, flip_max, 0);
  const cpu::Frame frame = frame_of(height, width, rows, columns);
  const cpu::Scratch sizes =
      wide ? cpu::normalize_cams_scratch(pass_sizes<double>(grids), merge, frame)
           : cpu::normalize_cams_scratch(pass_sizes<float>(grids), merge, frame);
  return {sizes.tables, sizes.weights, sizes.per_part};
}

// Guards what both devices have in common; scores [B, skip + K, rows, columns].
void check_scores(const Arrays& maps, const Array& scores, int64_t skip, cpu::Frame frame,
                  Device device) {
  require(!maps.empty() && maps[0].shape.size() == 4, "maps must be [B, K, h, w]");
  expect_float(maps[0], "maps", device);
  require(skip == 0 || skip == 1, "skip must be 0 or 1");
  expect_output(scores, "scores", device, maps[0].dtype,
                {maps[0].shape[0], maps[0].shape[1] + skip, frame.rows, frame.columns});
}

void normalize_cams_cpu(const Arrays& maps,            // M x [B, K, h, w]
                        const std::vector<bool>& flips,  // [M]
                        const MaybeArray& weights,     // [B, K]
                        const Array& scores,           // [B, skip + K, rows, columns], out
                        const Array& extrema,          // [B, K, 2], out
                        const Array& tables,           // [tables] int32, scratch
                        const Array& table_weights,    // [weights], scratch
                        const Array& scratch,          // [parts, per part], scratch
                        int64_t height, int64_t width, bool positive_each, bool flip_max,
                        int64_t norm, double eps, int64_t skip) {
  require(scores.shape.size() == 4 && scratch.shape.size() == 2 && scratch.shape[0] >= 1,
          "scores must be [B, C, rows, columns], scratch [parts, per part]");
  const cpu::Frame frame = frame_of(height, width, scores.shape[2], scores.shape[3]);
  const cpu::Merge merge = merge_of(positive_each, flip_max, norm);
  check_scores(maps, scores, skip, frame, Device::kCpu);
  const int64_t batch = maps[0].shape[0], classes = maps[0].shape[1];
  const D dtype = maps[0].dtype;
  expect_output(extrema, "extrema", Device::kCpu, dtype, {batch, classes, 2});
  visit_float(maps[0], [&](auto type) {
    using T = decltype(type);
    const cpu::Passes<T> passes = passes_of<T>(maps, flips, flip_max, Device::kCpu);
    const cpu::Scratch sizes = cpu::normalize_cams_scratch(passes, merge, frame);
    expect_output(tables, "tables", Device::kCpu, D::kInt32, {sizes.tables});
    expect_output(table_weights, "table_weights", Device::kCpu, dtype, {sizes.weights});
    expect_output(scratch, "scratch", Device::kCpu, dtype, {scratch.shape[0], sizes.per_part});
    cpu::normalize_cams(passes, merge, frame, static_cast<T>(eps),
                        weights_of<T>(weights, scores, batch, classes), batch, int32_t(classes),
                        int32_t(skip), int32_t(scratch.shape[0]), tables.data<int32_t>(),
                        table_weights.data<T>(), scratch.data<T>(), scores.data<T>(),
                        extrema.data<T>());
  });
}

struct Stack {
  int64_t batch, classes, n;
};

// Scores with a background: [B, 1 + K, n].
Stack stack_of(const Array& scores, const char* name, Device device) {
  require(scores.shape.size() == 3 && scores.shape[1] >= 1, "scores must be [B, 1 + K, n]");
  expect_float(scores, name, device);
  return {scores.shape[0], scores.shape[1] - 1, scores.shape[2]};
}

kernels::Background background_of(int64_t kind) {
  require(kind >= 0 && kind <= 2, "kind must be a code of kernels/normalize.h");
  return static_cast<kernels::Background>(kind);
}

void add_background_cpu(const Array& scores,  // [B, 1 + K, n], channel 0 is out
                        const MaybeArray& weights, int64_t kind, double value, double absent,
                        int64_t parts) {
  const Stack s = stack_of(scores, "scores", Device::kCpu);
  expect_output(scores, "scores", Device::kCpu, scores.dtype, scores.shape);
  require(parts >= 1, "parts must be positive");
  visit_float(scores, [&](auto type) {
    using T = decltype(type);
    cpu::add_background(background_of(kind), T(value),
                        weights_of<T>(weights, scores, s.batch, s.classes), T(absent), s.batch,
                        int32_t(s.classes), s.n, int32_t(parts), scores.data<T>());
  });
}

void share_background_cpu(const Array& gradient,  // [B, 1 + K, n]
                          const Array& scores,    // [B, 1 + K, n]
                          const Array& shares,    // [B, K, n], out
                          int64_t parts) {
  const Stack s = stack_of(scores, "scores", Device::kCpu);
  expect_like(gradient, "gradient", scores, scores.shape);
  expect_output(shares, "shares", Device::kCpu, scores.dtype, {s.batch, s.classes, s.n});
  require(parts >= 1, "parts must be positive");
  visit_float(scores, [&](auto type) {
    using T = decltype(type);
    cpu::share_background(gradient.data<const T>(), scores.data<const T>(), s.batch,
                          int32_t(s.classes), s.n, int32_t(parts), shares.data<T>());
  });
}

// Guards what both devices have in common: scores [B, K, rows, columns], boxes [B, 4] int64.
const int64_t* check_labels(const Array& scores, const MaybeArray& boxes, const Array& labels,
                            Device device) {
  require(scores.shape.size() == 4, "scores must be [B, K, rows, columns]");
  require(scores.shape[2] * scores.shape[3] <= INT32_MAX, "scores must be below 2^31 pixels");
  expect_float(scores, "scores", device);
  expect_output(labels, "labels", device, D::kInt64,
                {scores.shape[0], scores.shape[2], scores.shape[3]});
  if (!boxes) return nullptr;
  expect(*boxes, "boxes", device, {D::kInt64}, {scores.shape[0], 4});
  return boxes->data<const int64_t>();
}

void cams_to_labels_cpu(const Array& scores,      // [B, K, rows, columns]
                        const MaybeArray& weights,
                        const MaybeArray& boxes,  // [B, 4] int64
                        const Array& labels,      // [B, rows, columns] int64, out
                        double low, double high, int64_t ignore_index, int64_t parts) {
  const int64_t* limits = check_labels(scores, boxes, labels, Device::kCpu);
  require(parts >= 1, "parts must be positive");
  visit_float(scores, [&](auto type) {
    using T = decltype(type);
    cpu::cams_to_labels(scores.data<const T>(),
                        weights_of<T>(weights, scores, scores.shape[0], scores.shape[1]), limits,
                        scores.shape[0], int32_t(scores.shape[1]), int32_t(scores.shape[2]),
                        int32_t(scores.shape[3]), {low, high, ignore_index}, int32_t(parts),
                        labels.data<int64_t>());
  });
}

// maps [B, skip_in + K, n], scores [B, skip_out + K, n], extrema [B, K, 2].
cpu::Planes planes_of(const Array& maps, const Array& scores, const Array& extrema,
                      int64_t skip_in, int64_t skip_out, Device device) {
  require(maps.shape.size() == 3 && maps.shape[2] >= 1, "maps must be [B, C, n], n >= 1");
  const int64_t batch = maps.shape[0], classes = maps.shape[1] - skip_in, n = maps.shape[2];
  require(skip_in >= 0 && skip_in <= 1 && skip_out >= 0 && skip_out <= 1 && classes >= 0,
          "skip_in and skip_out must be 0 or 1, and at most C");
  expect_float(maps, "maps", device);
  expect_like(scores, "scores", maps, {batch, skip_out + classes, n});
  expect_like(extrema, "extrema", maps, {batch, classes, 2});
  return {batch, n, int32_t(classes), int32_t(skip_in), int32_t(skip_out)};
}

kernels::Norm norm_of(int64_t norm) {
  require(norm >= 0 && norm < kernels::kNorms, "norm must be a code of kernels/normalize.h");
  return static_cast<kernels::Norm>(norm);
}

void norm_planes_cpu(const Array& maps,     // [B, skip_in + K, n]
                     const Array& scores,   // [B, skip_out + K, n], out
                     const Array& extrema,  // [B, K, 2], out
                     int64_t skip_in, int64_t skip_out, int64_t norm, double eps, int64_t parts) {
  const cpu::Planes planes = planes_of(maps, scores, extrema, skip_in, skip_out, Device::kCpu);
  expect_output(scores, "scores", Device::kCpu, maps.dtype, scores.shape);
  expect_output(extrema, "extrema", Device::kCpu, maps.dtype, extrema.shape);
  require(parts >= 1, "parts must be positive");
  visit_float(maps, [&](auto type) {
    using T = decltype(type);
    cpu::norm_planes(maps.data<const T>(), planes, norm_of(norm), T(eps), int32_t(parts),
                     scores.data<T>(), extrema.data<T>());
  });
}

void norm_planes_backward_cpu(const Array& gradient,       // [B, skip_out + K, n]
                              const Array& maps,           // [B, skip_in + K, n]
                              const Array& extrema,        // [B, K, 2]
                              const Array& maps_gradient,  // [B, skip_in + K, n], out
                              int64_t skip_in, int64_t skip_out, int64_t norm, double eps,
                              int64_t parts) {
  const cpu::Planes planes = planes_of(maps, gradient, extrema, skip_in, skip_out, Device::kCpu);
  expect_output(maps_gradient, "maps_gradient", Device::kCpu, maps.dtype, maps.shape);
  require(parts >= 1, "parts must be positive");
  visit_float(maps, [&](auto type) {
    using T = decltype(type);
    cpu::norm_planes_backward(gradient.data<const T>(), maps.data<const T>(),
                              extrema.data<const T>(), planes, norm_of(norm), T(eps),
                              int32_t(parts), maps_gradient.data<T>());
  });
}

#if defined(WSIS_WITH_CUDA)
int64_t normalize_cams_tiles(int64_t rows, int64_t columns) {
  return cuda::merge_tiles({int32_t(rows), int32_t(columns), int32_t(rows), int32_t(columns)});
}

void normalize_cams_cuda(const Arrays& maps,              // M x [B, K, h, w]
                         const std::vector<bool>& flips,  // [M]
                         const MaybeArray& weights,       // [B, K]
                         const Array& scores,             // [B, skip + K, rows, columns], out
                         const Array& partial,            // [B K, tiles, 2], scratch
                         int64_t height, int64_t width, bool positive_each, bool flip_max,
                         int64_t norm, double eps, int64_t skip, uintptr_t stream) {
  require(scores.shape.size() == 4, "scores must be [B, C, rows, columns]");
  const cpu::Frame frame = frame_of(height, width, scores.shape[2], scores.shape[3]);
  const cpu::Merge merge = merge_of(positive_each, flip_max, norm);
  check_scores(maps, scores, skip, frame, kGpu);
  const int64_t batch = maps[0].shape[0], classes = maps[0].shape[1];
  expect_output(partial, "partial", kGpu, maps[0].dtype,
                {batch * classes, cuda::merge_tiles(frame), 2});
  visit_float(maps[0], [&](auto type) {
    using T = decltype(type);
    cuda::normalize_cams(passes_of<T>(maps, flips, flip_max, kGpu), merge, frame, T(eps),
                         weights_of<T>(weights, scores, batch, classes), batch, int32_t(classes),
                         int32_t(skip), partial.data<T>(), scores.data<T>(), scores.device_id,
                         stream);
  });
}

void add_background_cuda(const Array& scores,  // [B, 1 + K, n], channel 0 is out
                         const MaybeArray& weights, int64_t kind, double value, double absent,
                         uintptr_t stream) {
  const Stack s = stack_of(scores, "scores", kGpu);
  expect_output(scores, "scores", kGpu, scores.dtype, scores.shape);
  visit_float(scores, [&](auto type) {
    using T = decltype(type);
    cuda::add_background(background_of(kind), T(value),
                         weights_of<T>(weights, scores, s.batch, s.classes), T(absent), s.batch,
                         int32_t(s.classes), s.n, scores.data<T>(), scores.device_id, stream);
  });
}

void share_background_cuda(const Array& gradient,  // [B, 1 + K, n]
                           const Array& scores,    // [B, 1 + K, n]
                           const Array& shares,    // [B, K, n], out
                           uintptr_t stream) {
  const Stack s = stack_of(scores, "scores", kGpu);
  expect_like(gradient, "gradient", scores, scores.shape);
  expect_output(shares, "shares", kGpu, scores.dtype, {s.batch, s.classes, s.n});
  visit_float(scores, [&](auto type) {
    using T = decltype(type);
    cuda::share_background(gradient.data<const T>(), scores.data<const T>(), s.batch,
                           int32_t(s.classes), s.n, shares.data<T>(), scores.device_id, stream);
  });
}

void cams_to_labels_cuda(const Array& scores,  // [B, K, rows, columns]
                         const MaybeArray& weights,
                         const MaybeArray& boxes,  // [B, 4] int64
                         const Array& labels,      // [B, rows, columns] int64, out
                         double low, double high, int64_t ignore_index, uintptr_t stream) {
  const int64_t* limits = check_labels(scores, boxes, labels, kGpu);
  visit_float(scores, [&](auto type) {
    using T = decltype(type);
    cuda::cams_to_labels(scores.data<const T>(),
                         weights_of<T>(weights, scores, scores.shape[0], scores.shape[1]), limits,
                         scores.shape[0], int32_t(scores.shape[1]), int32_t(scores.shape[2]),
                         int32_t(scores.shape[3]), {low, high, ignore_index},
                         labels.data<int64_t>(), scores.device_id, stream);
  });
}

void norm_planes_cuda(const Array& maps,     // [B, skip_in + K, n]
                      const Array& partial,  // [B K, chunks, 2], scratch
                      const Array& scores,   // [B, skip_out + K, n], out
                      const Array& extrema,  // [B, K, 2], out
                      int64_t skip_in, int64_t skip_out, int64_t norm, double eps,
                      uintptr_t stream) {
  const cpu::Planes planes = planes_of(maps, scores, extrema, skip_in, skip_out, kGpu);
  expect_output(scores, "scores", kGpu, maps.dtype, scores.shape);
  expect_output(extrema, "extrema", kGpu, maps.dtype, extrema.shape);
  expect_output(partial, "partial", kGpu, maps.dtype,
                {planes.batch * planes.num_classes, cuda::plane_chunks(planes.n), 2});
  visit_float(maps, [&](auto type) {
    using T = decltype(type);
    cuda::norm_planes(maps.data<const T>(), planes, norm_of(norm), T(eps), partial.data<T>(),
                      scores.data<T>(), extrema.data<T>(), maps.device_id, stream);
  });
}

void norm_planes_backward_cuda(const Array& gradient,       // [B, skip_out + K, n]
                               const Array& maps,           // [B, skip_in + K, n]
                               const Array& extrema,        // [B, K, 2]
                               const Array& partial,        // [B K, chunks, 2], scratch
                               const Array& positions,      // the same in int32, scratch
                               const Array& maps_gradient,  // [B, skip_in + K, n], out
                               int64_t skip_in, int64_t skip_out, int64_t norm, double eps,
                               uintptr_t stream) {
  const cpu::Planes planes = planes_of(maps, gradient, extrema, skip_in, skip_out, kGpu);
  const std::vector<int64_t> chunks{planes.batch * planes.num_classes,
                                    cuda::plane_chunks(planes.n), 2};
  expect_output(maps_gradient, "maps_gradient", kGpu, maps.dtype, maps.shape);
  expect_output(partial, "partial", kGpu, maps.dtype, chunks);
  expect_output(positions, "positions", kGpu, D::kInt32, chunks);
  visit_float(maps, [&](auto type) {
    using T = decltype(type);
    cuda::norm_planes_backward(gradient.data<const T>(), maps.data<const T>(),
                               extrema.data<const T>(), planes, norm_of(norm), T(eps),
                               partial.data<T>(), positions.data<int32_t>(),
                               maps_gradient.data<T>(), maps.device_id, stream);
  });
}
#endif

}  // namespace

void bind_normalize(py::module_& m) {
  m.def("normalize_cams_scratch", &normalize_cams_scratch);
  m.def("normalize_cams_cpu", &normalize_cams_cpu, NoGil());
  m.def("add_background_cpu", &add_background_cpu, NoGil());
  m.def("share_background_cpu", &share_background_cpu, NoGil());
  m.def("cams_to_labels_cpu", &cams_to_labels_cpu, NoGil());
  m.def("norm_planes_cpu", &norm_planes_cpu, NoGil());
  m.def("norm_planes_backward_cpu", &norm_planes_backward_cpu, NoGil());
#if defined(WSIS_WITH_CUDA)
  m.def("normalize_cams_tiles", &normalize_cams_tiles);
  m.def("norm_planes_chunks", &cuda::plane_chunks);
  m.def("normalize_cams_cuda", &normalize_cams_cuda, NoGil());
  m.def("add_background_cuda", &add_background_cuda, NoGil());
  m.def("share_background_cuda", &share_background_cuda, NoGil());
  m.def("cams_to_labels_cuda", &cams_to_labels_cuda, NoGil());
  m.def("norm_planes_cuda", &norm_planes_cuda, NoGil());
  m.def("norm_planes_backward_cuda", &norm_planes_backward_cuda, NoGil());
#endif
}

}  // namespace wsis
