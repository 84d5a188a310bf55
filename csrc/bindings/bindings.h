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

}  // namespace wsis
