// Guards of the lattice and dense CRF functions on CUDA and the shapes of their arrays.
//
// Sizes: B images of H x W pixels, N = H * W; d features; t tiles of all images; M vertices of all
// images; R entries of all tiles' lists; C channels; S slots of the table, a power of two; L images
// of a lattice, B or 1. Arrays of uint16 come as int16, of uint64 as int64.
#if defined(WSIS_WITH_CUDA)
#include <pybind11/stl.h>

#include <limits>

#include "bindings/bindings.h"
#include "cuda/dense_crf.h"

namespace wsis {
namespace {

using D = DType;
using cuda::kTile;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

cuda::Tiling tiling_of(int64_t height, int64_t width) {
  require(height >= 1 && width >= 1 && height * width <= int64_t{1} << 30,
          "images must have between 1 and 2^30 pixels");
  return cuda::make_tiling(height, width);
}

// Tiles of an image.
int64_t permutohedral_tiles(int64_t height, int64_t width) {
  return tiling_of(height, width).tiles;
}

// Bytes of the layout of keys.
int64_t permutohedral_layout_size() { return sizeof(cuda::LatticeLayout); }

cuda::Points points_of(const std::optional<Array>& image, bool channels_last,
                       const std::vector<double>& spatial, const std::vector<double>& widths,
                       int64_t batch, int64_t pixels) {
  cuda::Points points{};
  require(spatial.empty() || spatial.size() == 2, "spatial must be (sx, sy) or empty");
  require(image.has_value() == !widths.empty(), "widths must be given for the channels");
  points.spatial = static_cast<int32_t>(spatial.size());
  points.channels = static_cast<int32_t>(widths.size());
  points.channels_last = channels_last;
  require(points.dims() >= 1 && points.dims() <= cuda::kMostFeatures,
          "there must be 1 to 15 features");
  if (image) {
    const auto channels = static_cast<int64_t>(widths.size());
    const std::vector<int64_t> planes{batch, channels, pixels}, rows{batch, pixels, channels};
    expect(*image, "image", kGpu, {D::kUint8, D::kFloat32}, channels_last ? rows : planes);
    points.image = image->data<const void>();
    points.is_uint8 = image->dtype == D::kUint8;
  }
  for (int32_t i = 0; i < points.dims(); ++i) {
    const double width = i < points.spatial ? spatial[i] : widths[i - points.spatial];
    require(width > 0, "widths must be positive");
    points.width[i] = static_cast<float>(width);
    points.scale[i] = kernels::axis_scale(i, points.dims());
  }
  return points;
}

cuda::Table table_of(const Array& table, int64_t probes) {
  const int64_t slots = table.size();
  require(slots >= 2 && (slots & (slots - 1)) == 0 && slots <= kMost,
          "table must have a power of two of slots");
  expect_output(table, "table", kGpu, D::kInt64, {slots});
  return {table.data<uint64_t>(), slots, probes};
}

void permutohedral_tiles_cuda(const std::optional<Array>& image,  // [B, c, N] or [B, N, c]
                              const Array& ranges,                // [c, 64, 2] float32, scratch
                              const Array& layout,                // [layout size] uint8, out
                              const Array& table,                 // [S] int64, out
                              const Array& weights,               // [t, d + 1, 256] float32, out
                              const Array& local,                 // [t, d + 1, 256] int16, out
                              const Array& order,                 // [t, (d + 1) * 256] int16, out
                              const Array& starts,                // [t, (d + 1) * 256] int16, out
                              const Array& slots,     // [t, (d + 1) * 256] int32, out
                              const Array& counts,    // [t] int32, out
                              const Array& counters,  // [3 + B] int32, out
                              int64_t height, int64_t width, bool channels_last,
                              const std::vector<double>& spatial,
                              const std::vector<double>& widths, int64_t probes,
                              uintptr_t stream) {
  const cuda::Tiling tiling = tiling_of(height, width);
  const int64_t batch = counters.size() - cuda::kCounters;
  require(batch >= 1, "counters must be [3 + B]");
  const cuda::Points points =
      points_of(image, channels_last, spatial, widths, batch, tiling.pixels());
  const int64_t tiles = batch * tiling.tiles, corners = points.dims() + 1;
  require(tiles * corners * kTile <= kMost, "too many points for one lattice");
  require(probes >= 1, "probes must be positive");
  expect_output(ranges, "ranges", kGpu, D::kFloat32, {points.channels, cuda::kRangeBlocks, 2});
  expect_output(layout, "layout", kGpu, D::kUint8, {permutohedral_layout_size()});
  expect_aligned(layout, "layout");
  expect_output(weights, "weights", kGpu, D::kFloat32, {tiles, corners, kTile});
  expect_output(local, "local", kGpu, D::kInt16, {tiles, corners, kTile});
  expect_output(order, "order", kGpu, D::kInt16, {tiles, corners * kTile});
  expect_output(starts, "starts", kGpu, D::kInt16, {tiles, corners * kTile});
  expect_output(slots, "slots", kGpu, D::kInt32, {tiles, corners * kTile});
  expect_output(counts, "counts", kGpu, D::kInt32, {tiles});
  expect_output(counters, "counters", kGpu, D::kInt32, {cuda::kCounters + batch});
  cuda::build_tiles(points, tiling, batch, ranges.data<float>(),
                    layout.data<cuda::LatticeLayout>(), table_of(table, probes),
                    {weights.data<float>(), local.data<uint16_t>(), order.data<uint16_t>(),
                     starts.data<uint16_t>(), slots.data<int32_t>(), counts.data<int32_t>()},
                    counters.data<int32_t>(), table.device_id, stream);
}

void permutohedral_keys_cuda(const Array& table,   // [S] int64
                             const Array& cursor,  // [1] int32, scratch
                             const Array& keys,    // [M] int64, out
                             uintptr_t stream) {
  expect_output(cursor, "cursor", kGpu, D::kInt32, {1});
  expect_output(keys, "keys", kGpu, D::kInt64, {keys.size()});
  cuda::collect_keys(table_of(table, 1), keys.size(), cursor.data<int32_t>(),
                     keys.data<int64_t>(), table.device_id, stream);
}

void permutohedral_vertices_cuda(const Array& layout,       // [layout size] uint8
                                 const Array& table,        // [S] int64
                                 const Array& keys,         // [M] int64, sorted
                                 const Array& first,        // [t + 1] int32
                                 const Array& counts,       // [t] int32
                                 const Array& slots,        // [t, (d + 1) * 256] int32
                                 const Array& tile_starts,  // [t, (d + 1) * 256] int16
                                 const Array& numbers,      // [S] int32, scratch
                                 const Array& rows,         // [R] int32, out
                                 const Array& starts,       // [R] int16, out
                                 const Array& neighbours,   // [d + 1, M + 1, 2] int32, out
                                 uintptr_t stream) {
  const int64_t tiles = counts.size(), vertices = keys.size(), entries = rows.size();
  require(neighbours.shape.size() == 3, "neighbours must be [d + 1, M + 1, 2]");
  const int64_t corners = neighbours.shape[0];
  require(corners >= 2 && corners <= cuda::kMostCorners, "there must be 1 to 15 features");
  require(tiles >= 1 && vertices >= 1, "a lattice must have vertices");
  expect(layout, "layout", kGpu, {D::kUint8}, {permutohedral_layout_size()});
  expect(keys, "keys", kGpu, {D::kInt64}, {vertices});
  expect(first, "first", kGpu, {D::kInt32}, {tiles + 1});
  expect(counts, "counts", kGpu, {D::kInt32}, {tiles});
  expect(slots, "slots", kGpu, {D::kInt32}, {tiles, corners * kTile});
  expect(tile_starts, "tile_starts", kGpu, {D::kInt16}, {tiles, corners * kTile});
  expect_output(numbers, "numbers", kGpu, D::kInt32, {table.size()});
  expect_output(rows, "rows", kGpu, D::kInt32, {entries});
  expect_output(starts, "starts", kGpu, D::kInt16, {entries});
  expect_output(neighbours, "neighbours", kGpu, D::kInt32, {corners, vertices + 1, 2});
  expect_aligned(neighbours, "neighbours");
  expect_aligned(layout, "layout");
  cuda::number_vertices(layout.data<const cuda::LatticeLayout>(), table_of(table, 1),
                        keys.data<const int64_t>(), vertices, static_cast<int32_t>(corners - 1),
                        tiles, first.data<const int32_t>(), counts.data<const int32_t>(),
                        slots.data<const int32_t>(), tile_starts.data<const uint16_t>(),
                        numbers.data<int32_t>(), rows.data<int32_t>(), starts.data<uint16_t>(),
                        neighbours.data<int32_t>(), table.device_id, stream);
}

// The arrays of a term, in this order; those after `most` may be missing.
//   weights [t, d + 1, 256] float32, local [t, d + 1, 256] int16, order [t, (d + 1) * 256] int16,
//   first [t + 1] int32, rows [R] int32, starts [R] int16, begin [M + 2] int32, list [R] int32,
//   neighbours [d + 1, M + 1, 2] int32, image_rows [L + 1] int32,
//   mix [C] or [C, C], partial [copies, R, quads, 4], scratch [2, copies, M + 1, quads, 4],
//   before [L, N] or None, after [L, N] or None (float32)
// copies: B if L = 1 < B, else 1; quads: ceil(C / 4). `most`: vertices of the largest image.
using TermArrays = std::vector<std::optional<Array>>;
constexpr size_t kTermArrays = 15;

template <class T>
cuda::Pairwise<T> term_of(const TermArrays& arrays, int64_t most, const cuda::FieldCall<T>& call,
                          DType dtype) {
  require(arrays.size() == kTermArrays, "a term must have 15 arrays");
  for (size_t i = 0; i + 2 < kTermArrays; ++i)
    require(arrays[i].has_value(), "only before and after may be missing");
  const Array &weights = *arrays[0], &rows = *arrays[4], &neighbours = *arrays[8],
              &mix = *arrays[10], &partial = *arrays[11], &scratch = *arrays[12];
  require(weights.shape.size() == 3 && neighbours.shape.size() == 3,
          "weights and neighbours must have three axes");
  const int64_t tiles = weights.shape[0], corners = weights.shape[1], entries = rows.size();
  const int64_t vertices = neighbours.shape[1] - 1, images = tiles / call.tiling.tiles;
  require(images * call.tiling.tiles == tiles && (images == 1 || images == call.batch),
          "a lattice must have one image, or those of the call, and their size");
  require(corners >= 2 && corners <= cuda::kMostCorners, "there must be 1 to 15 features");
  require(most >= 1 && most <= vertices, "most must be in [1, M]");
  const bool shared = images < call.batch;
  const int64_t copies = shared ? call.batch : 1, quads = (call.classes + 3) / 4;
  const bool matrix = mix.shape.size() == 2;
  const int64_t c = call.classes;
  expect(weights, "weights", kGpu, {D::kFloat32}, {tiles, corners, kTile});
  expect(*arrays[1], "local", kGpu, {D::kInt16}, {tiles, corners, kTile});
  expect(*arrays[2], "order", kGpu, {D::kInt16}, {tiles, corners * kTile});
  expect(*arrays[3], "first", kGpu, {D::kInt32}, {tiles + 1});
  expect(rows, "rows", kGpu, {D::kInt32}, {entries});
  expect(*arrays[5], "starts", kGpu, {D::kInt16}, {entries});
  expect(*arrays[6], "begin", kGpu, {D::kInt32}, {vertices + 2});
  expect(*arrays[7], "list", kGpu, {D::kInt32}, {entries});
  expect(neighbours, "neighbours", kGpu, {D::kInt32}, {corners, vertices + 1, 2});
  expect(*arrays[9], "image_rows", kGpu, {D::kInt32}, {images + 1});
  const std::vector<int64_t> square{c, c}, line{c};
  expect(mix, "mix", kGpu, {dtype}, matrix ? square : line);
  expect_output(partial, "partial", kGpu, dtype, {copies, entries, quads, 4});
  expect_output(scratch, "scratch", kGpu, dtype, {2, copies, vertices + 1, quads, 4});
  expect_aligned(partial, "partial");
  expect_aligned(scratch, "scratch");
  expect_aligned(neighbours, "neighbours");
  for (size_t i : {13, 14})
    if (arrays[i])
      expect(*arrays[i], "factors", kGpu, {D::kFloat32}, {images, call.tiling.pixels()});
  cuda::Pairwise<T> term{};
  term.lattice = {weights.data<const float>(),
                  arrays[1]->data<const uint16_t>(),
                  arrays[2]->data<const uint16_t>(),
                  arrays[3]->data<const int32_t>(),
                  rows.data<const int32_t>(),
                  arrays[5]->data<const uint16_t>(),
                  arrays[6]->data<const int32_t>(),
                  arrays[7]->data<const int32_t>(),
                  neighbours.data<const cuda::Sides>(),
                  arrays[9]->data<const int32_t>(),
                  vertices,
                  entries,
                  static_cast<int32_t>(corners),
                  static_cast<int32_t>(most),
                  shared};
  term.before = arrays[13] ? arrays[13]->data<const float>() : nullptr;
  term.after = arrays[14] ? arrays[14]->data<const float>() : nullptr;
  term.mix = mix.data<const T>();
  term.matrix = matrix;
  term.partial = partial.data<cuda::Quad<T>>();
  term.rows[0] = scratch.data<cuda::Quad<T>>();
  term.rows[1] = term.rows[0] + copies * (vertices + 1) * quads;
  return term;
}

template <class T>
cuda::Terms<T> terms_of(const std::vector<TermArrays>& terms, const std::vector<int64_t>& most,
                        const cuda::FieldCall<T>& call, DType dtype) {
  require(terms.size() <= cuda::kMostTerms, "at most 16 terms");
  require(terms.size() == most.size(), "most must have one number per term");
  cuda::Terms<T> all{};
  for (size_t k = 0; k < terms.size(); ++k)
    all.term[all.count++] = term_of<T>(terms[k], most[k], call, dtype);
  return all;
}

template <class T>
cuda::FieldCall<T> call_of(const Array& values, int64_t height, int64_t width) {
  const auto& s = values.shape;
  require(s.size() == 3, "values must be [B, C, N]");
  const cuda::Tiling tiling = tiling_of(height, width);
  expect(values, "values", kGpu, {D::kFloat32, D::kFloat64}, {s[0], s[1], tiling.pixels()});
  require(s[0] >= 1 && s[0] <= 65535, "there must be 1 to 65535 images");
  require(s[1] >= 1 && s[1] <= int64_t{1} << 20, "there must be 1 to 2^20 channels");
  cuda::FieldCall<T> call{};
  call.tiling = tiling;
  call.batch = s[0];
  call.classes = static_cast<int32_t>(s[1]);
  return call;
}

void permutohedral_filter_cuda(const Array& values,                   // [B, C, N] float32, float64
                               const Array& result,                   // [B, C, N], out
                               const std::vector<TermArrays>& terms,  // one
                               const std::vector<int64_t>& most, int64_t height, int64_t width,
                               bool reverse, int64_t shared_bytes, uintptr_t stream) {
  require(terms.size() == 1, "a filter has one term");
  visit_float(values, [&](auto type) {
    using T = decltype(type);
    auto call = call_of<T>(values, height, width);
    expect_output(result, "result", kGpu, values.dtype, values.shape);
    call.start = values.data<const T>();
    call.probs = result.data<T>();
    cuda::lattice_filter(call, terms_of(terms, most, call, values.dtype), reverse, shared_bytes,
                         values.device_id, stream);
  });
}

void dense_crf_cuda(const Array& unary,                    // [B, C, N] float32 or float64
                    const std::optional<Array>& start,     // [B, C, N]
                    const std::optional<Array>& probs,     // [B, C, N], out
                    const std::optional<Array>& labels,    // [B, N] uint8 or int32, out
                    const std::vector<TermArrays>& terms,  // at most 16
                    const std::vector<int64_t>& most, int64_t height, int64_t width,
                    int64_t iterations, int64_t shared_bytes, uintptr_t stream) {
  require(iterations >= 0, "iterations must not be negative");
  visit_float(unary, [&](auto type) {
    using T = decltype(type);
    auto call = call_of<T>(unary, height, width);
    call.unary = unary.data<const T>();
    if (start) {
      expect(*start, "start", kGpu, {unary.dtype}, unary.shape);
      call.start = start->data<const T>();
    }
    if (probs) {
      expect_output(*probs, "probs", kGpu, unary.dtype, unary.shape);
      call.probs = probs->data<T>();
    }
    if (labels) {
      const bool few = labels->dtype == D::kUint8;
      require(!few || call.classes <= 256, "uint8 holds at most 256 labels");
      expect_output(*labels, "labels", kGpu, few ? D::kUint8 : D::kInt32,
                    {unary.shape[0], unary.shape[2]});
      if (few) call.few_labels = labels->data<uint8_t>();
      if (!few) call.labels = labels->data<int32_t>();
    }
    cuda::mean_field(call, terms_of(terms, most, call, unary.dtype), iterations, shared_bytes,
                     unary.device_id, stream);
  });
}

}  // namespace

void bind_dense_crf_cuda(py::module_& m) {
  m.def("permutohedral_tiles", &permutohedral_tiles);
  m.def("permutohedral_layout_size", &permutohedral_layout_size);
  m.def("permutohedral_tiles_cuda", &permutohedral_tiles_cuda, NoGil());
  m.def("permutohedral_keys_cuda", &permutohedral_keys_cuda, NoGil());
  m.def("permutohedral_vertices_cuda", &permutohedral_vertices_cuda, NoGil());
  m.def("permutohedral_filter_cuda", &permutohedral_filter_cuda, NoGil());
  m.def("dense_crf_cuda", &dense_crf_cuda, NoGil());
}

}  // namespace wsis
#endif
