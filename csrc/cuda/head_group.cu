// The head for any hidden size, in one launch: a group of blocks owns 128 tokens, or 128 rows of the vocabulary, each block 128 columns of their
// gradient, in registers. In a step every block makes a 128 x 128 tile of logits of its own, and all of them multiply with all of these tiles, which
// they pass each other in bf16 through a workspace small enough to stay in the L2 cache.
//
// Nobody waits for long: while the others' tiles of a step arrive, a block works on its logits of the next one; while their maxima arrive (of which
// the common reference is made, exactly the maximum so far), on the product of the step before. Buffers are two, used in turn: who writes one again
// knows that all have come to the step between, and so are done with it.
#include <cmath>

#include "head.cuh"

namespace {
using S = Large;
enum Role { SWEEP, TO_HIDDEN, TO_WEIGHT };
enum Of { BASE, LABEL, PROB, ENTROPY, UNIFORM };  // what is known of a token: the reference or log-sum-exp, then the coefficients
constexpr int BM = S::BM, BN = S::BN, LINE = 32;  // LINE: a cache line of counters
static_assert(MSWIFT_HEAD_WORKSPACE == 2 * LINE * sizeof(uint32_t) + 2 * BM * sizeof(float) + 2 * BM * BN * sizeof(bf16), "counters, notes, two tiles");

struct Grouped {
  Matrix own, other;
  const float* bias;
  const int64_t* labels;
  int64_t tokens, first, count;  // first row of the vocabulary that is here; how many rows are not padding
  float scale, softcap;
  bool without_label, narrow_out, accumulate;
  const float *lse, *coefficients;  // TO_HIDDEN, TO_WEIGHT
  float *parts, *dbias;             // SWEEP: [splits, group, 5, tokens]
  void* out;
  int64_t column0;
  int group, splits, items;
  uint32_t* counters;  // for each group: of tiles, and a line further of maxima
  float* notes;        // [groups, 2, group, BM]
  bf16* values;        // [groups, 2, BM, group * BN]
};

__device__ __forceinline__ int buffer_of(uint32_t turn) { return FAULT(32) ? 0 : turn % 2; }
__device__ __forceinline__ void arrive(uint32_t* counter) {
  if (!FAULT(36)) sync_block();
  if (threadIdx.x == 0) signal_blocks(counter);
}
__device__ __forceinline__ void wait_for(const uint32_t* counter, uint32_t count) {
  if (threadIdx.x == 0) await_blocks(counter, count);
  sync_block();
}

// What the logits of a step are computed with, in shared memory. at: the first row of the other side, row0: of this.
template <int ROLE> __device__ __forceinline__ void read_tokens(const Grouped& h, SharedPtr<float> of, SharedPtr<int> label, int64_t row0, int64_t at) {
  const int tid = threadIdx.x;
  if (tid >= BM) return;
  const int64_t t = (ROLE == TO_WEIGHT ? at : row0) + tid;
  const int64_t place = t < h.tokens ? load(h.labels + t) - h.first - (ROLE == TO_WEIGHT ? row0 : at) : -1;
  label[tid] = place >= 0 && place < BM ? static_cast<int>(place) : -1;
  if (ROLE == SWEEP) return;
  of[BASE * BM + tid] = t < h.tokens ? load(h.lse + t) : 0.0f;
  for (int i = 0; i < 4; i++) of[(LABEL + i) * BM + tid] = t < h.tokens ? load(h.coefficients + i * h.tokens + t) : 0.0f;
}

template <int ROLE> __device__ __forceinline__ void to_logits(const Grouped& h, Tile<S>& z, int64_t row0, int64_t at) {
  const int64_t v0 = ROLE == TO_WEIGHT ? row0 : at, left = h.count - v0, tokens = h.tokens - at;
  const int real = static_cast<int>(left < BM ? left : BM);
  const float* bias = h.bias ? h.bias + v0 : nullptr;
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int j = 0; j < S::NF; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = row_of<S>(i, e), column = column_of<S>(j, e);
        z[i][j][e] = logit_of(z[i][j][e], bias, ROLE == TO_WEIGHT ? row : column, real, h.scale, h.softcap);
        if (ROLE == TO_WEIGHT && column >= tokens) z[i][j][e] = -INFINITY;
      }
}

