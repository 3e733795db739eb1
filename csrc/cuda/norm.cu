// RMS norm with the residual added first, and sums over rows. A row is read once: it waits in shared memory for its own mean.
#include "device.cuh"
#include "mswift_cuda.h"

namespace {
constexpr int THREADS = 256;

struct Norm {
  const void *x, *residual, *weight, *dy;
  void *y, *sum;
  float *rstd, *partial;
  int64_t rows, cols;
  float eps;
  bool zero_centred, wide;
};

template <class T> __global__ void __launch_bounds__(THREADS) rms_norm_forward(const Norm n) {
  constexpr int P = Pack<T>::SIZE;
  const int packs = static_cast<int>((n.cols + P - 1) / P), tid = threadIdx.x;
  DYNAMIC_SHARED(Chunk, cache, packs);
  SHARED(float, scratch, THREADS / WARP);
  const int64_t at = blockIdx.x * n.cols;
  const T *x = static_cast<const T*>(n.x) + at, *residual = n.residual ? static_cast<const T*>(n.residual) + at : nullptr;
  const T* weight = static_cast<const T*>(n.weight);
  if (FAULT(3) && tid >= packs) return;
  float squares = 0.0f;
  for (int p = tid; p < packs; p += THREADS) {
    float value[P];
    load_pack(value, x, p * P, n.cols, n.wide);
    if (residual) {
      float more[P];
      load_pack(more, residual, p * P, n.cols, n.wide);
#pragma unroll
      for (int i = 0; i < P; i++) value[i] = widen(narrow<T>(value[i] + more[i]));
      store_pack(value, static_cast<T*>(n.sum) + at, p * P, n.cols, n.wide);
    }
#pragma unroll
    for (int i = 0; i < P; i++) squares += value[i] * value[i];
    cache[p] = packed<T>(value);
  }
  const float rstd = rsqrtf(block_sum<THREADS>(squares, scratch) / n.cols + n.eps);
  if (tid == 0) store(n.rstd + blockIdx.x, rstd);
  for (int p = tid; p < packs; p += THREADS) {
    float value[P], factor[P];
    unpack<T>(value, cache[p]);
    load_pack(factor, weight, p * P, n.cols, n.wide);
#pragma unroll
    for (int i = 0; i < P; i++) value[i] *= rstd * (factor[i] + (n.zero_centred ? 1.0f : 0.0f));
    store_pack(value, static_cast<T*>(n.y) + at, p * P, n.cols, n.wide);
  }
}

// Each block takes rows blockIdx.x, + gridDim.x, ... and keeps the weight's gradient of its rows in shared memory: no atomics.
template <class T> __global__ void __launch_bounds__(THREADS, 4) rms_norm_backward(const Norm n) {
  constexpr int P = Pack<T>::SIZE, F = P / 4;
  const int packs = static_cast<int>((n.cols + P - 1) / P), tid = threadIdx.x;
  DYNAMIC_SHARED(Chunk, cache, packs * (n.partial ? 2 + F : 2));
  SHARED(float, scratch, THREADS / WARP);
  const SharedPtr<Chunk> of_dy = cache, of_x = cache + packs, of_weight = cache + 2 * packs;
  const T* weight = static_cast<const T*>(n.weight);
  for (int p = tid; n.partial && p < packs * F; p += THREADS) of_weight[p] = Chunk{{0, 0, 0, 0}};
  if (F > 1) sync_block();
  for (int64_t row = blockIdx.x; row < n.rows; row += gridDim.x) {
    const int64_t at = row * n.cols;
    const float rstd = load(n.rstd + row);
    float dot = 0.0f;
    for (int p = tid; p < packs; p += THREADS) {
      float dy[P], x[P], factor[P];
      load_pack(dy, static_cast<const T*>(n.dy) + at, p * P, n.cols, n.wide);
      load_pack(x, static_cast<const T*>(n.x) + at, p * P, n.cols, n.wide);
      load_pack(factor, weight, p * P, n.cols, n.wide);
      of_dy[p] = packed<T>(dy);
      of_x[p] = packed<T>(x);
#pragma unroll
      for (int i = 0; i < P; i++) dot += dy[i] * x[i] * (factor[i] + (n.zero_centred ? 1.0f : 0.0f));
#pragma unroll
      for (int f = 0; n.partial && f < F; f++) {
        float sum[4];
        unpack<float>(sum, of_weight[p * F + f]);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += dy[f * 4 + i] * x[f * 4 + i] * rstd;
        of_weight[p * F + f] = packed<float>(sum);
      }
    }
    const float mean = block_sum<THREADS>(dot, scratch) * rstd * rstd / n.cols;
    for (int p = tid; p < packs; p += THREADS) {
      float dy[P], x[P], factor[P], more[P] = {};
      unpack<T>(dy, of_dy[p]);
      unpack<T>(x, of_x[p]);
      load_pack(factor, weight, p * P, n.cols, n.wide);
      if (n.residual) load_pack(more, static_cast<const T*>(n.residual) + at, p * P, n.cols, n.wide);
#pragma unroll
      for (int i = 0; i < P; i++) dy[i] = more[i] + rstd * (dy[i] * (factor[i] + (n.zero_centred ? 1.0f : 0.0f)) - x[i] * mean);
      store_pack(dy, static_cast<T*>(n.y) + at, p * P, n.cols, n.wide);
    }
  }
  for (int p = tid; n.partial && p < packs; p += THREADS)
    for (int f = 0; f < F; f++) {
      float sum[4];
      unpack<float>(sum, of_weight[p * F + f]);
      store_pack(sum, n.partial + blockIdx.x * n.cols, p * P + f * 4, n.cols, n.cols % 4 == 0);
    }
}

// out[c] = sum over rows of partial[r, c]; a warp reads 32 neighbouring columns, the warps of a block share the rows
__global__ void __launch_bounds__(THREADS) sum_partials(const float* partial, float* out, int rows, int64_t cols) {
  SHARED(float, sums, THREADS);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * WARP + lane;
  float sum = 0.0f;
  if (column < cols)
    for (int r = warp; r < rows; r += THREADS / WARP) sum += load(partial + r * cols + column);
  sums[threadIdx.x] = sum;
  if (!FAULT(4)) sync_block();
  if (warp == 0 && column < cols) {
    for (int w = 1; w < THREADS / WARP; w++) sum += sums[w * WARP + lane];
    store(out + column, sum);
  }
}

template <class T> __global__ void __launch_bounds__(THREADS) column_sum(const void* a, const void* b, float* partial, int64_t rows, int64_t cols, int64_t stride,
                                                                               bool wide) {
  constexpr int P = Pack<T>::SIZE;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * P;
  if (column >= cols) return;
  float sum[P] = {};
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    float left[P], right[P];
    load_pack(left, static_cast<const T*>(a) + row * stride, column, cols, wide);
    if (b) load_pack(right, static_cast<const T*>(b) + row * stride, column, cols, wide);
#pragma unroll
    for (int i = 0; i < P; i++) sum[i] += b ? left[i] * right[i] : left[i];
  }
#pragma unroll
  for (int i = 0; i < P; i++)
    if (column + i < cols) store(partial + blockIdx.y * cols + column + i, sum[i]);
}

