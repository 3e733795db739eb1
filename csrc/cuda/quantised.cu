// Products with int8 and nf4 weights, which are dequantised tile by tile on their way to shared memory and never exist as a whole.
#include "linear.cuh"

int run_quantised(const mswift_linear_args& a, void* stream) {
  const int64_t width = a.columns ? a.n : a.k;
  if (width % 8 || a.thin || a.weight_table || (a.weight_kind == 2 && (a.weight_block <= 0 || a.weight_block % 8))) return MSWIFT_UNSUPPORTED;
  const Quantised weight{static_cast<const uint8_t*>(a.weight),
                         a.weight_scales,
                         a.columns ? a.k : a.n,
                         width,
                         a.weight_kind == 2 ? a.weight_block : 0};
  return a.columns ? run_linear<Large, true>(a, weight, stream) : run_linear<Large, false>(a, weight, stream);
}
