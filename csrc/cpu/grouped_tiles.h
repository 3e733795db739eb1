// Products of rows with the weight of their group in bf16, straight from a weight as it lies: with few rows a group, packing a weight as
// oneDNN wants it costs as much as the product. AVX512-BF16. bf16 is passed as uint16_t, all sums are fp32, each output is rounded once.
#pragma once
#include <cstdint>

namespace mswift::grouped {

/// Of a dropout mask (common/dropout.h); threshold 0: none. Row i, column j here are row i, column first_column + j of the mask of `seed`;
/// columns from full_width on are zeros. The factor 256 / (256 - threshold) is the caller's.
struct Mask {
  uint64_t seed;
  int64_t first_row;
  uint32_t first_column, full_width, threshold;
};

/// sum over `depth` of x[m, k] w[n, k], or of x[m, k] w[k, n] if the weight is read by columns.
struct Factors {
  const uint16_t* x;
  int64_t x_stride;
  const uint16_t* w;
  int64_t w_stride, depth;
};

struct Output {
  uint16_t* to;
  int64_t stride;
  const float* bias;  // of the columns, or null
  float alpha;        // of the sum, before the bias
};

/// Rows [0, rows) and columns [first, last): to = alpha (base + adapter) + bias; `first` is a multiple of kColumns.
constexpr int64_t kColumns = 64;
void by_rows(const Factors& base, const Factors& adapter, const Output& output, int64_t rows, int64_t first, int64_t last);
/// The same with weights read by columns, and the adapter's part masked.
void by_columns(const Factors& base, const Factors& adapter, const Mask& mask, const Output& output, int64_t rows, int64_t first, int64_t last);

/// to[i, j] = from[i, j] where the mask keeps it, else 0; rows are dense in `to`.
void masked_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, const Mask& mask, uint16_t* to);

}  // namespace mswift::grouped
