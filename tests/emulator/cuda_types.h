// What CUDA declares beside the language: vector types, and a runtime with one device, one stream
// and no errors. The last part of cuda_emulator.h.
#pragma once

#include <cstddef>
#include <cstring>

// Vectors with the alignment that the device demands of them: the undefined-behaviour sanitizer
// sees an access that is not.
#define WSIS_VECTORS(type, scalar)                                   \
  struct alignas(2 * sizeof(scalar)) type##2 {                       \
    scalar x, y;                                                     \
  };                                                                 \
  struct alignas(sizeof(scalar) > 4 ? 16 : 4 * sizeof(scalar)) type##4 { \
    scalar x, y, z, w;                                               \
  };                                                                 \
  inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; } \
  inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
WSIS_VECTORS(float, float)
WSIS_VECTORS(double, double)
WSIS_VECTORS(int, int)
WSIS_VECTORS(uint, unsigned)

// ---- the runtime -------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  const wsis_emulator::Report report("cudaMemsetAsync", 1, 1, 0);
  wsis_emulator::wsis_count_write(memory, bytes);
  return std::memset(memory, value, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
