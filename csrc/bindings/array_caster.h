// Python object -> wsis::Array, without copying: a DLPack capsule, an object with the buffer
// protocol (numpy, read-only or not), or an object with __dlpack__ (cupy, jax, torch).
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/array.h"

namespace wsis::dlpack {

// The C ABI of DLPack (dmlc/dlpack, unversioned "dltensor" capsules).
struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null means contiguous
  uint64_t byte_offset;
};

constexpr int32_t kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13;
constexpr uint8_t kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4;

inline DType dtype_of(uint8_t code, int bits) {
  switch (code * 256 + bits) {
    case kUint * 256 + 8:
      return DType::kUint8;
    case kInt * 256 + 16:
      return DType::kInt16;
    case kInt * 256 + 32:
      return DType::kInt32;
    case kInt * 256 + 64:
      return DType::kInt64;
    case kFloat * 256 + 16:
      return DType::kFloat16;
    case kBfloat * 256 + 16:
      return DType::kBfloat16;
    case kFloat * 256 + 32:
      return DType::kFloat32;
    case kFloat * 256 + 64:
      return DType::kFloat64;
    default:
      return DType::kOther;
  }
}

inline bool is_contiguous(const std::vector<int64_t>& shape, const int64_t* strides, int64_t unit) {
  for (int64_t extent : shape)
    if (extent == 0) return true;
  int64_t expected = unit;
  for (size_t i = shape.size(); i-- > 0; expected *= shape[i]) {
    if (shape[i] != 1 && strides[i] != expected) return false;
  }
  return true;
}

inline Array from_tensor(const Tensor& tensor) {
  Array array;
  array.pointer = static_cast<char*>(tensor.data) + tensor.byte_offset;
  array.dtype = tensor.lanes == 1 ? dtype_of(tensor.code, tensor.bits) : DType::kOther;
  array.device_id = tensor.device_id;
  if (tensor.device_type == kCpu || tensor.device_type == kCudaHost) array.device = Device::kCpu;
  if (tensor.device_type == kCuda || tensor.device_type == kCudaManaged)
    array.device = Device::kCuda;
  array.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  array.contiguous = !tensor.strides || is_contiguous(array.shape, tensor.strides, 1);
  return array;
}

inline Array from_buffer(const Py_buffer& buffer) {
  const char* format = buffer.format ? buffer.format : "B";
  if (*format == '@' || *format == '=') ++format;
  uint8_t code = 255;
  if (format[0] && !format[1]) {
    if (std::string("bhilq").find(*format) != std::string::npos) code = kInt;
    if (std::string("BHILQ").find(*format) != std::string::npos) code = kUint;
    if (std::string("efd").find(*format) != std::string::npos) code = kFloat;
  }
  Array array;
  array.pointer = buffer.buf;
  array.dtype = dtype_of(code, static_cast<int>(buffer.itemsize * 8));
  array.device = Device::kCpu;
  array.shape.assign(buffer.shape, buffer.shape + buffer.ndim);
  array.contiguous = is_contiguous(array.shape, buffer.strides, buffer.itemsize);
  array.readonly = buffer.readonly;
  return array;
}

}  // namespace wsis::dlpack

namespace pybind11::detail {

template <>
struct type_caster<wsis::Array> {
  PYBIND11_TYPE_CASTER(wsis::Array, const_name("array"));

  type_caster() = default;
  type_caster(const type_caster&) = delete;
  type_caster(type_caster&& other) noexcept
      : value(std::move(other.value)), owner_(std::move(other.owner_)), buffer_(other.buffer_) {
    other.buffer_.obj = nullptr;
  }
  ~type_caster() {
    if (buffer_.obj) PyBuffer_Release(&buffer_);
  }

  bool load(handle source, bool) {
    if (PyCapsule_CheckExact(source.ptr())) {
      owner_ = reinterpret_borrow<object>(source);
    } else if (PyObject_CheckBuffer(source.ptr())) {
      if (PyObject_GetBuffer(source.ptr(), &buffer_, PyBUF_RECORDS_RO) != 0)
        throw error_already_set();
      value = wsis::dlpack::from_buffer(buffer_);
      return true;
    } else if (hasattr(source, "__dlpack__")) {
      // stream -1: no synchronisation; work is queued on the stream that the caller names.
      const auto device = source.attr("__dlpack_device__")().cast<std::pair<int, int>>();
      owner_ = device.first == wsis::dlpack::kCuda
                   ? object(source.attr("__dlpack__")(pybind11::arg("stream") = -1))
                   : object(source.attr("__dlpack__")());
    } else {
      return false;
    }
    // The capsule is only looked into while it lives: it keeps its name, and frees itself.
    auto* tensor =
        static_cast<wsis::dlpack::Tensor*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"));
    if (!tensor) throw error_already_set();
    value = wsis::dlpack::from_tensor(*tensor);
    return true;
  }

 private:
  object owner_;
  Py_buffer buffer_{};
};

}  // namespace pybind11::detail
