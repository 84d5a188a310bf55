// Guards of the mean field of a dense CRF, and the shapes of its arrays.
//
// Sizes: one image of N = H W pixels, C labels, K pairwise terms.
#include "cpu/dense_crf.h"

#include "bindings/permutohedral.h"

namespace wsis {
namespace {

using D = DType;
using Mixes = std::vector<std::vector<double>>;

struct Call {
  std::vector<cpu::Term> terms;
  cpu::CrfCall call{};
};

void set_call(Call& c, const std::vector<LatticeArrays>& lattices,
              const std::vector<std::optional<Array>>& before,
              const std::vector<std::optional<Array>>& after, const Mixes& mixes, int64_t labels,
              int64_t height, int64_t width, int64_t iterations, int64_t parts) {
  check_size(height, width);
  require(labels >= 1 && labels <= 1 << 15, "labels must be in [1, 2^15]");
  require(iterations >= 0 && iterations < INT32_MAX, "iterations must be in [0, 2^31)");
  const size_t terms = lattices.size();
  require(terms <= cpu::kMostTerms, "there must be at most 16 terms");
  require(before.size() == terms && after.size() == terms && mixes.size() == terms,
          "lattices, before, after and mixes must have one element per term");
  for (size_t k = 0; k < terms; ++k) {
    const auto numbers = static_cast<int64_t>(mixes[k].size());
    require(numbers == labels || numbers == labels * labels, "a mix must be [C] or [C, C]");
    const cpu::Lattice lattice = lattice_of(lattices[k], height, width);
    c.terms.push_back({lattice, factors_of(before[k], "before", height * width),
                       factors_of(after[k], "after", height * width), mixes[k].data(),
                       numbers != labels});
  }
  c.call = {c.terms.data(), static_cast<int32_t>(terms), static_cast<int32_t>(labels),
            static_cast<int32_t>(height), static_cast<int32_t>(width),
            static_cast<int32_t>(iterations), check_parts(parts)};
}

// Elements of the scratch. `same`: whether a term's `before` and `after` are the same array.
int64_t dense_crf_scratch(const std::vector<LatticeArrays>& lattices,
                          const std::vector<bool>& same, bool with_probs, int64_t labels,
                          int64_t height, int64_t width, int64_t parts) {
  require(same.size() == lattices.size(), "same must have one element per term");
  Call c;
  const std::vector<std::optional<Array>> none(lattices.size());
  const Mixes mixes(lattices.size(), std::vector<double>(labels));
  set_call(c, lattices, none, none, mixes, labels, height, width, 0, parts);
  for (size_t k = 0; k < same.size(); ++k)  // any address will do
    if (same[k]) c.terms[k].before = c.terms[k].after = c.terms[k].lattice.weights;
  return cpu::crf_scratch_size(c.call, with_probs);
}

// Returns false if a probability is not a number.
bool dense_crf_cpu(const Array& unary,                             // [C, N] float32 or float64
                   const std::optional<Array>& start,              // [C, N]
                   const std::vector<LatticeArrays>& lattices,     // K
                   const std::vector<std::optional<Array>>& before,  // K of [N] float32
                   const std::vector<std::optional<Array>>& after,   // K of [N] float32
                   const Mixes& mixes,                             // K of [C] or [C, C]
                   const Array& scratch,                           // [dense_crf_scratch]
                   const std::optional<Array>& probs,              // [C, N], out
                   const std::optional<Array>& labels,             // [N] uint8 or int32, out
                   int64_t height, int64_t width, int64_t iterations, int64_t parts) {
  require(unary.shape.size() == 2, "unary must be [C, N]");
  const std::vector<int64_t> shape{unary.shape[0], height * width};
  Call c;
  set_call(c, lattices, before, after, mixes, shape[0], height, width, iterations, parts);
  expect(unary, "unary", Device::kCpu, {D::kFloat32, D::kFloat64}, shape);
  if (start) expect(*start, "start", Device::kCpu, {unary.dtype}, shape);
  if (probs) {
    expect_output(*probs, "probs", Device::kCpu, unary.dtype, shape);
    require(probs->pointer != unary.pointer && (!start || probs->pointer != start->pointer),
            "probs must not lie where unary or start do");
  }
  const bool bytes = labels && labels->dtype == D::kUint8;
  if (labels) {
    expect_output(*labels, "labels", Device::kCpu, bytes ? D::kUint8 : D::kInt32, {shape[1]});
    require(!bytes || shape[0] <= 256, "labels must be int32 for more than 256 labels");
  }
  expect_output(scratch, "scratch", Device::kCpu, unary.dtype,
                {cpu::crf_scratch_size(c.call, probs.has_value())});
  const auto run = [&](auto type) {
    using T = decltype(type);
    return cpu::dense_crf<T>(c.call, unary.data<const T>(), start ? start->data<const T>() : nullptr,
                             scratch.data<T>(), probs ? probs->data<T>() : nullptr,
                             bytes ? labels->data<uint8_t>() : nullptr,
                             labels && !bytes ? labels->data<int32_t>() : nullptr);
  };
  return unary.dtype == D::kFloat32 ? run(float{}) : run(double{});
}

}  // namespace

void bind_dense_crf(py::module_& m) {
  m.def("dense_crf_scratch", &dense_crf_scratch, NoGil());
  m.def("dense_crf_cpu", &dense_crf_cpu, NoGil());
}

}  // namespace wsis
