// The head where its gradients fit on the chip (hidden sizes up to 640): a block owns 64 tokens, or 64 rows of the vocabulary, and keeps their
// gradient in registers while the other side passes by in tiles of 32 rows. A tile lies in shared memory once and is an operand of both
// products: the logits (whose sum over the hidden size four pairs of warps share) and the gradient. No probability ever leaves the chip.
#include <cmath>

#include "head.cuh"

namespace {
enum Role { SWEEP, TO_HIDDEN, TO_WEIGHT };
constexpr int BM = 64, BN = 32, THREADS = 256, GROUPS = 4, MF = BM / 16, ROW = BN + 1;  // ROW: of `sums`, padded so that banks are spread
constexpr float NEAR = 8.0f;  // so far may a logit pass its row's reference before the sums are brought to a new one

struct Owned {
  Matrix own, other;
  const float* bias;
  const int64_t* labels;
  int64_t tokens, first, count;  // first row of the vocabulary that is here; how many rows are not padding
  float scale, softcap;
  bool without_label, narrow_out, accumulate;
  const float *lse, *coefficients;  // TO_HIDDEN, TO_WEIGHT
  float *stats, *dbias;
  void* out;
};

// A thread looks at 8 neighbouring logits of one row.
struct Row {
  float reference, top, sum, spread, total, label_logit;  // sums relative to the reference
};

// Loops that are not unrolled leave the registers to the gradient.
template <int ROWS, int CH> __device__ __forceinline__ void fetch_rows(SharedPtr<Chunk> tile, const Matrix& m, int64_t row0) {
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * CH; i += THREADS) {
    const int r = i / CH, c = i % CH;
    Plain{m}.fetch(tile, place<CH>(r, c), row0 + r, c * 8);
  }
}

template <int CH> __device__ __forceinline__ void logits_of_tile(float (&s)[2][4][4], SharedPtr<Chunk> own, SharedPtr<Chunk> other, int steps) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, m = warp % 2 * 32;
#pragma unroll 1
  for (int step = warp / 2; step < steps; step += GROUPS) {
    uint32_t left[2][4], right[4][2];
#pragma unroll
    for (int i = 0; i < 2; i++) load_matrices<false>(left[i], own, place<CH>(m + i * 16 + (lane & 7) + ((lane >> 3) & 1) * 8, step * 2 + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t both[4];
      load_matrices<false>(both, other, place<CH>(j * 8 + (lane & 7) + (lane >> 4) * 8, step * 2 + ((lane >> 3) & 1)));
      right[j][0] = both[0], right[j][1] = both[1], right[j + 1][0] = both[2], right[j + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) multiply_add(s[i][j], left[i], right[j]);
  }
}

__device__ __forceinline__ void share_logits(const float (&s)[2][4][4], SharedPtr<float> sums) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = warp / 2 * BM + warp % 2 * 32 + lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[(row + i * 16 + e / 2 * 8) * ROW + column + j * 8 + e % 2] = s[i][j][e];
}

template <int CH, int NF> __device__ __forceinline__ void add_gradient(float (&acc)[MF][NF][4], SharedPtr<Chunk> values, SharedPtr<Chunk> other) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll 1
  for (int k = 0; k < BN; k += 16) {
    uint32_t left[MF][4];
#pragma unroll
    for (int i = 0; i < MF; i++) load_matrices<false>(left[i], values, place<BN / 8>(i * 16 + (lane & 7) + ((lane >> 3) & 1) * 8, k / 8 + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < NF; j += 2) {
      uint32_t both[4];
      load_matrices<true>(both, other, place<CH>(k + (lane & 7) + ((lane >> 3) & 1) * 8, warp * NF + j + (lane >> 4)));
      const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
#pragma unroll
      for (int i = 0; i < MF; i++) multiply_add(acc[i][j], left[i], first), multiply_add(acc[i][j + 1], left[i], second);
    }
  }
}

template <int NF> __device__ __forceinline__ void scale_rows(float (&acc)[MF][NF][4], SharedPtr<float> keep) {
#pragma unroll
  for (int i = 0; i < MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float factor = keep[i * 16 + threadIdx.x % WARP / 4 + half * 8];
      if (factor == 1.0f) continue;
#pragma unroll
      for (int j = 0; j < NF; j++) acc[i][j][half * 2] *= factor, acc[i][j][half * 2 + 1] *= factor;
    }
}

// exp(z - reference) dz/dproduct of 8 logits, and the row's sums; returns what is to be done to the sums so far.
__device__ __forceinline__ float sweep_row(const Owned& h, const float (&z)[8], float (&value)[8], Row& row) {
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < 8; i++) top = fmaxf(top, z[i]);
  top = fmaxf(top, shuffle_xor(top, 1));
  top = fmaxf(top, shuffle_xor(top, 2));
  row.top = fmaxf(row.top, top);
  float keep = 1.0f;
  if (top > row.reference + NEAR) {
    const bool first = row.reference == -INFINITY;
    const float below = first ? 0.0f : row.reference - top;
    keep = first ? 0.0f : fast_exp(below);
    row.spread = keep * (row.spread + below * row.sum), row.sum *= keep, row.reference = top;
    if (FAULT(27)) keep = 1.0f;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float above = z[i] - row.reference, power = z[i] == -INFINITY ? 0.0f : fast_exp(above);
    value[i] = power * slope_of(h.softcap, z[i]);
    if (z[i] == -INFINITY) value[i] = 0.0f;
    else row.sum += power, row.spread += power * above, row.total += z[i];
  }
  return keep;
}

