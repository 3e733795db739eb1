// x W^T (or x W) with an adapter added in the same accumulators, for groups of rows. linear.cu holds the bf16 weights, quantised.cu the others.
#pragma once
#include "mswift_cuda.h"
#include "tile.cuh"

template <class B> struct Linear {
  Changed x;
  B weight;        // of the first group
  Matrix low, up;  // the adapter, of the first group; rank 0: none
  Dropout mask;    // of the adapter's product
  const void* bias;
  const float* column_scale;
  const int64_t *offsets, *group_seeds;
  const uint64_t *weight_table, *up_table, *bias_table;
  bf16 *out, *inner;
  int64_t rows, n, k, weight_stride, up_stride, bias_stride;
  int groups;
  float alpha;
  bool wide_bias;
};

// What a table says of a group, or what lies `stride` elements behind what the group before has
template <class T> __device__ __forceinline__ const T* start_of(const T* first, const uint64_t* table, int64_t stride, int group) {
  return table ? reinterpret_cast<const T*>(load(table + (FAULT(40) && group ? group - 1 : group))) : first + group * stride;
}
__device__ __forceinline__ float either(const void* values, int64_t at, bool fp32) {
  return fp32 ? load(static_cast<const float*>(values) + at) : widen(load(static_cast<const bf16*>(values) + at));
}
__device__ __forceinline__ void move_on(Plain& operand, const uint64_t* table, int64_t stride, int group) {
  operand.m.p = start_of(operand.m.p, table, stride, group);
  operand.m.wide = operand.m.wide && reinterpret_cast<uint64_t>(operand.m.p) % 16 == 0;
}
__device__ __forceinline__ void move_on(Quantised& operand, const uint64_t*, int64_t stride, int group) {
  const int64_t elements = group * stride;
  operand.codes += operand.block ? elements / 2 : elements;
  operand.scales += operand.block ? elements / operand.block : elements / operand.cols;
}

// The group and the rows of the tile-th tile of BM rows, counted over all groups; end 0: there is none. first: the group's first row.
struct Where {
  int64_t begin, end, first;
  int group;
};
template <int BM> __device__ __forceinline__ Where locate(const int64_t* offsets, int groups, int64_t rows, int64_t tile) {
  if (offsets == nullptr) return Where{tile * BM, rows, 0, 0};
  int64_t first = load(offsets);
  for (int g = 0; g < groups; g++) {
    const int64_t last = load(offsets + g + 1), tiles = (last - first + BM - 1) / BM;
    if (tile < tiles) return Where{first + tile * BM, last, first, FAULT(14) && g ? g - 1 : g};
    tile -= tiles;
    first = last;
  }
  return Where{0, 0, 0, 0};
}
// Each group has a mask of its own, whose rows count from the group's first.
__device__ __forceinline__ void of_group(Dropout& mask, const int64_t* seeds, int group, int64_t first) {
  if (seeds == nullptr || mask.threshold == 0) return;
  mask.seed = static_cast<uint64_t>(load(seeds + group));
  mask.first_row -= FAULT(25) ? 0 : first;
}

// The mask of the adapter's product.
template <class S> __device__ __forceinline__ void drop_tile(Tile<S>& acc, const Dropout& mask, int64_t row, int64_t column) {
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int j = 0; j < S::NF; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] *= dropout_factor(mask, row + row_of<S>(i, e), column + column_of<S>(j, e));
}
// What becomes of the sums of the tile at (where.begin, n0).
template <class S, class B> __device__ __forceinline__ void finish_tile(const Tile<S>& acc, const Linear<B>& l, const Where& where, int64_t n0) {
  const int bias_bytes = l.wide_bias ? sizeof(float) : sizeof(bf16);
  const bool biased = l.bias || l.bias_table;
  const char* bias = biased ? start_of(static_cast<const char*>(l.bias), l.bias_table, l.bias_stride * bias_bytes, where.group) : nullptr;
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = where.begin + row_of<S>(i, half * 2);
      if (row >= where.end) continue;
#pragma unroll
      for (int j = 0; j < S::NF; j++) {
        const int64_t column = n0 + column_of<S>(j, 0);
        float value[2] = {l.alpha * acc[i][j][half * 2], l.alpha * acc[i][j][half * 2 + 1]};
        if (l.inner) store_pair(l.inner + row * l.n, column, l.n, value[0], value[1], l.n % 2 == 0);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if (column + e < l.n && l.column_scale) value[e] *= load(l.column_scale + column + e);
          if (column + e < l.n && bias) value[e] += either(bias, column + e, l.wide_bias);
        }
        store_pair(l.out + row * l.n, column, l.n, value[0], value[1], l.n % 2 == 0);
      }
    }
}

