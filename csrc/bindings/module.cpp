// The module wsis._C: one function per operator enters its functions.
#include "bindings/bindings.h"
#include "cpu/isa.h"
#if defined(WSIS_WITH_CUDA)
#include "cuda/runtime.h"
#endif

namespace wsis {

void bind_buffer(py::module_& m);
void bind_memory(py::module_& m);
void bind_confusion(py::module_& m);
void bind_normalize(py::module_& m);
void bind_gated_crf(py::module_& m);
void bind_local_affinity(py::module_& m);
void bind_pixel_correlation(py::module_& m);
void bind_pseudo_masks(py::module_& m);
void bind_permutohedral(py::module_& m);
void bind_dense_crf(py::module_& m);
void bind_random_walk(py::module_& m);
void bind_stencil_affinity(py::module_& m);
void bind_score_boxes(py::module_& m);
#if defined(WSIS_WITH_CUDA)
void bind_dense_crf_cuda(py::module_& m);
#endif

namespace {

// What was built and what this machine uses of it; strings only.
py::dict build_info() {
  py::dict info;
  info["version"] = WSIS_VERSION;
  info["compiler"] = WSIS_COMPILER;
  info["isa_paths"] = cpu::isa_paths();    // as compiled, separated by blanks
  info["isa_active"] = cpu::isa_active();  // the one of this machine
#if defined(WSIS_WITH_CUDA)
  info["cuda_archs"] = WSIS_CUDA_ARCHS;
  info["cuda_compiler"] = WSIS_CUDA_COMPILER;
  info["cuda_runtime"] = cuda::runtime_version();
#else
  info["cpu_only_because"] = WSIS_CPU_ONLY_BECAUSE;
#endif
  return info;
}

}  // namespace
}  // namespace wsis

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &wsis::build_info);
  wsis::bind_buffer(m);
  wsis::bind_memory(m);
  wsis::bind_confusion(m);
  wsis::bind_normalize(m);
  wsis::bind_gated_crf(m);
  wsis::bind_local_affinity(m);
  wsis::bind_pixel_correlation(m);
  wsis::bind_pseudo_masks(m);
  wsis::bind_permutohedral(m);
  wsis::bind_dense_crf(m);
  wsis::bind_random_walk(m);
  wsis::bind_stencil_affinity(m);
  wsis::bind_score_boxes(m);
#if defined(WSIS_WITH_CUDA)
  wsis::bind_dense_crf_cuda(m);
#endif
}