// The gradient of one product. t: its token.
__device__ __forceinline__ float gradient_of(const Owned& h, float z, int64_t t, bool is_label) {
  if (z == -INFINITY || t >= h.tokens) return 0.0f;
  const float above = z - load(h.lse + t), of_prob = load(h.coefficients + h.tokens + t), of_entropy = load(h.coefficients + 2 * h.tokens + t);
  float value = fast_exp(above) * (of_prob + of_entropy * above) + load(h.coefficients + 3 * h.tokens + t);
  if (is_label) value += load(h.coefficients + t);
  return value * slope_of(h.softcap, z) * h.scale;
}

template <int ROLE, int NF> __device__ __forceinline__ void store_rows(const Owned& h, const float (&acc)[MF][NF][4], int64_t row0) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t width = h.own.cols, base = static_cast<int64_t>(blockIdx.y) * h.own.rows;
#pragma unroll
  for (int i = 0; i < MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = row0 + i * 16 + lane / 4 + half * 8;
      if (row >= h.own.rows) continue;
#pragma unroll
      for (int j = 0; j < NF; j++) {
        const int64_t column = (warp * NF + j) * 8 + lane % 4 * 2;
        const float first = acc[i][j][half * 2], second = acc[i][j][half * 2 + 1];
        if (ROLE == TO_WEIGHT && h.narrow_out) {
          store_pair(static_cast<bf16*>(h.out) + (base + row) * width, column, width, first, second, width % 2 == 0);
          continue;
        }
        float* out = static_cast<float*>(h.out) + (base + row) * width + column;
        if (column < width) store(out, first + (ROLE == TO_WEIGHT && h.accumulate ? load_again(out) : 0.0f));
        if (column + 1 < width) store(out + 1, second + (ROLE == TO_WEIGHT && h.accumulate ? load_again(out + 1) : 0.0f));
      }
    }
}

template <int ROLE, int NF> __global__ void __launch_bounds__(THREADS, 1) head_rows(const Owned h) {
  constexpr int CH = NF * 8;
  DYNAMIC_SHARED(Chunk, memory, (BM + 2 * BN) * CH + BM * BN / 8);
  SHARED(float, sums, GROUPS * BM * ROW);
  SHARED(float, keep, BM);
  const SharedPtr<Chunk> own = memory, tiles = memory + BM * CH, values = tiles + 2 * BN * CH;
  const int tid = threadIdx.x, r = tid / 4, q = tid % 4 * 8, steps = static_cast<int>((h.own.cols + 15) / 16);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * BM, mine = row0 + r;
  const int count = static_cast<int>((h.other.rows + BN - 1) / BN), share = (count + gridDim.y - 1) / gridDim.y;
  const int begin = blockIdx.y * share, end = min(count, begin + share);
  const int64_t label = ROLE != TO_WEIGHT && mine < h.tokens ? load(h.labels + mine) - h.first : -1;
  auto fill = [&](int tile) { fetch_rows<BN, CH>(tiles + tile % 2 * (BN * CH), h.other, static_cast<int64_t>(tile) * BN); };
  fetch_rows<BM, CH>(own, h.own, row0);
  if (begin < end) fill(begin);
  copy_commit();
  float acc[MF][NF][4] = {}, bias_sum = 0.0f;
  Row row{-INFINITY, -INFINITY, 0.0f, 0.0f, 0.0f, 0.0f};
  for (int tile = begin; tile < end; tile++) {
    const SharedPtr<Chunk> other = tiles + tile % 2 * (BN * CH);
    copy_wait<0>();
    sync_block();  // this tile is there, and everybody is done with the one before
    if (tile + 1 < end) fill(tile + 1);
    copy_commit();
    float s[2][4][4] = {};
    logits_of_tile<CH>(s, own, other, steps);
    share_logits(s, sums);
    if (!FAULT(28)) sync_block();
    float z[8], value[8];
    const int64_t at = static_cast<int64_t>(tile) * BN + q;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float product = 0.0f;
#pragma unroll
      for (int g = 0; g < GROUPS; g++) product += sums[(g * BM + r) * ROW + q + i];
      const int64_t v = ROLE == TO_WEIGHT ? mine : at + i, t = ROLE == TO_WEIGHT ? at + i : mine;
      z[i] = v < h.count ? softened(h.scale, h.softcap, h.bias ? product + load(h.bias + v) : product) : -INFINITY;
      const bool is_label = ROLE == TO_WEIGHT ? t < h.tokens && load(h.labels + t) - h.first == v : v == label;
      if (ROLE == SWEEP && is_label && z[i] != -INFINITY) row.label_logit = z[i];
      if (is_label && h.without_label) z[i] = -INFINITY;
      if (ROLE != SWEEP) value[i] = gradient_of(h, z[i], t, is_label);
      if (ROLE == TO_WEIGHT) bias_sum += value[i];
    }
    if (ROLE == SWEEP) {
      const float factor = sweep_row(h, z, value, row);
      if (q == 0) keep[r] = factor;
    }
    values[place<BN / 8>(r, q / 8)] = packed<bf16>(value);
    if (!FAULT(29)) sync_block();
    if (ROLE == SWEEP) scale_rows<NF>(acc, keep);
    add_gradient<CH, NF>(acc, values, other);
  }
  copy_wait<0>();
  sync_block();
  if (ROLE == SWEEP) {  // relative to the maximum now
    const bool none = row.reference == -INFINITY;
    const float below = none ? 0.0f : row.reference - row.top, factor = none ? 0.0f : fast_exp(below);
    float sum = factor * row.sum, spread = factor * (row.spread + below * row.sum), total = row.total, noted = row.label_logit;
#pragma unroll
    for (int mask = 1; mask < 4; mask <<= 1)
      sum += shuffle_xor(sum, mask), spread += shuffle_xor(spread, mask), total += shuffle_xor(total, mask), noted += shuffle_xor(noted, mask);
    if (q == 0) {
      keep[r] = factor;
      if (mine < h.tokens) write_part(h.stats + static_cast<int64_t>(blockIdx.y) * 5 * h.tokens, h.tokens, mine, Part{row.top, sum, spread, total}, noted);
    }
    sync_block();
    scale_rows<NF>(acc, keep);
  }
  if (ROLE == TO_WEIGHT && h.dbias) {
    bias_sum += shuffle_xor(bias_sum, 1);
    bias_sum += shuffle_xor(bias_sum, 2);
    if (q == 0 && mine < h.own.rows) store(h.dbias + mine, bias_sum);
  }
  store_rows<ROLE, NF>(h, acc, row0);
}

