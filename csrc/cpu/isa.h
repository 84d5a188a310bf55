// The instruction sets that the CPU kernels were compiled for.
#pragma once

#include <string>

#include "cpu/simd.h"

namespace wsis::cpu {

inline std::string isa_paths() {
#if defined(WSIS_TARGETS)
  return "baseline x86-64-v3 x86-64-v4";
#else
  return "baseline";
#endif
}

// The one that kernels run with here: the machine's best, or less if WSIS_ISA asks for it.
inline std::string isa_active() {
  const Isa isa = best_isa();
  return isa == Isa::kV4 ? "x86-64-v4" : isa == Isa::kV3 ? "x86-64-v3" : "baseline";
}

}  // namespace wsis::cpu
