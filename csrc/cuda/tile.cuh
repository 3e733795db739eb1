// The matrix product that every kernel here is built on: a block's tile of C = A B in registers, operands through a ring of shared-memory
// stages filled by cp.async, tensor cores by mma.sync m16n8k16 (bf16 in, fp32 sums).
//
// An operand is a row-major matrix of global memory, read in tiles of rows x 16-byte chunks. A: [M, K], or [K, M] if A_COLUMNS.
// B: [N, K] (a weight as torch keeps it), or [K, N] if B_COLUMNS. Rows and columns beyond an operand's limits are zeros.
#pragma once
#include "mask.cuh"

constexpr int BK = 32, STAGES = 3;

template <int BM_, int BN_, int WARPS_M_, int WARPS_N_> struct Shape {
  static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
  static constexpr int THREADS = WARPS_M * WARPS_N * WARP;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MF = WM / 16, NF = WN / 8;
  static constexpr int A_CHUNKS = BM * BK / 8, B_CHUNKS = BN * BK / 8, STAGE = A_CHUNKS + B_CHUNKS;
  static constexpr size_t BYTES = static_cast<size_t>(STAGE) * STAGES * sizeof(Chunk);
  static_assert(MF * 16 * WARPS_M == BM && NF * 8 * WARPS_N == BN && NF % 2 == 0, "whole fragments, two at a time along N");
};
using Large = Shape<128, 128, 2, 4>;  // 64 x 32 a warp
using Thin = Shape<128, 64, 4, 2>;    // narrow N, as of an adapter: 32 x 32 a warp
using Flat = Shape<64, 128, 2, 4>;    // narrow M: 32 x 32 a warp

template <class S> using Tile = float[S::MF][S::NF][4];

// Where chunk c of row r of a tile lies: neighbouring rows are spread over the banks, so that ldmatrix meets no conflict.
template <int CHUNKS> __device__ __forceinline__ int place(int r, int c) { return r * CHUNKS + (c ^ (CHUNKS == 4 ? (r >> 1) & 3 : r & 7)); }

// --- operands
struct Matrix {
  const bf16* p;
  int64_t stride;
  int64_t rows, cols;  // limits
  bool wide;           // 16-byte accesses are allowed
};
inline Matrix matrix(const void* p, int64_t rows, int64_t cols, int64_t stride) {
  return Matrix{static_cast<const bf16*>(p), stride, rows, cols, wide_rows<bf16>(p, stride)};
}

__device__ __forceinline__ int valid_columns(const Matrix& m, int64_t row, int64_t col) {
  const int64_t left = row < m.rows + (FAULT(10) ? 1 : 0) && col < m.cols ? m.cols - col : 0;
  return left < 8 ? static_cast<int>(left) : 8;
}
__device__ __forceinline__ void fetch_values(float (&value)[8], const Matrix& m, int64_t row, int64_t col) {
  const int valid = valid_columns(m, row, col);
  if (valid == 8 && m.wide) {
    unpack<bf16>(value, load(reinterpret_cast<const Chunk*>(m.p + row * m.stride + col)));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) value[i] = i < valid ? widen(load(m.p + row * m.stride + col + i)) : 0.0f;
}

// As it is: past the registers where the alignment allows it.
struct Plain {
  Matrix m;
  __device__ __forceinline__ void fetch(SharedPtr<Chunk> tile, int index, int64_t row, int64_t col) const {
    if (m.wide) {
      const int valid = valid_columns(m, row, col);
      copy_async(tile, index, valid ? m.p + row * m.stride + col : m.p, valid * 2);
      return;
    }
    float value[8];
    fetch_values(value, m, row, col);
    tile[index] = packed<bf16>(value);
  }
};
// With dropout, or with a factor for each column, where asked for.
struct Changed {
  Matrix m;
  Dropout dropout;
  const float* column_scale;
  __device__ __forceinline__ void fetch(SharedPtr<Chunk> tile, int index, int64_t row, int64_t col) const {
    if (dropout.threshold == 0 && column_scale == nullptr) return Plain{m}.fetch(tile, index, row, col);
    float value[8];
    fetch_values(value, m, row, col);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (dropout.threshold) value[i] *= dropout_factor(dropout, row, col + i);
      if (column_scale && col + i < m.cols) value[i] *= load(column_scale + col + i);
    }
    tile[index] = packed<bf16>(value);
  }
};
// The quantiles of a normal distribution between -1 and 1 (QLoRA, appendix E).
CONSTANT_TABLE float NF4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                                -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
// Quantised weights, dequantised on their way to shared memory. int8: one fp32 scale a row. nf4: two codes a byte, the first in the high
// half, one fp32 scale for every `block` elements of the flattened matrix (a multiple of 8), as bitsandbytes keeps them.
struct Quantised {
  const uint8_t* codes;
  const float* scales;
  int64_t rows, cols;
  int block;  // 0: int8
  __device__ __forceinline__ void fetch(SharedPtr<Chunk> tile, int index, int64_t row, int64_t col) const {
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; i++) value[i] = 0.0f;
    if (row < rows && col < cols) {  // cols is a multiple of 8: a chunk is inside or outside
      const int64_t at = row * cols + col;
      if (block) {
        const uint32_t codes4 = load(reinterpret_cast<const uint32_t*>(codes + at / 2));
        const float scale = load(scales + at / block);
#pragma unroll
        for (int i = 0; i < 8; i++) value[i] = NF4[(codes4 >> (8 * (i / 2) + ((i % 2) ^ (FAULT(11) ? 1 : 0) ? 0 : 4))) & 15] * scale;
      } else {
        const float scale = load(scales + row);
        for (int half = 0; half < 2; half++) {
          const uint32_t codes4 = load(reinterpret_cast<const uint32_t*>(codes + at + 4 * half));
#pragma unroll
          for (int i = 0; i < 4; i++) value[4 * half + i] = static_cast<float>(static_cast<int8_t>(codes4 >> (8 * i))) * scale;
        }
      }
    }
    tile[index] = packed<bf16>(value);
  }
};

