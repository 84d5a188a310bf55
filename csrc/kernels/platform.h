// What every kernel header needs: functions for host and device, and element types.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define WSIS_HD __host__ __device__ __forceinline__
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
