// Every operator's schema, in one place. Kernels register themselves beside their code (TORCH_LIBRARY_IMPL); gradients, shapes for
// tracing and the plain-torch reference of each are in mswift/kernels/.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "common/isa.h"

TORCH_LIBRARY(mswift, m) {
  m.def("isa() -> str", []() -> std::string { return mswift::name_of(mswift::isa()); });
  m.def("built_for() -> str", []() -> std::string { return TORCH_VERSION; });

  // attention
  m.def(
      "causal_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor? sinks, float scale, int window, int chunk) -> (Tensor out, Tensor lse)");
  m.def(
      "causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bounds, float scale, int window, "
      "int chunk) -> (Tensor, Tensor, Tensor)");

  // the head and its loss
  m.def(
      "linear_softmax(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int valid, float scale, float cap, int gradient) -> "
      "(Tensor stats, Tensor mean, Tensor mean2)");
  m.def(
      "linear_softmax_grad_weight(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor factors, int valid, float scale, float cap) -> "
      "(Tensor grad_weight, Tensor grad_bias)");
  // between the products
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool zero_centred) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, bool zero_centred) -> Tensor");
  m.def("gated_activation(Tensor x, float slope, float cubic, float limit, float offset) -> Tensor");
  m.def("gated_activation_backward(Tensor grad, Tensor x, float slope, float cubic, float limit, float offset) -> Tensor");
  m.def("rotate(Tensor x, Tensor table, bool interleaved, bool back) -> Tensor");
}