template <class S, bool COLUMNS, class B> __global__ void __launch_bounds__(S::THREADS, 2) linear(const Linear<B> l) {
  DYNAMIC_SHARED(Chunk, stages, S::STAGE * STAGES);
  const Where where = locate<S::BM>(l.offsets, l.groups, l.rows, blockIdx.x);
  if (where.begin >= where.end) return;
  const int64_t n0 = static_cast<int64_t>(blockIdx.y) * (S::BN - (FAULT(20) ? 2 : 0));
  Tile<S> acc = {};
  if (l.low.cols) {
    Plain low{l.low}, up{l.up};
    low.m.rows = where.end;
    move_on(up, l.up_table, l.up_stride, where.group);
    multiply<S, false, COLUMNS>(acc, stages, low, up, where.begin, n0, 0, l.low.cols);
    if (l.mask.threshold) {
      Dropout mask = l.mask;
      of_group(mask, l.group_seeds, where.group, where.first);
      drop_tile<S>(acc, mask, where.begin, n0);
    }
  }
  if (l.k) {
    Changed x = l.x;
    x.m.rows = where.end;
    of_group(x.dropout, l.group_seeds, where.group, where.first);
    B weight = l.weight;
    move_on(weight, l.weight_table, l.weight_stride, where.group);
    multiply<S, false, COLUMNS>(acc, stages, x, weight, where.begin, n0, 0, l.k);
  }
  finish_tile<S>(acc, l, where, n0);
}

// Host: the arguments as kernels take them.
template <bool COLUMNS, class B> Linear<B> linear_of(const mswift_linear_args& a, const B& weight) {
  const int64_t rank = a.low ? a.rank : 0, k = a.weight || a.weight_table ? a.k : 0, groups = a.offsets ? a.groups : 1;
  return Linear<B>{Changed{matrix(a.x, a.rows, k, a.x_stride), dropout(a.x_dropout), a.x_column_scale},
                    weight,
                    matrix(a.low, a.rows, rank, rank),
                    COLUMNS ? matrix(a.up, rank, a.n, a.n) : matrix(a.up, a.n, rank, rank),
                    dropout(a.adapter_dropout),
                    a.bias,
                    a.column_scale,
                    a.offsets,
                    a.offsets ? a.group_seeds : nullptr,
                    a.weight_table,
                    a.up_table,
                    a.bias_table,
                    static_cast<bf16*>(a.out),
                    static_cast<bf16*>(a.inner),
                    a.rows,
                    a.n,
                    k,
                    a.weight_stride,
                    a.up_stride,
                    a.bias_stride,
                    static_cast<int>(groups),
                    a.alpha,
                    a.bias_dtype == 0};
}

template <class S, bool COLUMNS, class B> int run_linear(const mswift_linear_args& a, const B& weight, void* stream) {
  const Linear<B> l = linear_of<COLUMNS>(a, weight);
  // An upper bound of the tiles: every group may end within one. Blocks without a tile leave at once.
  const int64_t tiles = (a.rows + S::BM - 1) / S::BM + (a.offsets ? l.groups : 0), across = (a.n + S::BN - 1) / S::BN;
  if (a.rows == 0 || a.n == 0) return 0;
  if (tiles > 0x7fffffff || across > 65535) return MSWIFT_UNSUPPORTED;
  return launch(linear<S, COLUMNS, B>, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(across)), dim3(S::THREADS), S::BYTES,
                static_cast<Stream>(stream), l);
}

int run_quantised(const mswift_linear_args& args, void* stream);
int run_hopper(const mswift_linear_args& args, void* stream);  // MSWIFT_UNSUPPORTED: not here, or not these sizes
