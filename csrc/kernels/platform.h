// What every kernel header needs: functions for host and device, and element types.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define WSIS_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: a function left on its own would be compiled for the baseline instruction set, and
// would take vectors in other registers than its caller (cpu/simd.h).
#define WSIS_HD inline __attribute__((always_inline))
#else
#define WSIS_HD inline
#endif

namespace wsis {

enum class DType : int32_t {
  kUint8,
  kInt16,
  kInt32,
  kInt64,
  kFloat16,
  kBfloat16,
  kFloat32,
  kFloat64,
  kOther,
};

}  // namespace wsis