__device__ __forceinline__ void note_tops(const Tile<S>& z, SharedPtr<Part> parts) {
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < S::NF; j++) top = fmaxf(top, fmaxf(z[i][j][half * 2], z[i][j][half * 2 + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      if (threadIdx.x % 4 == 0) parts[threadIdx.x / WARP % S::WARPS_N * BM + row_of<S>(i, half * 2)] = Part{top, 0.0f, 0.0f, 0.0f};
    }
}

// The reference of a row becomes the maximum over all blocks' tiles so far; what is relative to the one before is to be multiplied by `keep`.
__device__ __forceinline__ float agree(Part& mine, const float* notes, int group) {
  float top = mine.top;
#pragma unroll 4
  for (int m = 0; m < group; m++)
    if (!FAULT(34) || m == static_cast<int>(blockIdx.x) % group) top = fmaxf(top, FAULT(38) ? load(notes + m * BM + threadIdx.x) : load_again(notes + m * BM + threadIdx.x));
  const bool none = mine.top == -INFINITY;
  const float below = none ? 0.0f : mine.top - top, keep = none ? 0.0f : fast_exp(below);
  mine.spread = keep * (mine.spread + below * mine.sum), mine.sum *= keep, mine.top = top;
  return keep;
}
__device__ __forceinline__ void scale_rows(Tile<S>& acc, SharedPtr<float> keep) {
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float factor = keep[row_of<S>(i, half * 2)];
#pragma unroll
      for (int j = 0; j < S::NF; j++) acc[i][j][half * 2] *= factor, acc[i][j][half * 2 + 1] *= factor;
    }
}

// exp(z - reference) dz/dproduct (SWEEP), or the gradient of the products, for the group; what each row adds up to here, in `parts`.
template <int ROLE> __device__ __forceinline__ void pass_on(const Grouped& h, const Tile<S>& z, SharedPtr<float> of, SharedPtr<int> label, SharedPtr<Part> parts,
                                                            bf16* values, int64_t stride) {
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_of<S>(i, half * 2);
      float sum = 0.0f, spread = 0.0f, total = 0.0f;
#pragma unroll
      for (int j = 0; j < S::NF; j++) {
        float value[2] = {0.0f, 0.0f};
        const int column = column_of<S>(j, 0);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float logit = z[i][j][half * 2 + e];
          const int token = ROLE == TO_WEIGHT ? column + e : row, word = ROLE == TO_WEIGHT ? row : column + e;
          const bool is_label = ROLE != SWEEP && label[token] == word;
          if (logit == -INFINITY || (is_label && h.without_label)) continue;
          const float above = logit - of[BASE * BM + token], power = fast_exp(above);
          value[e] = power;
          if (ROLE == SWEEP) {
            sum += power, spread += power * above, total += logit;
          } else {
            value[e] = power * (of[PROB * BM + token] + of[ENTROPY * BM + token] * above) + of[UNIFORM * BM + token];
            if (is_label) value[e] += of[LABEL * BM + token];
            value[e] *= h.scale;
          }
          value[e] *= slope_of(h.softcap, logit);
          if (ROLE == TO_WEIGHT) sum += value[e];
        }
        store(reinterpret_cast<uint32_t*>(values + row * stride + column), pack(value[0], value[1]));
      }
      if (ROLE == TO_HIDDEN) continue;
      sum = lanes_sum(sum);
      if (ROLE == SWEEP) spread = lanes_sum(spread), total = lanes_sum(total);
      if (threadIdx.x % 4 == 0) parts[threadIdx.x / WARP % S::WARPS_N * BM + row] = Part{0.0f, sum, spread, total};
    }
}

template <int ROLE> __device__ __forceinline__ void store_tile(const Grouped& h, const Tile<S>& acc, int64_t base, int64_t row0, int64_t column0) {
  const int64_t width = h.own.cols;
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = row0 + row_of<S>(i, half * 2);
      if (row >= h.own.rows) continue;
#pragma unroll
      for (int j = 0; j < S::NF; j++) {
        const int64_t column = column0 + column_of<S>(j, 0);
        const float first = acc[i][j][half * 2], second = acc[i][j][half * 2 + 1];
        if (ROLE == TO_WEIGHT && h.narrow_out) {
          store_pair(static_cast<bf16*>(h.out) + row * width, column, width, first, second, width % 2 == 0);
          continue;
        }
        float* out = static_cast<float*>(h.out) + (base + row) * width + column;
        if (column < width) store(out, first + (ROLE == TO_WEIGHT && h.accumulate ? load_again(out) : 0.0f));
        if (column + 1 < width) store(out + 1, second + (ROLE == TO_WEIGHT && h.accumulate ? load_again(out + 1) : 0.0f));
      }
    }
}

