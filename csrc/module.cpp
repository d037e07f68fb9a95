// anyflow_kernels._C: importing it registers the kernels; its attributes say how they were built.
#include <pybind11/pybind11.h>

#ifndef ANYFLOW_CUDA
#define ANYFLOW_CUDA "" // architectures, as nvcc calls them
#endif

namespace {

// Read from the file before it is loaded: a library made for another torch, for instructions that this processor lacks,
// or for other schemas may not survive loading.
[[gnu::used]] constexpr char STAMP[] =
    "anyflow_kernels built for torch " ANYFLOW_TORCH " on " ANYFLOW_CPU " with schemas " ANYFLOW_SCHEMAS;

} // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("stamp") = STAMP;
  m.attr("torch") = ANYFLOW_TORCH;
  m.attr("instruction_set") = ANYFLOW_CPU;
#if defined(__clang__)
  m.attr("compiler") = "Clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "GCC " __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
  m.attr("cuda_architectures") = pybind11::tuple(pybind11::str(ANYFLOW_CUDA).attr("split")());
}
