// a^T b over rows: gradients of weights and of adapters. The rows may be split over blocks; the parts are then added in a fixed order.
#include "mswift_cuda.h"
#include "tile.cuh"

namespace {
struct Outer {
  Changed a, b;
  const int64_t *offsets, *group_seeds;
  void* out;
  int64_t rows, m, n, groups;
  float alpha;
  int splits;
  bool narrow_out, accumulate;
};

template <class S> __global__ void __launch_bounds__(S::THREADS, 2) outer(const Outer o) {
  DYNAMIC_SHARED(Chunk, stages, S::STAGE * STAGES);
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * S::BM, n0 = static_cast<int64_t>(blockIdx.y) * S::BN;
  const int group = blockIdx.z / o.splits, split = blockIdx.z % o.splits;
  const int64_t first = o.offsets ? load(o.offsets + group) : 0, last = o.offsets ? load(o.offsets + group + 1) : o.rows;
  const int64_t share = ((last - first + o.splits - 1) / o.splits + BK - 1) / BK * BK;
  const int64_t begin = first + split * share, end = begin + share < last ? begin + share : last;
  Tile<S> acc = {};
  if (begin < end && !(FAULT(15) && o.splits > 1 && split == o.splits - 1)) {
    Changed a = o.a, b = o.b;
    a.m.rows = b.m.rows = end;
    if (o.group_seeds && b.dropout.threshold) {  // a mask for each group, whose rows count from the group's first
      b.dropout.seed = static_cast<uint64_t>(load(o.group_seeds + group));
      b.dropout.first_row -= FAULT(26) ? 0 : first;
    }
    multiply<S, true, true>(acc, stages, a, b, m0, n0, begin, end);
  }
  const int64_t base = (static_cast<int64_t>(split) * o.groups + group) * o.m;
#pragma unroll
  for (int i = 0; i < S::MF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = m0 + row_of<S>(i, half * 2);
      if (row >= o.m) continue;
#pragma unroll
      for (int j = 0; j < S::NF; j++) {
        const int64_t column = n0 + column_of<S>(j, 0);
        const float first_value = o.alpha * acc[i][j][half * 2], second_value = o.alpha * acc[i][j][half * 2 + 1];
        if (o.narrow_out) {
          store_pair(static_cast<bf16*>(o.out) + (base + row) * o.n, column, o.n, first_value, second_value, o.n % 2 == 0);
          continue;
        }
        float* out = static_cast<float*>(o.out) + (base + row) * o.n + column;
        if (column < o.n) store(out, first_value + (o.accumulate ? load_again(out) : 0.0f));
        if (column + 1 < o.n) store(out + 1, second_value + (o.accumulate ? load_again(out + 1) : 0.0f));
      }
    }
}

constexpr int THREADS = 256;
__global__ void __launch_bounds__(THREADS) sum_splits(const float* partial, void* out, int64_t count, int splits, bool narrow_out, bool accumulate) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= count) return;
  float sum = 0.0f;
  for (int s = 0; s < splits; s++) sum += load(partial + s * count + at);
  if (narrow_out) {
    store(static_cast<bf16*>(out) + at, narrow<bf16>(sum));
    return;
  }
  float* place = static_cast<float*>(out) + at;
  store(place, sum + (accumulate ? load_again(place) : 0.0f));
}

template <class S> int run(const Outer& o, Stream stream) {
  const int64_t along = (o.m + S::BM - 1) / S::BM, across = (o.n + S::BN - 1) / S::BN, deep = o.groups * o.splits;
  if (across > 65535 || deep > 65535) return MSWIFT_UNSUPPORTED;
  const dim3 grid(static_cast<unsigned>(along), static_cast<unsigned>(across), static_cast<unsigned>(deep));
  return launch(outer<S>, grid, dim3(S::THREADS), S::BYTES, stream, o);
}
}  // namespace

extern "C" int mswift_outer(const mswift_outer_args* args, void* stream) {
  const mswift_outer_args& a = *args;
  if (a.m == 0 || a.n == 0) return 0;
  const int64_t groups = a.offsets ? a.groups : 1, count = groups * a.m * a.n;
  const bool split = a.splits > 1;
  const Outer o{Changed{matrix(a.a, a.rows, a.m, a.a_stride), Dropout{}, a.a_column_scale},
                Changed{matrix(a.b, a.rows, a.n, a.b_stride), dropout(a.b_dropout), nullptr},
                a.offsets,
                a.offsets ? a.group_seeds : nullptr,
                split ? a.partial : a.out,
                a.rows,
                a.m,
                a.n,
                groups,
                a.alpha,
                split ? a.splits : 1,
                !split && a.out_dtype == 1,
                !split && a.accumulate};
  const Stream on = static_cast<Stream>(stream);
  const int error = a.m <= Flat::BM ? run<Flat>(o, on) : a.n <= Thin::BN ? run<Thin>(o, on) : run<Large>(o, on);
  if (error || !split) return error;
  return launch(sum_splits, dim3(static_cast<unsigned>((count + THREADS - 1) / THREADS)), dim3(THREADS), 0, static_cast<Stream>(stream), a.partial, a.out,
                count, a.splits, a.out_dtype == 1, a.accumulate != 0);
}
