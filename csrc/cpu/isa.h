// The instruction sets that the CPU kernels were compiled for.
#pragma once

#include <string>

#include "cpu/parallel.h"

namespace wsis::cpu {

inline std::string isa_paths() {
#if defined(WSIS_CLONES)
  return "baseline x86-64-v3 x86-64-v4";
#else
  return "baseline";
#endif
}

// The clone that the loader picked on this machine.
inline std::string isa_active() {
#if defined(WSIS_CLONES)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace wsis::cpu