template <int ROWS, int CHUNKS, int THREADS, class O> __device__ __forceinline__ void fetch_tile(SharedPtr<Chunk> tile, const O& operand, int64_t row, int64_t col) {
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    const int r = i / CHUNKS, c = i % CHUNKS;
    operand.fetch(tile, FAULT(24) ? i : place<CHUNKS>(r, c), row + r, col + c * 8);
  }
}

// acc += A[m0 .. m0 + BM, k0 .. k1) B[k0 .. k1, n0 .. n0 + BN). k0 is a multiple of 8; beyond k1 the operands have to end as well,
// unless k1 - k0 is a multiple of BK. Ends with a barrier: the stages may be used again.
template <class S, bool A_COLUMNS, bool B_COLUMNS, class A, class B>
__device__ __forceinline__ void multiply(Tile<S>& acc, SharedPtr<Chunk> stages, const A& a, const B& b, int64_t m0, int64_t n0, int64_t k0, int64_t k1) {
  constexpr int KC = BK / 8, MC = S::BM / 8, NC = S::BN / 8;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, wm = warp / S::WARPS_N * S::WM, wn = warp % S::WARPS_N * S::WN;
  const int steps = static_cast<int>((k1 - k0 + BK - 1) / BK);
  auto fill = [&](int step) {
    const SharedPtr<Chunk> stage = stages + step % STAGES * S::STAGE;
    const int64_t k = k0 + static_cast<int64_t>(step) * BK;
    if (A_COLUMNS) fetch_tile<BK, MC, S::THREADS>(stage, a, k, m0);
    else fetch_tile<S::BM, KC, S::THREADS>(stage, a, m0, k);
    if (B_COLUMNS) fetch_tile<BK, NC, S::THREADS>(stage + S::A_CHUNKS, b, k, n0);
    else fetch_tile<S::BN, KC, S::THREADS>(stage + S::A_CHUNKS, b, n0, k);
  };
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) fill(s);
    copy_commit();
  }
  for (int step = 0; step < steps; step++) {
    if (FAULT(12)) copy_wait<STAGES - 1>();
    else copy_wait<STAGES - 2>();
    if (!FAULT(13)) sync_block();  // this stage is there, and everybody is done with the one that is filled next
    if (step + STAGES - 1 < steps) fill(step + STAGES - 1);
    copy_commit();
    const SharedPtr<Chunk> tile_a = stages + step % STAGES * S::STAGE, tile_b = tile_a + S::A_CHUNKS;
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      uint32_t left[S::MF][4], right[S::NF][2];
#pragma unroll
      for (int i = 0; i < S::MF; i++) {
        const int m = wm + i * 16;
        if (A_COLUMNS) load_matrices<true>(left[i], tile_a, place<MC>(k + (lane & 7) + (lane >> 4) * 8, m / 8 + ((lane >> 3) & 1)));
        else load_matrices<false>(left[i], tile_a, place<KC>(m + (lane & 7) + ((lane >> 3) & 1) * 8, k / 8 + (lane >> 4)));
      }
#pragma unroll
      for (int j = 0; j < S::NF; j += 2) {
        uint32_t both[4];
        const int n = wn + j * 8;
        if (B_COLUMNS) load_matrices<true>(both, tile_b, place<NC>(k + (lane & 7) + ((lane >> 3) & 1) * 8, n / 8 + (lane >> 4)));
        else load_matrices<false>(both, tile_b, place<KC>(n + (lane & 7) + (lane >> 4) * 8, k / 8 + ((lane >> 3) & 1)));
        right[j][0] = both[0], right[j][1] = both[1], right[j + 1][0] = both[2], right[j + 1][1] = both[3];
      }
#pragma unroll
      for (int i = 0; i < S::MF; i++)
#pragma unroll
        for (int j = 0; j < S::NF; j++) multiply_add(acc[i][j], left[i], right[j]);
    }
  }
  copy_wait<0>();
  sync_block();
}

// Position within the block's tile of element e of fragment (i, j) of this thread.
template <class S> __device__ __forceinline__ int row_of(int i, int e) {
  return threadIdx.x / WARP / S::WARPS_N * S::WM + i * 16 + threadIdx.x % WARP / 4 + e / 2 * 8;
}
template <class S> __device__ __forceinline__ int column_of(int j, int e) {
  return threadIdx.x / WARP % S::WARPS_N * S::WN + j * 8 + threadIdx.x % 4 * 2 + e % 2;
}

// Two neighbouring elements (the columns col, col + 1) of a row, as one word where both are there and the address allows it.
__device__ __forceinline__ void store_pair(bf16* row, int64_t col, int64_t cols, float first, float second, bool even) {
  if (even && col + 1 < cols) {
    store(reinterpret_cast<uint32_t*>(row + col), pack(first, second));
    return;
  }
  if (col < cols) store(row + col, narrow<bf16>(first));
  if (col + 1 < cols) store(row + col + 1, narrow<bf16>(second));
}
