// Every operator's schema, in one place. Kernels register themselves beside their code (TORCH_LIBRARY_IMPL); gradients, shapes for
// tracing and the plain-torch reference of each are in mswift/kernels/.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "common/isa.h"

TORCH_LIBRARY(mswift, m) {
  m.def("isa() -> str", []() -> std::string { return mswift::name_of(mswift::isa()); });
  m.def("built_for() -> str", []() -> std::string { return TORCH_VERSION; });
}
