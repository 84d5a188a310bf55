// A view of somebody else's array, and the guards of the bindings. Owns nothing.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/platform.h"

namespace wsis {

enum class Device { kCpu, kCuda, kOther };

struct Array {
  void* pointer = nullptr;
  DType dtype = DType::kOther;
  Device device = Device::kOther;
  int device_id = 0;
  bool contiguous = false;
  bool readonly = false;
  std::vector<int64_t> shape;

  int64_t size() const {
    int64_t product = 1;
    for (int64_t extent : shape) product *= extent;
    return product;
  }
  template <class T>
  T* data() const {
    return static_cast<T*>(pointer);
  }
};

inline std::string to_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline std::string to_string(DType dtype) {
  static const char* const names[] = {"uint8",    "int16",   "int32",   "int64", "float16",
                                      "bfloat16", "float32", "float64", "other"};
  return names[static_cast<int>(dtype)];
}

// Throws std::invalid_argument unless `array` is a contiguous array of one of the dtypes, with this
// shape, on this device; Python has checked already, so a failure here is a bug in the caller.
inline void expect(const Array& array, const char* name, Device device,
                   std::initializer_list<DType> dtypes, const std::vector<int64_t>& shape) {
  const auto fail = [&](const std::string& want, const std::string& got) {
    throw std::invalid_argument(std::string(name) + " must be " + want + ", got " + got);
  };
  if (array.device != device) fail(device == Device::kCpu ? "on the CPU" : "on CUDA", "another");
  bool known = false;
  std::string wanted;
  for (DType dtype : dtypes) {
    known = known || dtype == array.dtype;
    wanted += (wanted.empty() ? "" : " or ") + to_string(dtype);
  }
  if (!known) fail(wanted, to_string(array.dtype));
  if (array.shape != shape) fail("of shape " + to_string(shape), to_string(array.shape));
  if (!array.contiguous) fail("contiguous", "a strided array");
}

// The same for an array that is written to.
inline void expect_output(const Array& array, const char* name, Device device, DType dtype,
                          const std::vector<int64_t>& shape) {
  expect(array, name, device, {dtype}, shape);
  if (array.readonly) throw std::invalid_argument(std::string(name) + " is read-only");
}

}  // namespace wsis
