// An object with the buffer protocol and nothing else, around somebody else's array: what
// pydensecrf's results are. In Python a class can have this protocol from 3.12 on only.
#include "bindings/bindings.h"

namespace wsis {
namespace {

class BufferView {
 public:
  explicit BufferView(const py::buffer& array) : info_(array.request()) {}

  // The info made here goes to the consumer; info_ keeps the array alive and in its place.
  py::buffer_info view() const {
    return py::buffer_info(info_.ptr, info_.itemsize, info_.format, info_.ndim, info_.shape,
                           info_.strides, info_.readonly);
  }

 private:
  py::buffer_info info_;
};

}  // namespace

void bind_buffer(py::module_& m) {
  py::class_<BufferView>(m, "BufferView", py::buffer_protocol())
      .def(py::init<const py::buffer&>())
      .def_buffer(&BufferView::view);
}

}  // namespace wsis
