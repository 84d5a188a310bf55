#include "cuda/launch.h"
#include "cuda/runtime.h"

namespace wsis::cuda {

std::string runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace wsis::cuda
