// Vectors of the machine that runs, from one source: a kernel is a functor whose
// `template <int kBytes> void run() const` is written with vectors of kBytes bytes, and dispatch()
// calls the one compiled for the best instruction set: 16 bytes for the baseline (SSE2), 32 for
// x86-64-v3 (AVX2 + FMA), 64 for x86-64-v4 (AVX-512).
//
// Why not target_clones: a vector wider than the machine's registers lives on the stack there, so
// the width must differ with the instruction set. Everything that run() calls must be WSIS_INLINE,
// or it would be compiled for the baseline.
//
// The environment variable WSIS_ISA (baseline, x86-64-v3) lowers the choice, for tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/parallel.h"
#include "kernels/platform.h"

// Vectors are only passed between inlined functions, so their calling convention does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define WSIS_INLINE inline __attribute__((always_inline))
#define WSIS_INLINE_LAMBDA __attribute__((always_inline))  // after the parameters

#if defined(__x86_64__) && defined(__GNUC__)
#define WSIS_TARGETS
#endif

namespace wsis::cpu {

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

template <class V, class T>
WSIS_INLINE V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class T>
WSIS_INLINE void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

}  // namespace wsis::cpu

namespace wsis::kernels {

// The primary template, for scalars, is in the kernels' own headers.
template <class V>
struct Element;

template <class T, int kBytes>
struct VectorElement {
  using V = cpu::Vector<T, kBytes>;
  using Scalar = T;
  using Bits = cpu::Vector<uint32_t, kBytes>;
  static constexpr int kCount = kBytes / sizeof(T);
  // Within 1 ulp for float, and 0 below 1e-30. The library's function would be called lane by lane,
  // as it may set errno: Newton steps for 1 / sqrt(x) from the usual guess in the exponent, a last
  // one for the root itself.
  static WSIS_INLINE V square_root(V x) {
    if constexpr (sizeof(T) == sizeof(float)) {
      Bits bits;
      std::memcpy(&bits, &x, sizeof(V));
      bits = 0x5f3759dfu - (bits >> 1);
      V r;
      std::memcpy(&r, &bits, sizeof(V));
      for (int step = 0; step < 3; ++step) r *= 1.5f - 0.5f * x * r * r;
      const V root = x * r;
      const V limited = x > 3.4028234e38f ? x : root + 0.5f * r * (x - root * root);
      return x < 1e-30f ? V{} : limited;
    } else {
      for (int i = 0; i < kCount; ++i) x[i] = std::sqrt(x[i]);
      return x;
    }
  }
  static WSIS_INLINE V exponential(V x) {
    for (int i = 0; i < kCount; ++i) x[i] = std::exp(x[i]);
    return x;
  }
};
template <>
struct Element<cpu::Vector<float, 16>> : VectorElement<float, 16> {};
template <>
struct Element<cpu::Vector<float, 32>> : VectorElement<float, 32> {};
template <>
struct Element<cpu::Vector<float, 64>> : VectorElement<float, 64> {};
template <>
struct Element<cpu::Vector<double, 16>> : VectorElement<double, 16> {};
template <>
struct Element<cpu::Vector<double, 32>> : VectorElement<double, 32> {};
template <>
struct Element<cpu::Vector<double, 64>> : VectorElement<double, 64> {};

}  // namespace wsis::kernels

namespace wsis::cpu {

// ---- dispatch ----------------------------------------------------------------------------------

enum class Isa { kBaseline, kV3, kV4 };

// What the machine has, lowered by WSIS_ISA; decided at the first call.
inline Isa best_isa() {
  static const Isa isa = [] {
    Isa best = Isa::kBaseline;
#if defined(WSIS_TARGETS)
    __builtin_cpu_init();
    const auto has = [](bool v4) {
      return v4 ? __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl")
                : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    };
    if (has(false)) best = has(true) ? Isa::kV4 : Isa::kV3;
#endif
    const char* wish = std::getenv("WSIS_ISA");
    if (wish && std::strcmp(wish, "baseline") == 0) return Isa::kBaseline;
    if (wish && std::strcmp(wish, "x86-64-v3") == 0 && best == Isa::kV4) return Isa::kV3;
    return best;
  }();
  return isa;
}

#if defined(WSIS_TARGETS)
template <class Kernel>
__attribute__((target("arch=x86-64-v4"))) void run_v4(const Kernel& kernel) {
  kernel.template run<64>();
}
template <class Kernel>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const Kernel& kernel) {
  kernel.template run<32>();
}
#endif

template <class Kernel>
void dispatch(const Kernel& kernel) {
#if defined(WSIS_TARGETS)
  if (best_isa() == Isa::kV4) return run_v4(kernel);
  if (best_isa() == Isa::kV3) return run_v3(kernel);
#endif
  kernel.template run<16>();
}

// A range of plain loops, which the compiler makes vectors of.
template <class Body>
struct Loops {
  const Body& body;
  int part;
  int64_t begin, end;

  template <int kBytes>
  WSIS_INLINE void run() const {
    body(part, begin, end);
  }
};

// parallel_for with the body, a WSIS_INLINE_LAMBDA, compiled for every instruction set.
template <class Body>
void parallel_loops(int64_t n, int parts, const Body& body) {
  parallel_for(n, parts, [&](int part, int64_t begin, int64_t end) {
    dispatch(Loops<Body>{body, part, begin, end});
  });
}

}  // namespace wsis::cpu
