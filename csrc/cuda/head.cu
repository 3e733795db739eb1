// The vocabulary's head: statistics of the logits, and their gradient, tile by tile. A tile of logits lives in registers only; what is written
// of it are probabilities or gradients of one chunk of the vocabulary, in bf16, for the products that follow.
#include <cmath>

#include "head.cuh"

namespace {
using S = Large;
enum Mode { STATISTICS, SWEEP, REPAIR, GRADIENT };
constexpr float FAR = 60.0f;  // exp of more would leave too little room above it

struct Head {
  Matrix x, weight;  // weight: the rows of this chunk
  const bf16* bias;
  const int64_t* labels;
  int64_t tokens, first, count;  // first row of the vocabulary in this chunk; how many rows of it are not padding
  float scale, softcap;
  bool without_label;
  float* partial;                               // STATISTICS, SWEEP
  const float *reference, *lse, *coefficients;  // SWEEP and REPAIR; GRADIENT
  const int32_t* flags;                         // REPAIR
  bf16* out;  // [tokens, stride], stride a multiple of BN: whole tiles fit along a row
  int64_t stride;
};

// of column `column` of a tile that has `real` columns before the padding
__device__ __forceinline__ float logit(const Head& h, float product, const bf16* bias, int column, int real) {
  if (column >= real + (FAULT(17) ? 1 : 0)) return -INFINITY;
  if (bias) product += widen(load(bias + column));
  return softened(h.scale, h.softcap, product);
}
// The logit of the label is noted, and leaves the tile where it is not to be counted with the others.
template <bool NOTES> __device__ __forceinline__ void part_with_label(Tile<S>& z, SharedPtr<int> label, SharedPtr<float> label_logit, bool leaves) {
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
          if (NOTES) label_logit[row] = z[i][j][half * 2 + e];
          if (leaves) z[i][j][half * 2 + e] = -INFINITY;
        }
    }
}

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

// What a row's elements are computed with, in shared memory: the reference or the log-sum-exp, then the coefficients of mswift_head_gradient.
enum Of { BASE, LABEL, PROB, ENTROPY, UNIFORM };
template <int MODE> __device__ __forceinline__ void read_rows(const Head& h, SharedPtr<float> of, int64_t t) {
  const bool here = t < h.tokens;
  of[BASE * S::BM + threadIdx.x] = here ? load((MODE == GRADIENT ? h.lse : h.reference) + t) : 0.0f;
  if (MODE == GRADIENT)
    for (int i = 0; i < 4; i++) of[(LABEL + i) * S::BM + threadIdx.x] = here ? load(h.coefficients + i * h.tokens + t) : 0.0f;
}

// What is written of a tile: exp(z - reference) dz/dproduct (SWEEP, REPAIR) or the gradient of the products (GRADIENT).
template <int MODE> __device__ __forceinline__ void write_tile(const Head& h, const Tile<S>& z, SharedPtr<float> of, SharedPtr<int> label, bf16* out, int rows) {
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_of<S>(i, half * 2);
      if (row >= rows) continue;
      const float base = of[BASE * S::BM + row];
#pragma unroll
      for (int j = 0; j < S::NF; j++) {
        float value[2];
        const int column = column_of<S>(j, 0);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float logit = z[i][j][half * 2 + e], above = logit - base, slope = slope_of(h.softcap, logit), power = fast_exp(above);
          value[e] = power * slope;
          if (MODE == GRADIENT) {
            const float of_prob = of[PROB * S::BM + row], of_entropy = of[ENTROPY * S::BM + row], of_uniform = of[UNIFORM * S::BM + row];
            value[e] = power * (of_prob + of_entropy * above) + of_uniform;
            if (column + e == label[row]) value[e] += of[LABEL * S::BM + row];
            value[e] *= slope * h.scale;
          }
          if (logit == -INFINITY) value[e] = 0.0f;
        }
        store(reinterpret_cast<uint32_t*>(out + row * h.stride + column), pack(value[0], value[1]));
      }
    }
}

