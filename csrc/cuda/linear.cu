// Products with bf16 weights: LoRA's down-projection, a linear layer with its adapter, the gradient of its input, experts.
#include "linear.cuh"

extern "C" int mswift_linear(const mswift_linear_args* args, void* stream) {
  const mswift_linear_args& a = *args;
  if (a.weight_kind) return run_quantised(a, stream);
  const int hopper = run_hopper(a, stream);
  if (hopper != MSWIFT_UNSUPPORTED) return hopper;
  const Plain weight{a.columns ? matrix(a.weight, a.k, a.n, a.n) : matrix(a.weight, a.n, a.k, a.k)};
  if (a.columns) return a.thin ? run_linear<Thin, true>(a, weight, stream) : run_linear<Large, true>(a, weight, stream);
  return a.thin ? run_linear<Thin, false>(a, weight, stream) : run_linear<Large, false>(a, weight, stream);
}
