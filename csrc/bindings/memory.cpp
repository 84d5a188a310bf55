// Advice about memory that Python has allocated.
#include "cpu/memory.h"

#include "bindings/bindings.h"

namespace wsis {
namespace {

void prefer_huge_pages(const Array& array) {  // float32 or float64, not yet written
  expect_float(array, "array", Device::kCpu);
  visit_float(array, [&](auto type) {
    cpu::prefer_huge_pages(array.pointer, array.size() * int64_t{sizeof(type)});
  });
}

}  // namespace

void bind_memory(py::module_& m) { m.def("prefer_huge_pages", &prefer_huge_pages, NoGil()); }

}  // namespace wsis
