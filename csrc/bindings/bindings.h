// What every page of the bindings shares: one page per operator, listed in module.cpp.
//
// Arrays come as DLPack capsules, numpy arrays or anything with __dlpack__ (array_caster.h); they
// are contiguous and already checked by Python, and the guards here throw ValueError where a caller
// has not. Nothing is allocated: outputs and scratch are handed over. The GIL is released. `stream`
// is a CUDA stream as an integer.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/array_caster.h"

namespace wsis {

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

#if defined(WSIS_EMULATOR)
constexpr Device kGpu = Device::kCpu;  // tests run the CUDA sources on the host
#else
constexpr Device kGpu = Device::kCuda;
#endif

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void expect_float(const Array& array, const char* name, Device device) {
  expect(array, name, device, {DType::kFloat32, DType::kFloat64}, array.shape);
}

// Calls body with a value of the array's type, which is float32 or float64.
template <class Body>
void visit_float(const Array& array, Body body) {
  array.dtype == DType::kFloat32 ? body(float{}) : body(double{});
}

// Kernels that read or write vectors of 16 bytes need arrays that begin at a multiple of them; views
// into the middle of an array may not.
inline void expect_aligned(const Array& array, const char* name) {
  if (array.size() > 0 && reinterpret_cast<uintptr_t>(array.pointer) % 16 != 0)
    throw std::invalid_argument(std::string(name) +
                                " must be aligned to 16 bytes, got a view that is not");
}

}  // namespace wsis