template <int ROLE> __global__ void __launch_bounds__(S::THREADS, 1) head_group(const Grouped h) {
  DYNAMIC_SHARED(Chunk, stages, S::STAGE * STAGES);
  SHARED(Part, parts, S::WARPS_N * BM);
  SHARED(Part, sums, BM);  // of a row, all relative to its reference, which is `top`
  SHARED(float, of, 5 * BM);
  SHARED(float, keep, BM);
  SHARED(float, label_logit, BM);
  SHARED(int, label, BM);
  const int tid = threadIdx.x, group = blockIdx.x / h.group, member = blockIdx.x % h.group, depth = h.group * BN;
  uint32_t *tiles = h.counters + group * 2 * LINE, *tops = tiles + LINE;
  float* notes = h.notes + static_cast<int64_t>(group) * 2 * h.group * BM;
  bf16* values = h.values + static_cast<int64_t>(group) * 2 * BM * depth;
  const int steps = static_cast<int>((h.other.rows + depth - 1) / depth), share = (steps + h.splits - 1) / h.splits;
  uint32_t turn = 0;  // how many steps have been made
  for (int item = group; item < h.items; item += gridDim.x / h.group) {
    const int64_t row0 = static_cast<int64_t>(item / h.splits) * BM, column0 = h.column0 + member * BN;
    const int begin = min(steps, item % h.splits * share), end = min(steps, begin + share);
    Tile<S> acc = {};
    if (tid < BM) sums[tid] = Part{-INFINITY, 0.0f, 0.0f, 0.0f}, label_logit[tid] = 0.0f;
    for (int step = begin; step <= end; step++) {
      const int64_t at = static_cast<int64_t>(step) * depth + member * BN;
      const int buffer = buffer_of(turn);
      Tile<S> z = {};
      if (step < end) {
        if (FAULT(37) && at >= h.other.rows) return;
        read_tokens<ROLE>(h, of, label, row0, at);
        if (at < h.other.rows) multiply<S, false, false>(z, stages, Plain{h.own}, Plain{h.other}, row0, at, 0, h.own.cols);
        else sync_block();
        to_logits<ROLE>(h, z, row0, at);
      }
      if (ROLE == SWEEP && step < end) {
        part_with_label<S>(z, label, label_logit, h.without_label);
        note_tops(z, parts);
        sync_block();
        if (tid < BM) {
          float top = -INFINITY;
          for (int w = 0; w < S::WARPS_N; w++) top = fmaxf(top, static_cast<Part>(parts[w * BM + tid]).top);
          store(notes + (buffer * h.group + member) * BM + tid, top);
        }
        arrive(tops);
      }
      if (step > begin) {
        if (!FAULT(31)) wait_for(tiles, turn * h.group);
        Matrix other = h.other;
        const int64_t past = static_cast<int64_t>(step - 1) * depth;
        other.p += past * other.stride, other.rows -= past;
        const Matrix all{values + static_cast<int64_t>(buffer_of(turn - 1)) * BM * depth, depth, BM, depth, true};
        multiply<S, false, true>(acc, stages, Plain{all}, Plain{other}, 0, column0 - (FAULT(21) && member ? BN : 0), 0, min(other.rows, static_cast<int64_t>(depth)));
      }
      if (step < end) {
        if (ROLE == SWEEP) {
          if (!FAULT(33)) wait_for(tops, (turn + 1) * h.group);
          if (tid < BM) {
            Part mine = sums[tid];
            keep[tid] = agree(mine, notes + buffer * h.group * BM, h.group);
            of[BASE * BM + tid] = mine.top, sums[tid] = mine;
          }
          sync_block();
          if (!FAULT(35)) scale_rows(acc, keep);
        }
        pass_on<ROLE>(h, z, of, label, parts, values + static_cast<int64_t>(buffer) * BM * depth + member * BN, depth);
        if (ROLE != TO_HIDDEN) {
          sync_block();
          if (tid < BM) {
            Part mine = sums[tid];
            for (int w = 0; w < S::WARPS_N; w++) {
              const Part part = parts[w * BM + tid];
              mine.sum += part.sum, mine.spread += part.spread, mine.total += part.total;
            }
            sums[tid] = mine;
            if (ROLE == TO_WEIGHT && h.dbias && step == end - 1) store(notes + (buffer * h.group + member) * BM + tid, mine.sum);
          }
        }
        arrive(tiles);
        turn++;
      }
    }
    if (ROLE == SWEEP && tid < BM && row0 + tid < h.tokens)
      write_part(h.parts + static_cast<int64_t>(item % h.splits * h.group + member) * 5 * h.tokens, h.tokens, row0 + tid, sums[tid], label_logit[tid]);
    if (ROLE == TO_WEIGHT && h.dbias && member == 0 && tid < BM && row0 + tid < h.own.rows) {
      float sum = 0.0f;
      for (int m = 0; m < (FAULT(22) ? 1 : h.group); m++) sum += load_again(notes + (buffer_of(turn - 1) * h.group + m) * BM + tid);
      store(h.dbias + row0 + tid, sum);
    }
    store_tile<ROLE>(h, acc, static_cast<int64_t>(item % h.splits) * h.own.rows, row0, column0);
  }
}

