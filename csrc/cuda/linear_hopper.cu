// The large products of linear.cu on Hopper: a warp loads tiles by TMA into a ring of stages, two warpgroups multiply them by wgmma, each block
// goes from tile to tile of the output, so that the next tile is being loaded while this one is stored.
//
// In the ring: x (or the adapter's low) 128 x 64, weight (or up) 256 x 64, or 64 x 256 by columns as four boxes of 64 x 64. Two barriers a
// stage: full (the loads' bytes) and empty (a lane of each multiplying warp, once the warp's products have read the stage).
// Compiled for sm_90a alone, and only where the build says MSWIFT_SM90A.
#include "linear.cuh"

#if !defined(__CUDACC__) || defined(MSWIFT_SM90A)
#include "hopper.cuh"

#include <cstdlib>
#include <cstring>

namespace {

using Wide = Shape<128, 256, 8, 1>;  // 16 x 256 a warp, as wgmma spreads 64 x 256 over the four of a warpgroup
constexpr int STEP = 64, RING = 4, THREADS = Wide::THREADS + WARP;
constexpr uint32_t BOX = STEP * 128, A_BYTES = Wide::BM * STEP * 2, B_BYTES = Wide::BN * STEP * 2, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr size_t ASYNC_BYTES = 1024 + RING * (STAGE_BYTES + 16);

struct Maps {
  TensorMap x, weight, low, up;
};
struct Walk {  // over the tiles of the output, rows first, so that blocks side by side share a weight's tile
  int64_t tiles, down;
};

// Addresses and phases of the ring; a turn is one filling of a stage, counted over all tiles.
struct Ring {
  uint32_t start;
  __device__ __forceinline__ uint32_t a(uint32_t turn) const { return start + turn % RING * STAGE_BYTES; }
  __device__ __forceinline__ uint32_t b(uint32_t turn) const { return a(turn) + A_BYTES; }
  __device__ __forceinline__ uint32_t full(uint32_t turn) const { return start + RING * STAGE_BYTES + turn % RING * 16; }
  __device__ __forceinline__ uint32_t empty(uint32_t turn) const { return full(turn) + 8; }
  __device__ __forceinline__ void wait_full(uint32_t turn) const { barrier_wait(full(turn), (turn / RING + (FAULT(51) ? 1 : 0)) % 2); }
  // The first time round nobody has to have emptied it: the phase before the first counts as over.
  __device__ __forceinline__ void wait_empty(uint32_t turn) const { barrier_wait(empty(turn), (turn / RING + (FAULT(42) ? 0 : 1)) % 2); }
};

// A product's tiles of depth `width`.
template <bool COLUMNS>
__device__ __forceinline__ void load_stages(const Ring& ring, uint32_t& turn, const TensorMap& left, const TensorMap& right, int64_t m0, int64_t n0,
                                            int64_t width) {
#pragma unroll 1
  for (int64_t k = 0; k < width; k += STEP, turn++) {
    const int32_t inner = static_cast<int32_t>(k), row = static_cast<int32_t>(m0), column = static_cast<int32_t>(n0);
    const uint32_t full = ring.full(turn), b = ring.b(turn);
    ring.wait_empty(turn);
    barrier_expect(full, STAGE_BYTES + (FAULT(45) ? 128 : 0) - (FAULT(50) ? A_BYTES : 0));
    load_tile(ring.a(turn), left, inner, row, full);
    if (COLUMNS)
      for (int i = 0; i < Wide::BN / STEP; i++) load_tile(b + i * BOX, right, column + i * STEP, inner, full);
    else load_tile(b, right, inner, column, full);
  }
}

// acc += a product of depth `width`; a stage is given back when the products after its own have been issued and its own are over.
template <bool COLUMNS> __device__ __forceinline__ void multiply_stages(Tile<Wide>& acc, const Ring& ring, uint32_t& turn, int64_t width) {
  const uint32_t group = threadIdx.x / WARPGROUP;
  auto give_back = [&](uint32_t of) {
    if (threadIdx.x % WARP == 0) barrier_arrive(ring.empty(of));
  };
  hold(acc[0]);
#pragma unroll 1
  for (int64_t k = 0; k < width; k += STEP, turn++) {
    if (!FAULT(52)) ring.wait_full(turn);
    if (!FAULT(46)) wgmma_fence();
    const uint32_t a = ring.a(turn) + group * 64 * 128, b = ring.b(turn);
#pragma unroll
    for (int d = 0; d < STEP / 16; d++) {
      const uint64_t left = descriptor(a + d * 32, 0);
      const uint64_t right = COLUMNS ? descriptor(b + d * 16 * 128, FAULT(48) ? 1024 : BOX) : descriptor(b + d * 32, 0);
      if (FAULT(44)) wgmma<!COLUMNS>(acc[0], left, right);
      else wgmma<COLUMNS>(acc[0], left, right);
    }
    wgmma_commit();
    if (FAULT(41)) give_back(turn);
    wgmma_wait<1>();
    if (k && !FAULT(41)) give_back(turn - 1);
  }
  if (!FAULT(49)) wgmma_wait<0>();
  hold(acc[0]);
  if (width && !FAULT(41)) give_back(turn - 1);
}

template <bool COLUMNS>
__global__ void __launch_bounds__(THREADS, 1) linear_hopper(const __grid_constant__ Maps maps, const Linear<Plain> l, const Walk walk) {
  const Ring ring{(async_memory() + 1023) / 1024 * 1024};
  if (threadIdx.x == 0) {
    for (uint32_t stage = 0; stage < RING; stage++) {
      barrier_init(ring.full(stage), 1);
      barrier_init(ring.empty(stage), Wide::THREADS / WARP);
    }
    if (!FAULT(47)) barrier_fence();
  }
  sync_block();
  uint32_t turn = 0;
  if (threadIdx.x >= Wide::THREADS) {
    if (threadIdx.x > Wide::THREADS) return;  // one thread loads
    for (int64_t tile = blockIdx.x; tile < walk.tiles; tile += gridDim.x) {
      const int64_t m0 = tile % walk.down * Wide::BM, n0 = tile / walk.down * Wide::BN;
      load_stages<COLUMNS>(ring, turn, maps.low, maps.up, m0, n0, l.low.cols);
      load_stages<COLUMNS>(ring, turn, maps.x, maps.weight, m0, n0, l.k);
    }
    return;
  }
  for (int64_t tile = blockIdx.x; tile < walk.tiles; tile += gridDim.x) {
    const int64_t m0 = tile % walk.down * Wide::BM, n0 = tile / walk.down * Wide::BN;
    Tile<Wide> acc = {};
    multiply_stages<COLUMNS>(acc, ring, turn, l.low.cols);
    if (l.low.cols && l.mask.threshold) drop_tile<Wide>(acc, l.mask, m0, n0);
    multiply_stages<COLUMNS>(acc, ring, turn, l.k);
    finish_tile<Wide>(acc, l, Where{m0, l.rows, 0, 0}, n0);
  }
}

template <bool COLUMNS> int launch_hopper(const mswift_linear_args& a, void* stream) {
  const Plain weight{COLUMNS ? matrix(a.weight, a.k, a.n, a.n) : matrix(a.weight, a.n, a.k, a.k)};
  const Linear<Plain> l = linear_of<COLUMNS>(a, weight);
  const int right_rows = COLUMNS ? STEP : Wide::BN;
  auto map_of = [](TensorMap& map, const Matrix& m, int box_rows) { return tensor_map(map, m.p, m.rows, m.cols, m.stride, box_rows); };
  Maps maps{};
  if (!map_of(maps.x, l.x.m, Wide::BM) || !map_of(maps.weight, l.weight.m, right_rows)) return MSWIFT_UNSUPPORTED;
  if (l.low.cols && (!map_of(maps.low, l.low, Wide::BM) || !map_of(maps.up, l.up, right_rows))) return MSWIFT_UNSUPPORTED;
  Walk walk{0, (a.rows + Wide::BM - 1) / Wide::BM};
  walk.tiles = walk.down * ((a.n + Wide::BN - 1) / Wide::BN);
  const int64_t blocks = min(walk.tiles, static_cast<int64_t>(multiprocessors()));
  return launch(linear_hopper<COLUMNS>, dim3(static_cast<unsigned>(blocks)), dim3(THREADS), ASYNC_BYTES, static_cast<Stream>(stream), maps, l, walk);
}

}  // namespace

// MSWIFT_WGMMA=1 asks for it: no device has run it yet.
int run_hopper(const mswift_linear_args& a, void* stream) {
  const char* wanted = std::getenv("MSWIFT_WGMMA");
  if (wanted == nullptr || std::strcmp(wanted, "1") != 0 || !is_hopper()) return MSWIFT_UNSUPPORTED;
  const bool tables = a.weight_table || a.up_table || a.bias_table;
  const bool plain = a.weight && a.weight_kind == 0 && !a.offsets && !tables && a.x_dropout.threshold == 0 && !a.x_column_scale;
  const bool large = !a.thin && a.rows >= 64 && a.n >= 64 && a.k >= 64 && a.rows < 1ll << 31 && a.n < 1ll << 31 && a.k < 1ll << 31;
  if (!plain || !large) return MSWIFT_UNSUPPORTED;
  return a.columns ? launch_hopper<true>(a, stream) : launch_hopper<false>(a, stream);
}
#else
int run_hopper(const mswift_linear_args&, void*) { return MSWIFT_UNSUPPORTED; }
#endif
