// What attention does to a tile of scores between its products, and how operands are laid out for them. AVX-512; bf16 needs avx512_bf16.
// A tile is kTile x kTile; what lies beyond a row of tokens is zero.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace mswift::attention {

constexpr int kTile = 64;
constexpr int kWide = 4 * kTile;  // columns of scores that the forward pass turns into weights at once

/// Which columns of a row of scores are seen: [first, last), both already cut to the tile.
struct Seen {
  int first, last;
};

/// Running softmax statistics of kTile queries.
struct Running {
  float peak[kTile], sum[kTile], rescale[kTile];
};

/// Scores -> weights in place of `p`; statistics moved on; `rescale` is what earlier output has to be multiplied by. `seen` has kTile entries.
void weights_tile(const float* scores, int columns, float scale, const Seen* seen, Running& running, float* p);
void weights_tile(const float* scores, int columns, float scale, const Seen* seen, Running& running, c10::BFloat16* p);

/// rows x columns: output *= rescale, row by row.
void rescale_rows(float* output, const float* rescale, int columns);

/// One row of output: sum / total, rounded to its type.
void finish_row(const float* output, float factor, int columns, float* to);
void finish_row(const float* output, float factor, int columns, c10::BFloat16* to);

/// Transposed scores and d weights (rows: keys, columns: queries) -> weights, d scores, and d scores as the right factor of a product.
/// `lse` and `delta` are of the queries; beyond the end of a row of tokens lse is +infinity.
void backward_tile(
    const float* scores, const float* d_weights, float scale, const float* lse, const float* delta, const Seen* seen, float* p, float* ds, float* ds_right);
void backward_tile(
    const float* scores, const float* d_weights, float scale, const float* lse, const float* delta, const Seen* seen, c10::BFloat16* p,
    c10::BFloat16* ds, c10::BFloat16* ds_right);

/// sum_j a[j] * b[j]
float dot(const float* a, const float* b, int columns);
float dot(const c10::BFloat16* a, const c10::BFloat16* b, int columns);

/// `rows` rows of `columns` values, zero rows up to kTile, as the right factor [kTile, columns] of a product.
void pack_right(const float* from, int64_t stride, int rows, int columns, float* to);
void pack_right(const c10::BFloat16* from, int64_t stride, int rows, int columns, c10::BFloat16* to);

/// The same, transposed: the right factor [columns, kTile].
void pack_right_transposed(const float* from, int64_t stride, int rows, int columns, float* to);
void pack_right_transposed(const c10::BFloat16* from, int64_t stride, int rows, int columns, c10::BFloat16* to);

/// The same, transposed, as a left factor [columns, kTile].
void pack_left_transposed(const float* from, int64_t stride, int rows, int columns, float* to);
void pack_left_transposed(const c10::BFloat16* from, int64_t stride, int rows, int columns, c10::BFloat16* to);

/// to[r, c] = from[c, r] for `rows` rows; `from` has kTile columns and `columns` rows.
void finish_transposed(const float* from, int rows, int columns, int64_t stride, float* to);
void finish_transposed(const float* from, int rows, int columns, int64_t stride, c10::BFloat16* to);

}  // namespace mswift::attention
