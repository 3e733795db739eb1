// The vocabulary's head: statistics of the logits, tile by tile, which live in registers only; and what joins the parts of several blocks or ranks.
#include <cmath>

#include "head.cuh"

namespace {
using S = Large;

struct Head {
  Matrix own, other;  // hidden states; rows of the vocabulary
  const float* bias;
  const int64_t* labels;
  int64_t tokens, first, count;  // first row of the vocabulary that is here; how many rows of it are not padding
  float scale, softcap;
  bool without_label;
  float* partial;
};

// Rows of a tile are spread over four lanes of each of WARPS_N warps: first the lanes by shuffles, then the warps through shared memory.
__device__ __forceinline__ void note_statistics(const Tile<S>& z, SharedPtr<Part> parts) {
  const int warp_n = threadIdx.x / WARP % S::WARPS_N;
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_of<S>(i, half * 2);
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < S::NF; j++) top = fmaxf(top, fmaxf(z[i][j][half * 2], z[i][j][half * 2 + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      float sum = 0.0f, spread = 0.0f, total = 0.0f;
#pragma unroll
      for (int j = 0; j < S::NF; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float value = z[i][j][half * 2 + e];
          if (value == -INFINITY) continue;
          const float above = value - top, power = fast_exp(above);
          sum += power, spread += power * above, total += value;
        }
#pragma unroll
      for (int mask = 1; mask < 4; mask <<= 1) sum += shuffle_xor(sum, mask), spread += shuffle_xor(spread, mask), total += shuffle_xor(total, mask);
      if (threadIdx.x % 4 == 0) parts[warp_n * S::BM + row] = Part{top, sum, spread, total};
    }
}

__global__ void __launch_bounds__(S::THREADS, 2) head_tiles(const Head h) {
  DYNAMIC_SHARED(Chunk, stages, S::STAGE * STAGES);
  SHARED(Part, parts, S::WARPS_N * S::BM);
  SHARED(float, label_logit, S::BM);
  SHARED(int, label, S::BM);
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * S::BM;
  const int tid = threadIdx.x, tiles = static_cast<int>((h.other.rows + S::BN - 1) / S::BN);
  Part mine{-INFINITY, 0.0f, 0.0f, 0.0f};
  if (tid < S::BM) label_logit[tid] = 0.0f;
  for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t v0 = static_cast<int64_t>(tile) * S::BN;
    if (tid < S::BM) {
      const int64_t at = t0 + tid < h.tokens ? load(h.labels + t0 + tid) - (FAULT(18) ? 0 : h.first) - v0 : -1;
      label[tid] = at >= 0 && at < S::BN ? static_cast<int>(at) : -1;
    }
    Tile<S> z = {};
    multiply<S, false, false>(z, stages, Plain{h.own}, Plain{h.other}, t0, v0, 0, h.own.cols);
    const float* bias = h.bias ? h.bias + v0 : nullptr;
    const int real = static_cast<int>(min(h.count - v0, static_cast<int64_t>(S::BN)));
#pragma unroll
    for (int i = 0; i < S::MF; i++)
#pragma unroll
      for (int j = 0; j < S::NF; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) z[i][j][e] = logit_of(z[i][j][e], bias, column_of<S>(j, e), real, h.scale, h.softcap);
    part_with_label<S>(z, label, label_logit, h.without_label);
    note_statistics(z, parts);
    if (!FAULT(19)) sync_block();
    if (tid < S::BM)
      for (int w = 0; w < S::WARPS_N; w++) mine = merge(mine, parts[w * S::BM + tid]);
  }
  if (tid < S::BM && t0 + tid < h.tokens) write_part(h.partial + static_cast<int64_t>(blockIdx.y) * 5 * h.tokens, h.tokens, t0 + tid, mine, label_logit[tid]);
}

constexpr int THREADS = 128;

__global__ void __launch_bounds__(THREADS) merge_parts(const float* parts, float* stats, int64_t count, int64_t tokens) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (t >= tokens) return;
  Part all{-INFINITY, 0.0f, 0.0f, 0.0f};
  float label_logit = 0.0f;
  for (int64_t i = 0; i < count; i++) {
    all = merge(all, read_part(parts + i * 5 * tokens, tokens, t));
    label_logit += load(parts + i * 5 * tokens + 2 * tokens + t);
  }
  write_part(stats, tokens, t, all, label_logit);
}

// One sum for each token from those of several parts of the vocabulary, relative to the maximum of all (tops: theirs, `stride` apart, or NULL).
__global__ void __launch_bounds__(THREADS) add_parts(const float* parts, const float* tops, float* acc, int splits, int64_t stride, int64_t tokens,
                                                     int64_t hidden) {
  const int64_t t = blockIdx.x;
  float top = -INFINITY;
  for (int s = 0; tops && s < splits; s++) top = fmaxf(top, load(tops + static_cast<int64_t>(s) * stride + t));
  for (int64_t at = threadIdx.x; at < hidden; at += THREADS) {
    float sum = 0.0f;
    for (int s = 0; s < splits; s++) {
      const float own = tops ? load(tops + static_cast<int64_t>(s) * stride + t) : 0.0f;
      const float factor = !tops ? 1.0f : own == -INFINITY ? 0.0f : FAULT(30) ? 1.0f : fast_exp(own - top);
      sum += factor * load(parts + (s * tokens + t) * hidden + at);
    }
    store(acc + t * hidden + at, sum);
  }
}

unsigned row_tiles(int64_t tokens) { return static_cast<unsigned>((tokens + THREADS - 1) / THREADS); }
}  // namespace

int join_parts(const mswift_head& head, const float* parts, const float* tops, int64_t stride, float* acc, int splits, void* stream) {
  const dim3 grid(static_cast<unsigned>(head.tokens));
  return launch(add_parts, grid, dim3(THREADS), 0, static_cast<Stream>(stream), parts, tops, acc, splits, stride, head.tokens, head.hidden);
}

extern "C" int mswift_head_statistics(const mswift_head* head, float* stats, float* partial, int splits, void* stream) {
  const mswift_head& a = *head;
  if (a.tokens == 0) return 0;
  Head h = sides<Head>(a, false);
  h.partial = partial;
  const dim3 grid(static_cast<unsigned>((a.tokens + S::BM - 1) / S::BM), static_cast<unsigned>(splits));
  const int error = launch(head_tiles, grid, dim3(S::THREADS), S::BYTES, static_cast<Stream>(stream), h);
  return error ? error : mswift_head_merge(partial, stats, splits, a.tokens, stream);
}

extern "C" int mswift_head_merge(const float* parts, float* stats, int64_t count, int64_t tokens, void* stream) {
  if (tokens == 0) return 0;
  return launch(merge_parts, dim3(row_tiles(tokens)), dim3(THREADS), 0, static_cast<Stream>(stream), parts, stats, count, tokens);
}
