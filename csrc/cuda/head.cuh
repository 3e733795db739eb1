// What the kernels of a vocabulary's head have in common.
#pragma once
#include <cmath>

#include "mswift_cuda.h"
#include "tile.cuh"

struct Part {
  float top, sum, spread, total;  // maximum m, sum of exp(z - m), of exp(z - m) (z - m), of z
};
__device__ __forceinline__ Part merge(Part a, Part b) {
  if (b.sum == 0.0f) return Part{a.top, a.sum, a.spread, a.total + b.total};  // nothing, or too far below to count
  if (a.sum == 0.0f) return Part{b.top, b.sum, b.spread, a.total + b.total};
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

// A logit of the row `at` of the vocabulary, of which `real` are no padding; bias: of these rows.
__device__ __forceinline__ float logit_of(float product, const float* bias, int at, int real, float scale, float softcap) {
  if (at >= real + (FAULT(17) ? 1 : 0)) return -INFINITY;
  return softened(scale, softcap, bias ? product + load(bias + at) : product);
}
// The logit of the label is noted, and leaves the tile where it is not to be counted with the others. Columns are the vocabulary.
template <class S> __device__ __forceinline__ void part_with_label(Tile<S>& z, SharedPtr<int> label, SharedPtr<float> label_logit, bool leaves) {
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_of<S>(i, half * 2), wanted = label[row];
#pragma unroll
      for (int j = 0; j < S::NF; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if (column_of<S>(j, e) != wanted || z[i][j][half * 2 + e] == -INFINITY) continue;  // beyond the rows here it is another rank's
          label_logit[row] = z[i][j][half * 2 + e];
          if (leaves) z[i][j][half * 2 + e] = -INFINITY;
        }
    }
}
// What a row of a tile adds up to over the four lanes that hold it.
__device__ __forceinline__ float lanes_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// What is the caller's of a kernel's arguments: whose rows a block owns, and what it multiplies them with.
template <class Arguments> Arguments sides(const mswift_head& a, bool by_vocabulary) {
  Arguments h{};
  const Matrix x = matrix(a.x, a.tokens, a.hidden, a.hidden), weight = matrix(a.weight, a.vocab, a.hidden, a.hidden);
  h.own = by_vocabulary ? weight : x, h.other = by_vocabulary ? x : weight;
  h.bias = static_cast<const float*>(a.bias), h.labels = a.labels, h.tokens = a.tokens, h.first = a.first;
  const int64_t real = a.size - a.first;
  h.count = real < 0 ? 0 : real < a.vocab ? real : a.vocab;
  h.scale = a.scale, h.softcap = a.softcap, h.without_label = a.without_label != 0;
  return h;
}

// acc [tokens, hidden] = the sum of those of several parts of the vocabulary, relative to the maximum of all; tops (NULL: none): the first part's
// maxima, those of the next `stride` behind.
int join_parts(const mswift_head& head, const float* parts, const float* tops, int64_t stride, float* acc, int splits, void* stream);
