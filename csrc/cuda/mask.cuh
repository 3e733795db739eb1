// The dropout mask of ../common/dropout.h as kernels take it.
#pragma once
#include "../common/dropout.h"
#include "device.cuh"
#include "mswift_cuda.h"

struct Dropout {
  uint64_t seed;
  int64_t first_row;
  uint32_t first_column, full_width, threshold;  // columns at or beyond the full width are zeros; threshold 0: no dropout
  float factor;                                  // of what is kept
};
// the factor of one element, whose row and column count from the matrix that is here
__device__ __forceinline__ float dropout_factor(const Dropout& d, int64_t row, int64_t column) {
  const uint32_t c = static_cast<uint32_t>(column) + (FAULT(9) ? 0 : d.first_column);
  return c < d.full_width && mswift_keep(d.seed, d.first_row + row, c, d.threshold) ? d.factor : 0.0f;
}

inline Dropout dropout(const mswift_dropout& d) {
  const float factor = d.unscaled ? 1.0f : 256.0f / (256.0f - static_cast<float>(d.threshold));
  return Dropout{d.seed, d.first_row, d.first_column, d.full_width, d.threshold, factor};
}