template <int MODE> __global__ void __launch_bounds__(S::THREADS, 2) head_tiles(const Head h) {
  constexpr bool COUNTS = MODE == STATISTICS || MODE == SWEEP, WRITES = MODE != STATISTICS;
  DYNAMIC_SHARED(Chunk, stages, S::STAGE * STAGES);
  SHARED(Part, parts, COUNTS ? S::WARPS_N * S::BM : 1);
  SHARED(float, label_logit, COUNTS ? S::BM : 1);
  SHARED(int, label, S::BM);
  SHARED(float, of, MODE == GRADIENT ? 5 * S::BM : WRITES ? S::BM : 1);
  if (MODE == REPAIR && load(h.flags + blockIdx.x) == 0) return;
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * S::BM;
  const int tid = threadIdx.x, tiles = static_cast<int>((h.weight.rows + S::BN - 1) / S::BN);
  Part mine{-INFINITY, 0.0f, 0.0f, 0.0f};
  if (tid < S::BM) {
    if (WRITES) read_rows<MODE>(h, of, t0 + tid);
    if (COUNTS) label_logit[tid] = 0.0f;
  }
  for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t v0 = static_cast<int64_t>(tile) * S::BN;
    if (tid < S::BM) {
      const int64_t at = t0 + tid < h.tokens ? load(h.labels + t0 + tid) - (FAULT(18) ? 0 : h.first) - v0 : -1;
      label[tid] = at >= 0 && at < S::BN ? static_cast<int>(at) : -1;
    }
    Tile<S> z = {};
    multiply<S, false, false>(z, stages, Plain{h.x}, Plain{h.weight}, t0, v0, 0, h.x.cols);
    const bf16* bias = h.bias ? h.bias + v0 : nullptr;
    const int real = static_cast<int>(min(h.count - v0, static_cast<int64_t>(S::BN)));
#pragma unroll
    for (int i = 0; i < S::MF; i++)
#pragma unroll
      for (int j = 0; j < S::NF; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) z[i][j][e] = logit(h, z[i][j][e], bias, column_of<S>(j, e), real);
    if (COUNTS || h.without_label) part_with_label<COUNTS>(z, label, label_logit, h.without_label);
    if (WRITES) write_tile<MODE>(h, z, of, label, h.out + t0 * h.stride + v0, static_cast<int>(min(h.tokens - t0, static_cast<int64_t>(S::BM))));
    if (COUNTS) {
      note_statistics(z, parts);
      if (!FAULT(19)) sync_block();
      if (tid < S::BM)
        for (int w = 0; w < S::WARPS_N; w++) mine = merge(mine, parts[w * S::BM + tid]);
    } else {
      sync_block();  // the labels of the next tile are written
    }
  }
  if (COUNTS && tid < S::BM && t0 + tid < h.tokens) {
    float* out = h.partial + static_cast<int64_t>(blockIdx.y) * 5 * h.tokens + t0 + tid;
    const float logit_of_label = label_logit[tid];
    store(out, mine.top);
    store(out + h.tokens, mine.sum);
    store(out + 2 * h.tokens, logit_of_label);
    store(out + 3 * h.tokens, mine.spread);
    store(out + 4 * h.tokens, mine.total);
  }
}

constexpr int THREADS = 128;
static_assert(THREADS == S::BM, "one block of `advance` decides for one tile of rows");

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

// The first reference of a row: the maximum over the first tile of the vocabulary.
__global__ void __launch_bounds__(THREADS) start_sweep(const float* first_tile, float* reference, int64_t tokens) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (t >= tokens) return;
  const float top = load(first_tile + t);
  store(reference + t, top == -INFINITY ? 0.0f : top);
}

// After a chunk: its statistics join the others; what acc and this chunk's product are to be multiplied by, so that both are relative to
// the new maximum. A chunk that passed the old reference by far is flagged, and written again relative to the new one.
__global__ void __launch_bounds__(THREADS) advance(const float* parts, int count, float* stats, float* reference, float* factors, int32_t* flags, int64_t tokens,
                                                   bool first) {
  SHARED(float, scratch, THREADS / WARP);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  Part all{-INFINITY, 0.0f, 0.0f, 0.0f};
  float label_logit = 0.0f, before = 0.0f;
  if (t < tokens) {
    before = load_again(reference + t);
    if (!first) {
      all = Part{load_again(stats + t), load_again(stats + tokens + t), load_again(stats + 3 * tokens + t), load_again(stats + 4 * tokens + t)};
      label_logit = load_again(stats + 2 * tokens + t);
    }
    for (int i = 0; i < count; i++) {
      all = merge(all, read_part(parts + static_cast<int64_t>(i) * 5 * tokens, tokens, t));
      label_logit += load(parts + static_cast<int64_t>(i) * 5 * tokens + 2 * tokens + t);
    }
  }
  const float after = all.sum == 0.0f ? before : all.top;
  const bool again = block_sum<THREADS>(after - before > FAR ? 1.0f : 0.0f, scratch) > 0.0f;
  if (threadIdx.x == 0) store(flags + blockIdx.x, again && !FAULT(21) ? 1 : 0);
  if (t >= tokens) return;
  const float keep = fast_exp(before - after);
  write_part(stats, tokens, t, all, label_logit);
  store(reference + t, after);
  store(factors + t, keep);
  store(factors + tokens + t, again && !FAULT(22) ? 1.0f : keep);
}

