// Rotary embedding, in place on q and k straight out of a fused projection or into another tensor; the backward pass is the inverse rotation.
#include "device.cuh"
#include "mswift_cuda.h"

namespace {
constexpr int THREADS = 256;

struct Rope {
  const void* x;
  void* out;
  const float *cosine, *sine;
  int64_t tokens, token_stride, head_stride, out_token_stride, out_head_stride;
  int heads, dim, rotary, repeat, sign;
  bool wide, in_place;
};

// One thread: the pairs (i, i + half) for a pack of i
template <class T> __device__ __forceinline__ void rotate_halves(const Rope& r, const T* x, T* out, int64_t position, int at) {
  constexpr int P = Pack<T>::SIZE;
  const int half = r.rotary / 2;
  float low[P], high[P];
  load_pack(low, x, at, half, r.wide);
  load_pack(high, x + half, at, half, r.wide);
#pragma unroll
  for (int i = 0; i < P; i++) {
    if (at + i >= half) break;
    const float c = load(r.cosine + position * half + at + i), s = load(r.sine + position * half + at + i) * (FAULT(7) ? 1 : r.sign);
    const float turned = low[i] * c - high[i] * s;
    high[i] = high[i] * c + low[i] * s;
    low[i] = turned;
  }
  store_pack(low, out, at, half, r.wide);
  store_pack(high, out + half, at, half, r.wide);
}

// One thread: the pairs (2 j, 2 j + 1) within a pack
template <class T> __device__ __forceinline__ void rotate_pairs(const Rope& r, const T* x, T* out, int64_t position, int at) {
  constexpr int P = Pack<T>::SIZE;
  const int half = r.rotary / 2;
  float value[P];
  load_pack(value, x, at, r.rotary, r.wide);
#pragma unroll
  for (int i = 0; i < P; i += 2) {
    if (at + i >= r.rotary) break;
    const float c = load(r.cosine + position * half + (at + i) / 2), s = load(r.sine + position * half + (at + i) / 2) * r.sign;
    const float turned = value[i] * c - value[i + 1] * s;
    value[i + 1] = value[i + 1] * c + value[i] * s;
    value[i] = turned;
  }
  store_pack(value, out, at, r.rotary, r.wide);
}

template <class T, bool INTERLEAVED> __global__ void __launch_bounds__(THREADS) rope(const Rope r) {
  constexpr int P = Pack<T>::SIZE;
  const int turning = ((INTERLEAVED ? r.rotary : r.rotary / 2) + P - 1) / P, resting = r.in_place ? 0 : (r.dim - r.rotary + P - 1) / P;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, head = index / (turning + resting);
  if (head >= r.tokens * r.heads) return;
  const int pack = static_cast<int>(index % (turning + resting));
  const int64_t token = head / r.heads, which = head % r.heads;
  const T* x = static_cast<const T*>(r.x) + token * r.token_stride + which * r.head_stride;
  T* out = static_cast<T*>(r.out) + token * r.out_token_stride + which * r.out_head_stride;
  if (pack >= turning) {
    float value[P];
    const int first = r.rotary + (pack - turning) * P;
    load_pack(value, x, first, r.dim, r.wide);
    store_pack(value, out, first, r.dim, r.wide);
    return;
  }
  const int64_t position = token / r.repeat;
  if (INTERLEAVED) rotate_pairs(r, x, out, position, pack * P);
  else rotate_halves(r, x, out, position, pack * P);
}

template <class T> int run(Rope r, bool interleaved, void* stream) {
  constexpr int P = Pack<T>::SIZE;
  const int turning = ((interleaved ? r.rotary : r.rotary / 2) + P - 1) / P, resting = r.in_place ? 0 : (r.dim - r.rotary + P - 1) / P;
  const int64_t threads = r.tokens * r.heads * (turning + resting);
  if (threads == 0) return 0;
  r.wide = wide_rows<T>(r.x, r.token_stride) && wide_rows<T>(r.x, r.head_stride) && wide_rows<T>(r.out, r.out_token_stride) &&
           wide_rows<T>(r.out, r.out_head_stride) && r.rotary % (interleaved ? P : 2 * P) == 0;
  const dim3 grid(static_cast<unsigned>((threads + THREADS - 1) / THREADS));
  return interleaved ? launch(rope<T, true>, grid, dim3(THREADS), 0, static_cast<Stream>(stream), r)
                     : launch(rope<T, false>, grid, dim3(THREADS), 0, static_cast<Stream>(stream), r);
}
}  // namespace

extern "C" int mswift_rope(int dtype, const void* x, void* out, const float* cosine, const float* sine, int64_t tokens, int heads, int dim, int rotary,
                           int repeat, int64_t token_stride, int64_t head_stride, int64_t out_token_stride, int64_t out_head_stride, int interleaved,
                           int sign, void* stream) {
  if (rotary % 2 || rotary > dim || repeat < 1) return MSWIFT_UNSUPPORTED;
  const Rope r{x,     out, cosine, sine,   tokens, token_stride, head_stride, out_token_stride, out_head_stride,
               heads, dim, rotary, repeat, sign,   false,        x == out};
  return dtype == 1 ? run<bf16>(r, interleaved != 0, stream) : run<float>(r, interleaved != 0, stream);
}
