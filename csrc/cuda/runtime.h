// Facts about the CUDA runtime that is linked in.
#pragma once

#include <string>

namespace wsis::cuda {

// "13.0"; needs no driver.
std::string runtime_version();

}  // namespace wsis::cuda