struct Finish {
  const float *acc, *reference, *lse, *label_logit, *of_label, *of_prob;
  const int64_t* labels;
  const bf16* weight;
  bf16* dx;
  int64_t tokens, hidden, first, vocab;
  float scale, softcap;
  bool wide;
};
__global__ void __launch_bounds__(THREADS) finish(const Finish f) {
  const int64_t t = blockIdx.x;
  float of_acc = 1.0f, of_row = 0.0f;
  int64_t label = -1;
  if (f.reference) {
    of_acc = f.scale * load(f.of_prob + t) * fast_exp(load(f.reference + t) - load(f.lse + t));
    label = load(f.labels + t) - f.first;
    if (label >= f.vocab) label = -1;
    if (label >= 0) of_row = f.scale * load(f.of_label + t) * slope_of(f.softcap, load(f.label_logit + t));
  }
  for (int64_t at = threadIdx.x * 8; at < f.hidden; at += THREADS * 8) {
    float low[4], high[4], row[8] = {};
    load_pack(low, f.acc + t * f.hidden, at, f.hidden, f.wide);
    load_pack(high, f.acc + t * f.hidden, at + 4, f.hidden, f.wide);
    if (label >= 0) load_pack(row, f.weight + label * f.hidden, at, f.hidden, f.wide);
#pragma unroll
    for (int i = 0; i < 8; i++) row[i] = of_acc * (i < 4 ? low[i % 4] : high[i % 4]) + of_row * row[i];
    store_pack(row, f.dx + t * f.hidden, at, f.hidden, f.wide);
  }
}

// The rows [begin, begin + count) of the vocabulary that is here
Head head_of(const mswift_head& a, int64_t begin, int64_t count) {
  Head h{};
  h.x = matrix(a.x, a.tokens, a.hidden, a.hidden);
  h.weight = matrix(static_cast<const bf16*>(a.weight) + begin * a.hidden, count, a.hidden, a.hidden);
  h.bias = a.bias ? static_cast<const bf16*>(a.bias) + begin : nullptr;
  h.labels = a.labels, h.tokens = a.tokens, h.first = a.first + begin;
  const int64_t real = a.size - h.first;
  h.count = real < 0 ? 0 : real < count ? real : count;
  h.scale = a.scale, h.softcap = a.softcap, h.without_label = a.without_label != 0;
  return h;
}
template <int MODE> int run(const Head& h, int64_t splits, Stream stream) {
  const unsigned rows = static_cast<unsigned>((h.tokens + S::BM - 1) / S::BM);
  return launch(head_tiles<MODE>, dim3(rows, static_cast<unsigned>(splits)), dim3(S::THREADS), S::BYTES, stream, h);
}
unsigned row_tiles(int64_t tokens) { return static_cast<unsigned>((tokens + THREADS - 1) / THREADS); }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// acc = keep acc + factor (values weight[chunk]); fresh: nothing is in acc yet
int add_product(const mswift_head& a, const Head& h, const void* values, int64_t stride, bool fresh, const float* keep, const float* factor, float* acc,
                void* stream) {
  mswift_linear_args l{};
  l.x = values, l.weight = h.weight.p, l.row_keep = keep, l.row_factor = factor, l.out = acc;
  l.rows = a.tokens, l.n = a.hidden, l.k = h.weight.rows, l.x_stride = stride, l.alpha = 1.0f, l.columns = 1, l.accumulate = fresh ? 2 : 1;
  return mswift_linear(&l, stream);
}
}  // namespace

extern "C" int mswift_head_statistics(const mswift_head* head, float* stats, float* partial, int splits, void* stream) {
  if (head->tokens == 0) return 0;
  Head h = head_of(*head, 0, head->vocab);
  h.partial = partial;
  const int error = run<STATISTICS>(h, splits, static_cast<Stream>(stream));
  return error ? error : mswift_head_merge(partial, stats, splits, head->tokens, stream);
}

