// Guards of random walks and the shapes of their arrays.
//
// Sizes: B images, C maps, K offsets, H W image. All arrays have one dtype, float32 or float64.
// `coefficients` [steps + 1] are those of the Chebyshev polynomials of T, or empty for `steps` plain
// products.
#include "cpu/random_walk.h"

#include "bindings/stencil.h"
#if defined(WSIS_WITH_CUDA)
#include "cuda/random_walk.h"
#endif

namespace wsis {
namespace {

using Offsets = std::vector<int64_t>;
using Coefficients = std::vector<double>;

cpu::Walk make_walk(int64_t batch, int64_t maps, int64_t height, int64_t width,
                    const Offsets& offsets, bool symmetric, int64_t parts) {
  require(batch >= 0 && maps >= 0 && maps < kMostPixels, "there must be fewer than 2^26 maps");
  cpu::Walk walk{};
  walk.batch = batch;
  walk.maps = static_cast<int32_t>(maps);
  walk.offsets = check_offsets(offsets, height, width);
  walk.planes = static_cast<int32_t>(offsets.size() / 2);
  walk.height = static_cast<int32_t>(height);
  walk.width = static_cast<int32_t>(width);
  walk.symmetric = symmetric;
  walk.parts = check_parts(parts);
  return walk;
}

// What both devices have in common.
cpu::Walk check(const Array& maps, const Array& affinity, const Array& result,
                const Offsets& offsets, bool symmetric, bool transposed, int64_t exponent,
                int64_t steps, const Coefficients& coefficients, int64_t parts, Device device) {
  require(maps.shape.size() == 4, "maps must be [B, C, H, W]");
  const auto& s = maps.shape;
  cpu::Walk walk = make_walk(s[0], s[1], s[2], s[3], offsets, symmetric, parts);
  expect_float(maps, "maps", device);
  expect(affinity, "affinity", device, {maps.dtype}, {s[0], walk.planes, s[2], s[3]});
  expect_output(result, "result", device, maps.dtype, s);
  require(exponent >= 1 && exponent <= INT32_MAX, "exponent must be positive");
  require(steps >= 1, "steps must be positive");
  require(coefficients.empty() || static_cast<int64_t>(coefficients.size()) == steps + 1,
          "coefficients must be steps + 1 numbers or none");
  require(coefficients.empty() || symmetric, "coefficients need a symmetric affinity");
  walk.transposed = transposed;
  walk.exponent = static_cast<int32_t>(exponent);
  walk.steps = steps;
  walk.coefficients = coefficients.empty() ? nullptr : coefficients.data();
  return walk;
}

// Elements of the scratch of random_walk_cpu.
int64_t random_walk_scratch(int64_t batch, int64_t maps, int64_t height, int64_t width,
                            const Offsets& offsets, bool symmetric) {
  return cpu::random_walk_scratch(make_walk(batch, maps, height, width, offsets, symmetric, 1));
}

void random_walk_cpu(const Array& maps,      // [B, C, H, W]
                     const Array& affinity,  // [B, K, H, W]
                     const Array& scratch,   // [random_walk_scratch]
                     const Array& result,    // [B, C, H, W], out
                     const Offsets& offsets, bool symmetric, bool transposed, int64_t exponent,
                     int64_t steps, const Coefficients& coefficients, int64_t parts) {
  const cpu::Walk walk = check(maps, affinity, result, offsets, symmetric, transposed, exponent,
                               steps, coefficients, parts, Device::kCpu);
  expect_output(scratch, "scratch", Device::kCpu, maps.dtype, {cpu::random_walk_scratch(walk)});
  if (maps.size() == 0) return;
  visit_float(maps, [&](auto type) {
    using T = decltype(type);
    cpu::random_walk(maps.data<const T>(), affinity.data<const T>(), walk, scratch.data<T>(),
                     result.data<T>());
  });
}

#if defined(WSIS_WITH_CUDA)
void random_walk_cuda(const Array& maps,      // [B, C, H, W]
                      const Array& affinity,  // [B, K, H, W]
                      const Array& result,    // [B, C, H, W], out
                      const Array& powers,    // [B, K, H, W], scratch
                      const Array& inverse,   // [B, H, W], scratch
                      const Array& buffers,   // [2, B, C, H, W], scratch
                      const Offsets& offsets, bool symmetric, bool transposed, int64_t exponent,
                      int64_t steps, const Coefficients& coefficients, uintptr_t stream) {
  const cpu::Walk walk = check(maps, affinity, result, offsets, symmetric, transposed, exponent,
                               steps, coefficients, 1, kGpu);
  const auto& s = maps.shape;
  check_grid(s[0], s[2], s[3], s[1]);
  expect_output(powers, "powers", kGpu, maps.dtype, affinity.shape);
  expect_output(inverse, "inverse", kGpu, maps.dtype, {s[0], s[2], s[3]});
  expect_output(buffers, "buffers", kGpu, maps.dtype, {2, s[0], s[1], s[2], s[3]});
  if (maps.size() == 0) return;
  visit_float(maps, [&](auto type) {
    using T = decltype(type);
    cuda::random_walk(maps.data<const T>(), affinity.data<const T>(), walk,
                      {maps.device_id, stream}, powers.data<T>(), inverse.data<T>(),
                      buffers.data<T>(), result.data<T>());
  });
}
#endif

}  // namespace

void bind_random_walk(py::module_& m) {
  m.def("random_walk_scratch", &random_walk_scratch);
  m.def("random_walk_cpu", &random_walk_cpu, NoGil());
#if defined(WSIS_WITH_CUDA)
  m.def("random_walk_cuda", &random_walk_cuda, NoGil());
#endif
}

}  // namespace wsis
