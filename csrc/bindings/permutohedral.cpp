// Guards of the permutohedral lattice and its filter, and the shapes of their arrays.
//
// Sizes: one image of N = H W pixels, d features, T tiles, V entries of the tiles' lists, M vertices.
#include "bindings/permutohedral.h"

namespace wsis {
namespace {

using D = DType;
using cpu::FilterCall;

struct CheckedPoints {
  cpu::Points points{};
  std::vector<float> widths, widths_xy;
};

// `image` [c, N], or [N, c] if interleaved, uint8 or float32; `spatial` empty or (sx, sy).
void set_points(CheckedPoints& p, const std::optional<Array>& image, bool interleaved,
                const std::vector<double>& widths, const std::vector<double>& spatial,
                int64_t height, int64_t width) {
  check_size(height, width);
  require(spatial.empty() || spatial.size() == 2, "spatial must be empty or two widths");
  require(widths.empty() == !image, "there must be one width for each channel of an image");
  p.widths.assign(widths.begin(), widths.end());
  p.widths_xy.assign(spatial.begin(), spatial.end());
  for (float w : p.widths) require(w > 0, "widths must be positive");
  for (float w : p.widths_xy) require(w > 0, "widths must be positive");
  cpu::Points& points = p.points;
  points.height = static_cast<int32_t>(height);
  points.width = static_cast<int32_t>(width);
  points.widths_xy = spatial.empty() ? nullptr : p.widths_xy.data();
  points.widths = p.widths.data();
  points.channels = static_cast<int32_t>(widths.size());
  points.interleaved = interleaved;
  if (image) {
    const int64_t channels = points.channels;
    expect(*image, "image", Device::kCpu, {D::kUint8, D::kFloat32},
           interleaved ? std::vector<int64_t>{height * width, channels}
                       : std::vector<int64_t>{channels, height * width});
    points.image = image->pointer;
    points.bytes = image->dtype == D::kUint8;
  }
  require(points.dims() >= 1 && points.dims() <= kernels::kMaxDims, "features must be 1 to 32");
  require(height * width * (points.dims() + 1) <= INT32_MAX, "too many points for 32-bit numbers");
}

// Tiles, and 8-byte words of the scratch, for so many pixels and features.
std::pair<int64_t, int64_t> permutohedral_sizes(int64_t height, int64_t width, int64_t dims) {
  check_size(height, width);
  require(dims >= 1 && dims <= kernels::kMaxDims, "features must be 1 to 32");
  const cpu::Tiles tiles(static_cast<int32_t>(height), static_cast<int32_t>(width));
  return {tiles.count(), cpu::lattice_scratch_size(tiles.pixels(), static_cast<int32_t>(dims))};
}

// Returns M, V and the number of chunks; M = -1: a feature is not finite, -2: too wide a range.
std::tuple<int64_t, int64_t, int64_t> permutohedral_embed_cpu(
    const std::optional<Array>& image,  // [c, N] or [N, c], uint8 or float32
    const Array& slots,                 // [N, d + 1] int16, out
    const Array& weights,               // [N, d + 1] float32, out
    const Array& entries,               // [N, d + 1] int16, out
    const Array& first,                 // [T + 1] int32, out
    const Array& scratch,               // [permutohedral_sizes] int64, then for finish
    bool interleaved, const std::vector<double>& widths, const std::vector<double>& spatial,
    int64_t height, int64_t width, int64_t parts) {
  CheckedPoints p;
  set_points(p, image, interleaved, widths, spatial, height, width);
  const auto [tiles, words] = permutohedral_sizes(height, width, p.points.dims());
  const std::vector<int64_t> by_corner{height * width, p.points.dims() + 1};
  expect_output(slots, "slots", Device::kCpu, D::kInt16, by_corner);
  expect_output(weights, "weights", Device::kCpu, D::kFloat32, by_corner);
  expect_output(entries, "entries", Device::kCpu, D::kInt16, by_corner);
  expect_output(first, "first", Device::kCpu, D::kInt32, {tiles + 1});
  expect_output(scratch, "scratch", Device::kCpu, D::kInt64, {words});
  const cpu::Sizes sizes =
      cpu::embed(p.points, check_parts(parts), scratch.data<int64_t>(), slots.data<int16_t>(),
                 weights.data<float>(), entries.data<int16_t>(), first.data<int32_t>());
  return {sizes.vertices, sizes.listed, cpu::chunks_for(sizes.vertices, p.points.dims())};
}

void permutohedral_finish_cpu(const std::optional<Array>& image,  // as above
                              const Array& scratch,               // as embed left it
                              const Array& rows,                  // [V] int32, out
                              const Array& counts,                // [V] int16, out
                              const Array& lines,                 // [d + 1, M] int32, out
                              const Array& cuts,                  // [d + 1, chunks, 2] int32, out
                              bool interleaved, const std::vector<double>& widths,
                              const std::vector<double>& spatial, int64_t height, int64_t width,
                              int64_t parts) {
  CheckedPoints p;
  set_points(p, image, interleaved, widths, spatial, height, width);
  const int64_t words = permutohedral_sizes(height, width, p.points.dims()).second;
  expect_output(scratch, "scratch", Device::kCpu, D::kInt64, {words});
  require(rows.shape.size() == 1 && lines.shape.size() == 2, "rows must be [V], lines [d + 1, M]");
  expect_output(rows, "rows", Device::kCpu, D::kInt32, rows.shape);
  expect_output(counts, "counts", Device::kCpu, D::kInt16, rows.shape);
  expect_output(lines, "lines", Device::kCpu, D::kInt32, {p.points.dims() + 1, lines.shape[1]});
  expect_output(cuts, "cuts", Device::kCpu, D::kInt32,
                {p.points.dims() + 1, cpu::chunks_for(lines.shape[1], p.points.dims()), 2});
  cpu::finish(p.points, {lines.shape[1], rows.shape[0]}, check_parts(parts),
              scratch.data<int64_t>(), rows.data<uint32_t>(), counts.data<int16_t>(),
              lines.data<uint32_t>(), cuts.data<int32_t>());
}

// Elements of the scratch of the filter.
int64_t permutohedral_filter_scratch(const LatticeArrays& arrays, int64_t channels, int64_t height,
                                     int64_t width, int64_t parts) {
  require(channels >= 0 && channels < INT32_MAX, "channels must be in [0, 2^31)");
  const FilterCall call{static_cast<int32_t>(channels), nullptr, nullptr, false, check_parts(parts)};
  return channels == 0 ? 0 : cpu::filter_scratch_size(lattice_of(arrays, height, width), call);
}

void permutohedral_filter_cpu(const Array& values,                 // [C, N] float32 or float64
                              const LatticeArrays& arrays,         // LatticeArrays
                              const std::optional<Array>& before,  // [N] float32
                              const std::optional<Array>& after,   // [N] float32
                              const Array& scratch,                // [..._scratch]
                              const Array& result,                 // [C, N], out
                              bool reverse, int64_t height, int64_t width, int64_t parts) {
  const cpu::Lattice lattice = lattice_of(arrays, height, width);
  const int64_t pixels = lattice.tiles.pixels();
  require(values.shape.size() == 2 && values.shape[1] == pixels, "values must be [C, N]");
  expect(values, "values", Device::kCpu, {D::kFloat32, D::kFloat64}, values.shape);
  expect_output(result, "result", Device::kCpu, values.dtype, values.shape);
  if (values.shape[0] == 0) return;
  const FilterCall call{static_cast<int32_t>(values.shape[0]), factors_of(before, "before", pixels),
                        factors_of(after, "after", pixels), reverse, check_parts(parts)};
  expect_output(scratch, "scratch", Device::kCpu, values.dtype,
                {cpu::filter_scratch_size(lattice, call)});
  if (values.dtype == D::kFloat32)
    cpu::filter(lattice, call, values.data<const float>(), scratch.data<float>(),
                result.data<float>());
  else
    cpu::filter(lattice, call, values.data<const double>(), scratch.data<double>(),
                result.data<double>());
}

// factors <- 1 / sqrt(factors + 1e-20), or 1 / (factors + 1e-20): of ones that were filtered.
void permutohedral_normalise_cpu(const Array& factors,  // [N] float32, in and out
                                 bool symmetric) {
  expect_output(factors, "factors", Device::kCpu, D::kFloat32, factors.shape);
  float* values = factors.data<float>();
  cpu::normalise(values, factors.size(), symmetric);
}

}  // namespace

void bind_permutohedral(py::module_& m) {
  m.def("permutohedral_sizes", &permutohedral_sizes);
  m.def("permutohedral_embed_cpu", &permutohedral_embed_cpu, NoGil());
  m.def("permutohedral_finish_cpu", &permutohedral_finish_cpu, NoGil());
  m.def("permutohedral_filter_scratch", &permutohedral_filter_scratch, NoGil());
  m.def("permutohedral_filter_cpu", &permutohedral_filter_cpu, NoGil());
  m.def("permutohedral_normalise_cpu", &permutohedral_normalise_cpu, NoGil());
}

}  // namespace wsis