// --- host
int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int held() {
  const int sweep = blocks_at_once(head_group<SWEEP>, S::THREADS, S::BYTES), hidden = blocks_at_once(head_group<TO_HIDDEN>, S::THREADS, S::BYTES);
  return min(min(sweep, hidden), blocks_at_once(head_group<TO_WEIGHT>, S::THREADS, S::BYTES));
}
// Blocks of a group: one for each 128 columns, or, where the device cannot hold as many, an equal share of them for each of several passes.
int group_of(int64_t hidden, int blocks) {
  const int64_t tiles = up(hidden, BN);
  return blocks && tiles ? static_cast<int>(up(tiles, up(tiles, blocks))) : 0;
}

template <int ROLE> int run(Grouped h, int64_t hidden, int splits, void* workspace, int groups, Stream stream) {
  const int64_t items = up(h.own.rows, BM) * splits;
  h.group = group_of(hidden, held()), h.splits = splits, h.items = static_cast<int>(items);
  if (h.group == 0 || groups < 1 || splits < 1 || items > 0x7fffffff) return MSWIFT_UNSUPPORTED;
  h.counters = static_cast<uint32_t*>(workspace);
  h.notes = reinterpret_cast<float*>(h.counters + static_cast<int64_t>(groups) * 2 * LINE);
  h.values = reinterpret_cast<bf16*>(h.notes + static_cast<int64_t>(groups) * 2 * h.group * BM);
  const dim3 grid(static_cast<unsigned>(min(static_cast<int64_t>(groups), items) * h.group));
  for (h.column0 = 0; h.column0 < hidden; h.column0 += static_cast<int64_t>(h.group) * BN) {
    int error = clear(workspace, static_cast<size_t>(groups) * 2 * LINE * sizeof(uint32_t), stream);
    if (!error) error = launch_together(head_group<ROLE>, grid, dim3(S::THREADS), S::BYTES, stream, h);
    if (error) return error;
  }
  return 0;
}

}  // namespace

extern "C" int mswift_head_group(int64_t hidden) { return group_of(hidden, held()); }
extern "C" int mswift_head_groups(int64_t hidden) {
  const int blocks = held(), group = group_of(hidden, blocks);
  return group ? blocks / group : 0;
}

extern "C" int mswift_head_sweep(const mswift_head* head, float* stats, float* acc, float* partial, float* acc_parts, int splits, void* workspace, int groups,
                                 void* stream) {
  if (head->tokens == 0) return 0;
  Grouped h = sides<Grouped>(*head, false);
  h.parts = partial, h.out = splits > 1 ? acc_parts : acc;
  int error = run<SWEEP>(h, head->hidden, splits, workspace, groups, static_cast<Stream>(stream));
  const int64_t group = mswift_head_group(head->hidden);
  if (!error) error = mswift_head_merge(partial, stats, splits * group, head->tokens, stream);
  return error || splits == 1 ? error : join_parts(*head, acc_parts, partial, group * 5 * head->tokens, acc, splits, stream);
}

extern "C" int mswift_head_gradient(const mswift_head* head, const float* lse, const float* coefficients, float* dx_acc, float* acc_parts, int splits,
                                    void* dweight, int dweight_dtype, int accumulate, float* dbias, void* workspace, int groups, void* stream) {
  if (head->tokens == 0) return 0;
  int error = 0;
  if (dx_acc) {
    Grouped h = sides<Grouped>(*head, false);
    h.lse = lse, h.coefficients = coefficients, h.out = splits > 1 ? acc_parts : dx_acc;
    error = run<TO_HIDDEN>(h, head->hidden, splits, workspace, groups, static_cast<Stream>(stream));
    if (!error && splits > 1) error = join_parts(*head, acc_parts, nullptr, 0, dx_acc, splits, stream);
  }
  if (!error && dweight) {
    Grouped h = sides<Grouped>(*head, true);
    h.lse = lse, h.coefficients = coefficients, h.out = dweight, h.narrow_out = dweight_dtype == 1, h.accumulate = accumulate != 0, h.dbias = dbias;
    error = run<TO_WEIGHT>(h, head->hidden, 1, workspace, groups, static_cast<Stream>(stream));
  }
  return error;
}
