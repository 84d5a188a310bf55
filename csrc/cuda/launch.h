// Launching kernels: the only place where the syntax of nvcc is used, so that tests can compile the
// same .cu files with the host compiler (they put an emulator of the CUDA runtime in its place).
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(WSIS_EMULATOR)
#include WSIS_EMULATOR
#else
#include <cuda_runtime.h>
#define WSIS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define WSIS_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* name = reinterpret_cast<type*>(name##_raw)
#endif

namespace wsis::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current for its lifetime. The static runtime of this module has its own idea of
// the current device, so torch's cannot be relied on.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// Shared memory that every block may use without asking the device for more.
constexpr int64_t kSharedBytes = 48 * 1024;

// Blocks for a grid-stride loop over n elements: enough to fill the largest GPU a few times over.
inline unsigned grid_size(int64_t n, int64_t block, int64_t most = 2048) {
  return static_cast<unsigned>(std::clamp<int64_t>((n + block - 1) / block, 1, most));
}

}  // namespace wsis::cuda
