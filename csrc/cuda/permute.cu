// Rows to the order of their experts and back. A block moves one row (gather) or adds up one token (combine).
#include "device.cuh"
#include "mswift_cuda.h"

namespace {
constexpr int THREADS = 128;

struct Rows {
  const void *x, *dy;
  const int64_t* index;
  const float* weights;
  void* out;
  float* dweights;
  int64_t cols;
  int k;
  bool wide;
};

template <class T> __global__ void __launch_bounds__(THREADS) gather_rows(const Rows r) {
  constexpr int P = Pack<T>::SIZE;
  const int64_t source = load(r.index + blockIdx.x);
  if (FAULT(8) && source < 0) return;
  for (int64_t at = threadIdx.x * P; at < r.cols; at += THREADS * P) {
    float value[P] = {};
    if (source >= 0) load_pack(value, static_cast<const T*>(r.x) + source * r.cols, at, r.cols, r.wide);
    store_pack(value, static_cast<T*>(r.out) + blockIdx.x * r.cols, at, r.cols, r.wide);
  }
}

template <class T> __global__ void __launch_bounds__(THREADS) combine_rows(const Rows r) {
  constexpr int P = Pack<T>::SIZE;
  for (int64_t at = threadIdx.x * P; at < r.cols; at += THREADS * P) {
    float sum[P] = {};
    for (int j = 0; j < r.k; j++) {
      const int64_t which = static_cast<int64_t>(blockIdx.x) * r.k + j, source = load(r.index + which);
      if (source < 0) continue;
      const float weight = r.weights ? load(r.weights + which) : 1.0f;
      float value[P];
      load_pack(value, static_cast<const T*>(r.x) + source * r.cols, at, r.cols, r.wide);
#pragma unroll
      for (int i = 0; i < P; i++) sum[i] += weight * value[i];
    }
    store_pack(sum, static_cast<T*>(r.out) + blockIdx.x * r.cols, at, r.cols, r.wide);
  }
}

template <class T> __global__ void __launch_bounds__(THREADS) combine_rows_backward(const Rows r) {
  constexpr int P = Pack<T>::SIZE;
  const int packs = static_cast<int>((r.cols + P - 1) / P);
  DYNAMIC_SHARED(Chunk, cache, packs);
  SHARED(float, scratch, THREADS / WARP);
  for (int p = threadIdx.x; p < packs; p += THREADS) {
    float dy[P];
    load_pack(dy, static_cast<const T*>(r.dy) + blockIdx.x * r.cols, p * P, r.cols, r.wide);
    cache[p] = packed<T>(dy);
  }
  if (FAULT(23) && static_cast<int>(threadIdx.x) >= packs) return;
  for (int j = 0; j < r.k; j++) {
    const int64_t which = static_cast<int64_t>(blockIdx.x) * r.k + j, source = load(r.index + which);
    const float weight = r.weights ? load(r.weights + which) : 1.0f;
    float dot = 0.0f;
    for (int p = threadIdx.x; source >= 0 && p < packs; p += THREADS) {
      float dy[P], x[P];
      unpack<T>(dy, cache[p]);
      load_pack(x, static_cast<const T*>(r.x) + source * r.cols, p * P, r.cols, r.wide);
#pragma unroll
      for (int i = 0; i < P; i++) dot += dy[i] * x[i], dy[i] *= weight;
      store_pack(dy, static_cast<T*>(r.out) + source * r.cols, p * P, r.cols, r.wide);
    }
    dot = block_sum<THREADS>(dot, scratch);
    if (threadIdx.x == 0) store(r.dweights + which, dot);
  }
}

bool wide(int dtype, const Rows& r) {
  const bool places = wide_rows<float>(r.dy, 0) && wide_rows<float>(r.out, 0);
  return places && (dtype == 1 ? wide_rows<bf16>(r.x, r.cols) : wide_rows<float>(r.x, r.cols));
}
}  // namespace

extern "C" int mswift_gather_rows(int dtype, const void* x, const int64_t* index, void* out, int64_t rows, int64_t cols, void* stream) {
  if (rows == 0) return 0;
  Rows r{x, nullptr, index, nullptr, out, nullptr, cols, 1, false};
  r.wide = wide(dtype, r);
  const dim3 grid(static_cast<unsigned>(rows));
  return dtype == 1 ? launch(gather_rows<bf16>, grid, dim3(THREADS), 0, static_cast<Stream>(stream), r)
                    : launch(gather_rows<float>, grid, dim3(THREADS), 0, static_cast<Stream>(stream), r);
}

extern "C" int mswift_combine_rows(int dtype, const void* x, const int64_t* index, const float* weights, void* y, int64_t tokens, int k, int64_t cols,
                                   void* stream) {
  if (tokens == 0) return 0;
  Rows r{x, nullptr, index, weights, y, nullptr, cols, k, false};
  r.wide = wide(dtype, r);
  const dim3 grid(static_cast<unsigned>(tokens));
  return dtype == 1 ? launch(combine_rows<bf16>, grid, dim3(THREADS), 0, static_cast<Stream>(stream), r)
                    : launch(combine_rows<float>, grid, dim3(THREADS), 0, static_cast<Stream>(stream), r);
}

extern "C" int mswift_combine_rows_backward(int dtype, const void* dy, const void* x, const int64_t* index, const float* weights, void* dx, float* dweights,
                                            int64_t tokens, int k, int64_t cols, void* stream) {
  if (tokens == 0) return 0;
  Rows r{x, dy, index, weights, dx, dweights, cols, k, false};
  r.wide = wide(dtype, r);
  const int pack = dtype == 1 ? Pack<bf16>::SIZE : Pack<float>::SIZE;
  const size_t bytes = (cols + pack - 1) / pack * sizeof(Chunk);
  const dim3 grid(static_cast<unsigned>(tokens));
  return dtype == 1 ? launch(combine_rows_backward<bf16>, grid, dim3(THREADS), bytes, static_cast<Stream>(stream), r)
                    : launch(combine_rows_backward<float>, grid, dim3(THREADS), bytes, static_cast<Stream>(stream), r);
}