int norm_blocks(int64_t rows) { return static_cast<int>(rows < MSWIFT_NORM_BLOCKS ? rows : MSWIFT_NORM_BLOCKS); }
int finish_sum(const float* partial, float* out, int blocks, int64_t cols, Stream stream) {
  return launch(sum_partials, dim3(static_cast<unsigned>((cols + WARP - 1) / WARP)), dim3(THREADS), 0, stream, partial, out, blocks, cols);
}
template <class T> size_t row_bytes(int64_t cols, int arrays) { return (cols + Pack<T>::SIZE - 1) / Pack<T>::SIZE * sizeof(Chunk) * arrays; }
}  // namespace

extern "C" int mswift_rms_norm_forward(int dtype, const void* x, const void* residual, const void* weight, void* y, void* sum, float* rstd, int64_t rows,
                                       int64_t cols, float eps, int zero_centred, void* stream) {
  if (rows == 0) return 0;
  Norm n{x, residual, weight, nullptr, y, sum, rstd, nullptr, rows, cols, eps, zero_centred != 0, false};
  const dim3 grid(static_cast<unsigned>(rows)), block(THREADS);
  if (dtype == 1) {
    n.wide = wide_rows<bf16>(x, cols) && wide_rows<bf16>(residual, 0) && wide_rows<bf16>(weight, 0) && wide_rows<bf16>(y, 0) && wide_rows<bf16>(sum, 0);
    return launch(rms_norm_forward<bf16>, grid, block, row_bytes<bf16>(cols, 1), static_cast<Stream>(stream), n);
  }
  n.wide = wide_rows<float>(x, cols) && wide_rows<float>(residual, 0) && wide_rows<float>(weight, 0) && wide_rows<float>(y, 0) && wide_rows<float>(sum, 0);
  return launch(rms_norm_forward<float>, grid, block, row_bytes<float>(cols, 1), static_cast<Stream>(stream), n);
}