constexpr size_t bytes_of(int nf) { return ((BM + 2 * BN) * nf * 8 + BM * BN / 8) * sizeof(Chunk); }
int width_of(int64_t hidden) { return hidden <= 256 ? 4 : hidden <= 512 ? 8 : hidden <= 640 ? 10 : 0; }

template <int ROLE> int run(const Owned& h, int splits, Stream stream) {
  const int nf = width_of(h.own.cols);
  const dim3 grid(static_cast<unsigned>((h.own.rows + BM - 1) / BM), static_cast<unsigned>(splits)), block(THREADS);
  if (nf == 4) return launch(head_rows<ROLE, 4>, grid, block, bytes_of(4), stream, h);
  if (nf == 8) return launch(head_rows<ROLE, 8>, grid, block, bytes_of(8), stream, h);
  return nf == 10 ? launch(head_rows<ROLE, 10>, grid, block, bytes_of(10), stream, h) : MSWIFT_UNSUPPORTED;
}

}  // namespace

extern "C" int mswift_head_on_chip(int64_t hidden) {
  const int nf = width_of(hidden);
  return nf && hidden > 0 && bytes_of(nf) + (GROUPS * BM * ROW + BM) * sizeof(float) <= shared_memory_limit();
}

extern "C" int mswift_head_sweep_on_chip(const mswift_head* head, float* stats, float* acc, float* partial, float* acc_parts, int splits, void* stream) {
  if (head->tokens == 0) return 0;
  Owned h = sides<Owned>(*head, false);
  h.stats = splits > 1 ? partial : stats, h.out = splits > 1 ? acc_parts : acc;
  int error = run<SWEEP>(h, splits, static_cast<Stream>(stream));
  if (error || splits <= 1) return error;
  error = mswift_head_merge(partial, stats, splits, head->tokens, stream);
  return error ? error : join_parts(*head, acc_parts, partial, 5 * head->tokens, acc, splits, stream);
}

extern "C" int mswift_head_gradient_on_chip(const mswift_head* head, const float* lse, const float* coefficients, float* dx_acc, float* acc_parts, int splits,
                                            void* dweight, int dweight_dtype, int accumulate, float* dbias, void* stream) {
  if (head->tokens == 0) return 0;
  int error = 0;
  if (dx_acc) {
    Owned h = sides<Owned>(*head, false);
    h.lse = lse, h.coefficients = coefficients, h.out = splits > 1 ? acc_parts : dx_acc;
    error = run<TO_HIDDEN>(h, splits, static_cast<Stream>(stream));
    if (!error && splits > 1) error = join_parts(*head, acc_parts, nullptr, 0, dx_acc, splits, stream);
  }
  if (!error && dweight) {
    Owned h = sides<Owned>(*head, true);
    h.lse = lse, h.coefficients = coefficients, h.out = dweight, h.narrow_out = dweight_dtype == 1, h.accumulate = accumulate != 0, h.dbias = dbias;
    error = run<TO_WEIGHT>(h, 1, static_cast<Stream>(stream));
  }
  return error;
}
