// What the kernels of a vocabulary's head have in common.
#pragma once
#include <cmath>

#include "mswift_cuda.h"
#include "tile.cuh"

struct Part {
  float top, sum, spread, total;  // maximum m, sum of exp(z - m), of exp(z - m) (z - m), of z
};
__device__ __forceinline__ Part merge(Part a, Part b) {
  if (b.sum == 0.0f) return a;
  if (a.sum == 0.0f) return b;
  const float top = fmaxf(a.top, b.top), da = a.top - top, db = b.top - top;
  const float fa = FAULT(16) ? 1.0f : fast_exp(da), fb = fast_exp(db);
  return Part{top, fa * a.sum + fb * b.sum, fa * (a.spread + da * a.sum) + fb * (b.spread + db * b.sum), a.total + b.total};
}

__device__ __forceinline__ float softened(float scale, float softcap, float product) {
  product *= scale;
  return softcap > 0.0f ? softcap * tanhf(product / softcap) : product;
}
__device__ __forceinline__ float slope_of(float softcap, float z) { return softcap > 0.0f ? 1.0f - (z / softcap) * (z / softcap) : 1.0f; }

__device__ __forceinline__ Part read_part(const float* from, int64_t tokens, int64_t t) {
  return Part{load(from + t), load(from + tokens + t), load(from + 3 * tokens + t), load(from + 4 * tokens + t)};
}
__device__ __forceinline__ void write_part(float* to, int64_t tokens, int64_t t, const Part& part, float label_logit) {
  store(to + t, part.top);
  store(to + tokens + t, part.sum);
  store(to + 2 * tokens + t, label_logit);
  store(to + 3 * tokens + t, part.spread);
  store(to + 4 * tokens + t, part.total);
}