extern "C" int mswift_rms_norm_backward(int dtype, const void* dy, const void* dsum, const void* x, const void* weight, const float* rstd, void* dx,
                                        float* partial, float* dweight, int64_t rows, int64_t cols, int zero_centred, void* stream) {
  Norm n{x, dsum, weight, dy, dx, nullptr, const_cast<float*>(rstd), dweight ? partial : nullptr, rows, cols, 0.0f, zero_centred != 0, false};
  const int blocks = norm_blocks(rows);
  if (rows > 0) {
    const bool places = wide_rows<float>(x, 0) && wide_rows<float>(dsum, 0) && wide_rows<float>(weight, 0) && wide_rows<float>(dy, 0) && wide_rows<float>(dx, 0);
    n.wide = places && (dtype == 1 ? wide_rows<bf16>(x, cols) : wide_rows<float>(x, cols));
    const int sums = n.partial ? (dtype == 1 ? 2 : 1) : 0;
    const int error = dtype == 1
        ? launch(rms_norm_backward<bf16>, dim3(blocks), dim3(THREADS), row_bytes<bf16>(cols, 2 + sums), static_cast<Stream>(stream), n)
        : launch(rms_norm_backward<float>, dim3(blocks), dim3(THREADS), row_bytes<float>(cols, 2 + sums), static_cast<Stream>(stream), n);
    if (error) return error;
  }
  return dweight ? finish_sum(partial, dweight, blocks, cols, static_cast<Stream>(stream)) : 0;
}

extern "C" int mswift_column_sum(int dtype, const void* a, const void* b, float* partial, float* out, int64_t rows, int64_t cols, int64_t stride,
                                 void* stream) {
  const int blocks = norm_blocks(rows), pack = dtype == 1 ? Pack<bf16>::SIZE : Pack<float>::SIZE;
  if (rows > 0) {
    const bool wide = wide_rows<float>(b, 0) && (dtype == 1 ? wide_rows<bf16>(a, stride) : wide_rows<float>(a, stride));
    const dim3 grid(static_cast<unsigned>((cols + THREADS * pack - 1) / (THREADS * pack)), blocks);
    const int error = dtype == 1 ? launch(column_sum<bf16>, grid, dim3(THREADS), 0, static_cast<Stream>(stream), a, b, partial, rows, cols, stride, wide)
                                 : launch(column_sum<float>, grid, dim3(THREADS), 0, static_cast<Stream>(stream), a, b, partial, rows, cols, stride, wide);
    if (error) return error;
  }
  return finish_sum(partial, out, blocks, cols, static_cast<Stream>(stream));
}

#if defined(__CUDACC__)
extern "C" const char* mswift_cuda_error(int code) {
  return code == MSWIFT_UNSUPPORTED ? "a size that the kernel does not do" : cudaGetErrorString(static_cast<cudaError_t>(code));
}
#endif