extern "C" int mswift_head_merge(const float* parts, float* stats, int64_t count, int64_t tokens, void* stream) {
  if (tokens == 0) return 0;
  return launch(merge_parts, dim3(row_tiles(tokens)), dim3(THREADS), 0, static_cast<Stream>(stream), parts, stats, count, tokens);
}

extern "C" int mswift_head_sweep(const mswift_head* head, float* stats, float* reference, float* acc, void* probabilities, int64_t chunk, float* partial,
                                 int splits, float* factors, int32_t* flags, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  const int64_t tokens = head->tokens;
  if (tokens == 0) return 0;
  if (chunk <= 0 || chunk % S::BN) return MSWIFT_UNSUPPORTED;
  Head slice = head_of(*head, 0, least(S::BN, head->vocab));
  slice.partial = partial;
  int error = run<STATISTICS>(slice, 1, on);
  if (!error) error = launch(start_sweep, dim3(row_tiles(tokens)), dim3(THREADS), 0, on, static_cast<const float*>(partial), reference, tokens);
  for (int64_t begin = 0; begin < head->vocab && !error; begin += chunk) {
    Head h = head_of(*head, begin, least(chunk, head->vocab - begin));
    h.partial = partial, h.reference = reference, h.flags = flags, h.out = static_cast<bf16*>(probabilities), h.stride = chunk;
    const int64_t parts = least(splits, (h.weight.rows + S::BN - 1) / S::BN);
    error = run<SWEEP>(h, parts, on);
    if (!error)
      error = launch(advance, dim3(row_tiles(tokens)), dim3(THREADS), 0, on, static_cast<const float*>(partial), static_cast<int>(parts), stats, reference,
                     factors, flags, tokens, begin == 0);
    if (!error) error = run<REPAIR>(h, parts, on);
    if (!error) error = add_product(*head, h, probabilities, chunk, begin == 0, factors, factors + tokens, acc, stream);
  }
  return error;
}

extern "C" int mswift_head_finish(const mswift_head* head, const float* acc, const float* reference, const float* lse, const float* label_logit,
                                  const float* of_label, const float* of_prob, void* dx, void* stream) {
  if (head->tokens == 0) return 0;
  const bool wide = wide_rows<bf16>(dx, head->hidden) && wide_rows<bf16>(head->weight, 0) && wide_rows<float>(acc, 0);
  const Finish f{acc, reference, lse, label_logit, of_label, of_prob, head->labels, static_cast<const bf16*>(head->weight), static_cast<bf16*>(dx),
                 head->tokens, head->hidden, head->first, head->vocab, head->scale, head->softcap, wide};
  return launch(finish, dim3(static_cast<unsigned>(head->tokens)), dim3(THREADS), 0, static_cast<Stream>(stream), f);
}

extern "C" int mswift_head_gradient(const mswift_head* head, const float* lse, const float* coefficients, void* gradients, int64_t chunk, float* dx_acc,
                                    void* dweight, int dweight_dtype, int accumulate, float* dbias, float* sums, void* stream) {
  const int64_t tokens = head->tokens, hidden = head->hidden;
  if (tokens == 0) return 0;
  if (chunk <= 0 || chunk % S::BN) return MSWIFT_UNSUPPORTED;
  int error = 0;
  for (int64_t begin = 0; begin < head->vocab && !error; begin += chunk) {
    Head h = head_of(*head, begin, least(chunk, head->vocab - begin));
    h.lse = lse, h.coefficients = coefficients, h.out = static_cast<bf16*>(gradients), h.stride = chunk;
    error = run<GRADIENT>(h, (h.weight.rows + S::BN - 1) / S::BN, static_cast<Stream>(stream));
    if (!error && dx_acc) error = add_product(*head, h, gradients, chunk, begin == 0, nullptr, nullptr, dx_acc, stream);
    if (!error && dweight) {
      mswift_outer_args o{};
      o.a = gradients, o.b = head->x, o.rows = tokens, o.m = h.weight.rows, o.n = hidden, o.a_stride = chunk, o.b_stride = hidden, o.alpha = 1.0f;
      o.out = static_cast<char*>(dweight) + begin * hidden * (dweight_dtype == 1 ? 2 : 4), o.out_dtype = dweight_dtype, o.accumulate = accumulate;
      error = mswift_outer(&o, stream);
    }
    if (!error && dbias) error = mswift_column_sum(1, gradients, nullptr, sums, dbias + begin, tokens, h.weight.rows, chunk, stream);
  }
  return error;
}
