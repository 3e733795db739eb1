// Every operator's schema, in one place. Kernels register themselves beside their code (TORCH_LIBRARY_IMPL); gradients, shapes for
// tracing and the plain-torch reference of each are in mswift/kernels/.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "common/isa.h"

TORCH_LIBRARY(mswift, m) {
  m.def("isa() -> str", []() -> std::string { return mswift::name_of(mswift::isa()); });
  m.def("built_for() -> str", []() -> std::string { return TORCH_VERSION; });

  // attention; q [s, b, heads, d], or [s, b, groups, heads of each, d] where no stride leads from head to head
  m.def(
      "causal_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor? sinks, float scale, int window, int chunk) -> (Tensor out, Tensor lse)");
  m.def(
      "causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bounds, float scale, int window, "
      "int chunk) -> (Tensor, Tensor, Tensor)");

  // the head and its loss
  m.def(
      "linear_softmax(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int valid, float scale, float cap, int gradient) -> "
      "(Tensor stats, Tensor mean, Tensor mean2)");
  //   the same for a weight that is trained; kept: memory of its gradient, which holds logits meanwhile; more: at most `room` bytes of them besides.
  //   Kernels for the CPU only, as for _kept
  m.def(
      "linear_softmax_keeping(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int valid, float scale, bool gradient, int room) -> "
      "(Tensor stats, Tensor mean, Tensor kept, Tensor more, Tensor references)");
  m.def(
      "linear_softmax_grad_weight(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor factors, int valid, float scale, float cap) -> "
      "(Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "linear_softmax_grad_weight_kept(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor factors, Tensor(a!) kept, Tensor more, "
      "Tensor references, int valid, float scale) -> Tensor grad_bias");

  // a frozen linear layer with a low-rank adapter, x [tokens, in], weight [out, in], a [rank, in], b [out, rank]:
  //   low = scale dropout(x) a^T;  out = factor (x weight^T + low b^T) + bias;  inner: out without factor and bias, empty without a factor
  // factor: fp32 [out], DoRA's. ids: int64 [tokens], the adapter of each token of the `adapters` whose ranks lie side by side in a and b, or -1.
  // dropout: [threshold, seed, first row, first column, full width] of csrc/common/dropout.h, threshold 0 for none.
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? factor, Tensor? ids, int adapters, float scale, int[] dropout) -> "
      "(Tensor out, Tensor low, Tensor inner)");
  //   grad_low = scale (factor grad) b;  grad_x = (factor grad) weight + mask (grad_low a), empty unless `wanted`
  m.def(
      "lora_linear_grad_input(Tensor grad, Tensor weight, Tensor a, Tensor b, Tensor? factor, Tensor? ids, int adapters, float scale, int[] dropout, "
      "bool wanted) -> (Tensor grad_x, Tensor grad_low)");
  //   grad_a = grad_low^T dropout(x);  grad_b = (factor grad)^T low;  grad_factor: fp32 [out], sums of grad inner; empty without a factor
  m.def(
      "lora_linear_grad_factors(Tensor grad, Tensor x, Tensor low, Tensor grad_low, Tensor? factor, Tensor inner, int[] dropout) -> "
      "(Tensor grad_a, Tensor grad_b, Tensor grad_factor)");
  // x where the mask keeps it, times 256 / (256 - threshold); 0 elsewhere
  m.def("lora_dropout(Tensor x, int[] dropout) -> Tensor");

  // rows sorted by group, a weight for each group
  m.def(
      "grouped_product(Tensor x, Tensor[] weights, Tensor counts, Tensor[] biases, Tensor? low, Tensor[] up, bool columns, float alpha, Tensor? seeds, "
      "int threshold, int first_column, int full_width) -> Tensor");
  m.def("grouped_outer(Tensor a, Tensor b, Tensor counts, Tensor? seeds, int threshold, int first_column, int full_width) -> Tensor");
  // rows to the order of their experts and back; what has a negative index comes from, or goes, nowhere. Kernels for CUDA only
  m.def("gather_rows(Tensor x, Tensor index) -> Tensor");
  m.def("combine_rows(Tensor x, Tensor index, Tensor? weights) -> Tensor");
  m.def("combine_rows_backward(Tensor grad, Tensor x, Tensor index, Tensor? weights) -> (Tensor grad_x, Tensor grad_weights)");
  // a weight [rows, columns] of nf4 codes (block > 0) or int8 codes (block 0): x weight^T + low up^T + bias, by columns x weight + mask (low up)
  m.def(
      "quantised_product(Tensor x, Tensor codes, Tensor scales, int rows, int columns, int block, Tensor? bias, Tensor? low, Tensor? up, "
      "bool by_columns, int[] dropout) -> Tensor");
  // between the products
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool zero_centred) -> (Tensor y, Tensor rstd)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool zero_centred) -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def("rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor rstd, bool zero_centred, bool of_weight) -> (Tensor, Tensor)");
  m.def("gated_activation(Tensor x, float slope, float cubic, float limit, float offset) -> Tensor");
  m.def("gated_activation_backward(Tensor grad, Tensor x, float slope, float cubic, float limit, float offset) -> Tensor");
  m.def("rotate(Tensor x, Tensor table, bool interleaved, bool back) -> Tensor");
  // in place: x [s, b, ...] holds heads of `width` columns side by side, of every `each` of which the first `turned` are rotated
  m.def("rotate_(Tensor(a!) x, Tensor table, int width, int each, int turned, bool interleaved, bool back) -> ()");
}
