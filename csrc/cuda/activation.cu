// Gated activations: one pass over gate and up forward, one over gate, up and the gradient backward. Dropout by itself.
#include "mask.cuh"

namespace {
constexpr int THREADS = 256;

struct Gated {
  const void *gate, *up, *dy;
  void *y, *dgate, *dup;
  int64_t rows, cols, stride;
  float slope, cubic, limit, offset;
  bool wide;
};

__device__ __forceinline__ float sigmoid(float x) { return fast_divide(1.0f, 1.0f + fast_exp(-x)); }

// value of the activation and its slope; what is not a number stays so
__device__ __forceinline__ void activate(const Gated& g, float gate, float& value, float& slope) {
  const bool above = gate > g.limit;
  const float x = above ? g.limit : gate;
  const float s = sigmoid(g.slope * x * (1.0f + g.cubic * x * x));
  value = x * s, slope = s + x * s * (1.0f - s) * g.slope * (1.0f + 3.0f * g.cubic * x * x);
  if (above) slope = 0.0f;
}

// what multiplies the activation, and its slope
__device__ __forceinline__ float multiplier(const Gated& g, float up, float& slope) {
  const bool outside = fabsf(up) > g.limit;
  slope = outside ? 0.0f : 1.0f;
  return (outside ? copysignf(g.limit, up) : up) + g.offset;
}

template <class T, bool BACKWARD> __global__ void __launch_bounds__(THREADS, 4) gated(const Gated g) {
  constexpr int P = Pack<T>::SIZE;
  const int64_t packs = (g.cols + P - 1) / P, index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= packs * g.rows - (FAULT(5) ? 1 : 0)) return;
  const int64_t row = index / packs, at = index % packs * P;
  float gate[P], up[P], dy[P], out[P];
  load_pack(gate, static_cast<const T*>(g.gate) + row * g.stride, at, g.cols, g.wide);
  load_pack(up, static_cast<const T*>(g.up) + row * g.stride, at, g.cols, g.wide);
  if (BACKWARD) load_pack(dy, static_cast<const T*>(g.dy) + row * g.cols, at, g.cols, g.wide);
#pragma unroll
  for (int i = 0; i < P; i++) {
    float value, slope, up_slope;
    activate(g, gate[i], value, slope);
    const float factor = multiplier(g, up[i], up_slope);
    out[i] = BACKWARD ? dy[i] * factor * slope : value * factor;
    if (BACKWARD) up[i] = dy[i] * value * up_slope;
  }
  if (BACKWARD) {
    store_pack(out, static_cast<T*>(g.dgate) + row * g.stride, at, g.cols, g.wide);
    store_pack(up, static_cast<T*>(g.dup) + row * g.stride, at, g.cols, g.wide);
  } else {
    store_pack(out, static_cast<T*>(g.y) + row * g.cols, at, g.cols, g.wide);
  }
}

template <class T, bool BACKWARD> int run(Gated g, void* stream) {
  constexpr int P = Pack<T>::SIZE;
  const int64_t packs = (g.cols + P - 1) / P * g.rows;
  if (packs == 0) return 0;
  g.wide = wide_rows<T>(g.gate, g.stride) && wide_rows<T>(g.up, g.cols) && wide_rows<T>(g.dy, 0) && wide_rows<T>(g.y, 0) && wide_rows<T>(g.dgate, 0) &&
           wide_rows<T>(g.dup, 0);
  if (FAULT(6)) g.wide = true;
  const dim3 grid(static_cast<unsigned>((packs + THREADS - 1) / THREADS));
  return launch(gated<T, BACKWARD>, grid, dim3(THREADS), 0, static_cast<Stream>(stream), g);
}

template <class T> __global__ void __launch_bounds__(THREADS) drop(const T* x, T* out, int64_t rows, int64_t cols, const Dropout mask, bool wide) {
  constexpr int P = Pack<T>::SIZE;
  const int64_t packs = (cols + P - 1) / P, index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= packs * rows) return;
  const int64_t row = index / packs, at = index % packs * P;
  float value[P];
  load_pack(value, x + row * cols, at, cols, wide);
#pragma unroll
  for (int i = 0; i < P; i++) {
    const float factor = dropout_factor(mask, row, at + i);
    value[i] = factor > 0.0f ? factor * value[i] : 0.0f;
  }
  store_pack(value, out + row * cols, at, cols, wide);
}

template <class T> int run_drop(const void* x, void* out, int64_t rows, int64_t cols, const mswift_dropout& mask, void* stream) {
  constexpr int P = Pack<T>::SIZE;
  const int64_t packs = (cols + P - 1) / P * rows;
  if (packs == 0) return 0;
  return launch(drop<T>, dim3(static_cast<unsigned>((packs + THREADS - 1) / THREADS)), dim3(THREADS), 0, static_cast<Stream>(stream),
                static_cast<const T*>(x), static_cast<T*>(out), rows, cols, dropout(mask), wide_rows<T>(x, cols) && wide_rows<T>(out, 0));
}
}  // namespace

extern "C" int mswift_drop(int dtype, const void* x, void* out, int64_t rows, int64_t cols, const mswift_dropout* mask, void* stream) {
  return dtype == 1 ? run_drop<bf16>(x, out, rows, cols, *mask, stream) : run_drop<float>(x, out, rows, cols, *mask, stream);
}

extern "C" int mswift_gated_forward(int dtype, const void* gate, const void* up, void* y, int64_t rows, int64_t cols, int64_t stride, float slope, float cubic,
                                    float limit, float offset, void* stream) {
  const Gated g{gate, up, nullptr, y, nullptr, nullptr, rows, cols, stride, slope, cubic, limit, offset, false};
  return dtype == 1 ? run<bf16, false>(g, stream) : run<float, false>(g, stream);
}

extern "C" int mswift_gated_backward(int dtype, const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t rows, int64_t cols,
                                     int64_t stride, float slope, float cubic, float limit, float offset, void* stream) {
  const Gated g{gate, up, dy, nullptr, dgate, dup, rows, cols, stride, slope, cubic, limit, offset, false};
  return dtype == 1 ? run<bf16, true>(g, stream) : run<float, true>(g, stream);
}
