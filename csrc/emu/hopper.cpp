// The run-time of hopper.h.
#include "hopper.h"

#include <array>

namespace emu {
namespace {

constexpr uint32_t START = 1024 + 16;  // of dynamic shared memory: no more aligned than a kernel may rely on
constexpr int GROUP = 128, GROUPS = 8;
constexpr uint32_t POISON = 0x7fc0dead;

using Clock = std::array<long, 32>;  // for each warp: how many of its warpgroup's products are known to be over there
void join(Clock& into, const Clock& other) {
  for (size_t i = 0; i < into.size(); i++) into[i] = std::max(into[i], other[i]);
}

struct Piece {  // 16 bytes
  bool filled = false, pending = false, barrier = false;
  uint32_t filled_by = 0, phase = 0;
  long reads[GROUPS] = {};  // the last product of each warpgroup that reads them
};
struct Barrier {
  uint32_t arrivals, missing, phase = 0;
  long bytes = 0;
  int owner;
  unsigned epoch;
  bool fenced = false;
  Clock gathered{}, released{};  // by arrivals of this phase too; when the last phase ended
};
struct Load {
  uint32_t to, barrier;
  TensorMap map;
  int32_t inner, outer;
};
struct Product {
  long number, committed;  // in which group of commits; 0: none yet
  float* d;
  int n;
  uint64_t a, b;
  bool a_transposed, b_transposed;
};
struct Accumulator {
  float* d;
  std::vector<float> value;
};
struct Lane {
  Clock known{};
  std::map<uint32_t, uint32_t> seen;  // of each barrier: phases known to be over
  std::vector<Product> products;
  std::vector<Accumulator> accumulators;
  long issued = 0, commits = 0;
  bool fenced = false;
};
struct Group {
  int arrived = 0, site = 0;
  unsigned epoch = 0;
  Product product{};
};

long products_issued = 0;

struct Async : Extension {
  std::vector<unsigned char> bytes;
  std::vector<Piece> pieces;
  std::map<uint32_t, Barrier> barriers;
  std::vector<Load> loads;
  std::vector<Lane> lanes;
  Group groups[GROUPS];
  long events = 0;
  std::mt19937 random{state().seed + 1};

  Async() : bytes(block().dynamic_bytes), pieces((block().dynamic_bytes + 15) / 16), lanes(block().fibers.size()) {}
  void leave() override {
    if (!lanes[fiber().index].products.empty()) fail("left with a wgmma that it never waited for");
    if (block().live == 1 && !loads.empty()) fail("the block ends while a load is on its way");
  }
  size_t offset(uint32_t at, size_t count, const char* what) {
    if (at < START || at - START + count > bytes.size()) fail("%s at %u, outside of the block's dynamic shared memory", what, at);
    return at - START;
  }
  Piece& piece(uint32_t at, const char* what) {
    offset(at, 16, what);
    return pieces[(at - START) / 16];
  }
  void event() { events++, block().progress++; }
};

Async& async() {
  if (!block().extension) block().extension = std::make_unique<Async>();
  return static_cast<Async&>(*block().extension);
}
Lane& lane_state() { return async().lanes[fiber().index]; }

// Lets the others run until none of them gets further.
void let_others_run() {
  Async& s = async();
  long seen;
  do {
    seen = s.events;
    block().progress++;
    yield();
  } while (s.events != seen);
}

Barrier& barrier(uint32_t at) {
  Async& s = async();
  const auto found = s.barriers.find(at);
  if (found == s.barriers.end()) fail("no barrier at %u", at);
  Barrier& b = found->second;
  if (b.owner != fiber().index && b.epoch == block().epoch) fail("barrier at %u used without a barrier of the block after its initialisation", at);
  return b;
}
void settle(uint32_t at, Barrier& b) {
  if (b.missing) return;
  if (b.bytes < 0) fail("barrier at %u got %ld bytes more than it expected", at, -b.bytes);
  if (b.bytes) return;
  b.phase++, b.missing = b.arrivals, b.released = b.gathered;
}

// Address bits 4 to 6 are changed by bits 7 to 9 (fewer of both in the narrower modes): Swizzle<bits, 4, 3>.
uint32_t swizzled(uint32_t at, int bits) { return at ^ ((at >> 7 & ((1u << bits) - 1)) << 4); }

void finish_load(size_t index) {
  Async& s = async();
  const Load load = s.loads[index];
  s.loads.erase(s.loads.begin() + index);
  Barrier& b = s.barriers.at(load.barrier);
  const TensorMap& map = load.map;
  for (uint32_t r = 0; r < map.box[1]; r++)
    for (uint32_t c = 0; c < map.box[0]; c++) {
      const int64_t row = static_cast<int64_t>(load.outer) + r, col = static_cast<int64_t>(load.inner) + c;
      const bool inside = row >= 0 && col >= 0 && row < static_cast<int64_t>(map.size[1]) && col < static_cast<int64_t>(map.size[0]);
      const uint32_t at = swizzled(load.to + (r * map.box[0] + c) * 2, 3);
      uint16_t value = 0;
      if (inside) memcpy(&value, map.base + row * map.stride + col * 2, 2);
      memcpy(&s.bytes[at - START], &value, 2);
      Piece& piece = s.pieces[(at - START) / 16];
      piece.pending = false, piece.filled = true, piece.filled_by = load.barrier, piece.phase = b.phase;
    }
  b.bytes -= map.box[0] * map.box[1] * 2;  // those beyond the limits count as well
  settle(load.barrier, b);
  s.event();
}

// Where element (mn, k) of an operand lies: the canonical layouts of the PTX ISA, for 2-byte elements.
struct Descriptor {
  uint32_t start, leading, stride, mode;
  bool transposed;
  Descriptor(uint64_t d, bool transposed_)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4), mode(d >> 62), transposed(transposed_) {
    if (d >> 49 & 7) fail("a matrix descriptor with a base offset: swizzle patterns here start at multiples of their size");
  }
  uint32_t at(uint32_t mn, uint32_t k) const {
    const uint32_t chunks = mode == 0 ? 1 : 16u >> mode, width = chunks * 8;  // of one row of the pattern: 16-byte chunks, elements
    uint32_t offset;
    if (transposed) {
      offset = mn % width * 2 + k % 8 * chunks * 16;
      offset += mode == 0 ? mn / width * stride + k / 8 * leading : mn / width * leading + k / 8 * stride;
    } else {
      offset = mn % 8 * chunks * 16 + mn / 8 * stride;
      offset += mode == 0 ? k % 8 * 2 + k / 8 * leading : k * 2;
    }
    return swizzled(start + offset, mode == 0 ? 0 : 4 - mode);
  }
};

void check_operand(uint64_t bits, bool transposed, int extent, long number) {
  Async& s = async();
  const int group = fiber().index / GROUP;
  const Descriptor d(bits, transposed);
  std::map<uint32_t, uint32_t> needed;  // of each barrier: phases that must be over
  for (int mn = 0; mn < extent; mn += transposed ? 8 : 1)
    for (int k = 0; k < 16; k += transposed ? 1 : 8) {
      Piece& piece = s.piece(d.at(mn, k), "an operand of wgmma");
      if (piece.pending) fail("wgmma reads what a load has not filled yet");
      if (!piece.filled) fail("wgmma reads shared memory that no load has filled");
      piece.reads[group] = number;
      uint32_t& phases = needed[piece.filled_by];
      phases = std::max(phases, piece.phase + 1);
    }
  for (int t = group * GROUP; t < (group + 1) * GROUP; t++)
    for (const auto& [at, phases] : needed)
      if (s.lanes[t].seen[at] < phases) fail("wgmma reads what a load filled, and thread %d has not waited for its barrier", t);
}

void finish_product(const Product& p, std::vector<float>& d) {
  Async& s = async();
  const Descriptor a(p.a, p.a_transposed), b(p.b, p.b_transposed);
  auto value = [&](const Descriptor& operand, uint32_t mn, uint32_t k) {
    const uint32_t at = operand.at(mn, k);
    const Piece& piece = s.pieces[(at - START) / 16];
    if (piece.pending || !piece.filled || piece.reads[fiber().index / GROUP] < p.number)
      fail("an operand of a wgmma has been written again before it was read");
    uint16_t bits;
    return memcpy(&bits, &s.bytes[at - START], 2), widen(bits);
  };
  const int first = fiber().index % GROUP / 32 * 16 + lane() / 4;
  float left[2][16];
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k++) left[half][k] = value(a, first + 8 * half, k);
  for (int column = 0; column < p.n / 4; column++) {
    const int j = column / 2, e = column % 2;
    for (int k = 0; k < 16; k++) {
      const float right = value(b, 8 * j + lane() % 4 * 2 + e, k);
      for (int half = 0; half < 2; half++) d[4 * j + 2 * half + e] += left[half][k] * right;
    }
  }
}

void free_accumulator(Lane& me, size_t index) {
  const Accumulator accumulator = me.accumulators[index];
  for (size_t i = 0; i < accumulator.value.size(); i++) {
    uint32_t bits;
    memcpy(&bits, &accumulator.d[i], 4);
    if (bits != POISON) fail("accumulator %zu of a wgmma was written before it was waited for", i);
  }
  std::copy(accumulator.value.begin(), accumulator.value.end(), accumulator.d);
  me.accumulators.erase(me.accumulators.begin() + index);
  me.fenced = false;
}

}  // namespace

int encode_tiled(TensorMap* map, const void* base, const uint64_t (&size)[2], uint64_t stride, const uint32_t (&box)[2]) {
  const bool aligned = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 16 == 0;
  const bool inside = size[0] && size[1] && size[0] <= 1ull << 32 && size[1] <= 1ull << 32 && stride < 1ull << 40 && stride >= size[0] * 2;
  const bool boxes = box[0] && box[1] && box[0] <= 256 && box[1] <= 256 && box[0] * 2 % 16 == 0 && box[0] * 2 <= 128;
  if (!aligned || !inside || !boxes) return 1;  // CUDA_ERROR_INVALID_VALUE
  *map = TensorMap{static_cast<const unsigned char*>(base), {size[0], size[1]}, stride, {box[0], box[1]}};
  return 0;
}

uint32_t async_memory() { return async(), START; }

void barrier_init(uint32_t at, uint32_t arrivals) {
  Async& s = async();
  if (at % 8) fail("a barrier at %u, not a multiple of 8", at);
  s.offset(at, 8, "a barrier");
  if (arrivals == 0 || arrivals >= 1 << 20) fail("a barrier of %u arrivals", arrivals);
  if (s.pieces[(at - START) / 16].filled || s.pieces[(at - START) / 16].pending) fail("a barrier at %u, where a load writes", at);
  s.pieces[(at - START) / 16].barrier = true;
  Barrier fresh{};
  fresh.arrivals = fresh.missing = arrivals, fresh.owner = fiber().index, fresh.epoch = block().epoch;
  if (!s.barriers.emplace(at, fresh).second) fail("a barrier at %u, where there is one", at);
}

void barrier_fence() {
  for (auto& entry : async().barriers)
    if (entry.second.owner == fiber().index) entry.second.fenced = true;
}

void barrier_arrive(uint32_t at, uint32_t expected_bytes) {
  Barrier& b = barrier(at);
  if (b.missing == 0) fail("more arrivals at the barrier at %u than it counts", at);
  join(b.gathered, lane_state().known);
  b.bytes += expected_bytes;
  b.missing--;
  settle(at, b);
  async().event();
}

void barrier_wait(uint32_t at, uint32_t parity) {
  Async& s = async();
  Barrier& b = barrier(at);
  while ((b.phase & 1) == parity) {
    std::vector<size_t> coming;
    for (size_t i = 0; i < s.loads.size(); i++)
      if (s.loads[i].barrier == at) coming.push_back(i);
    const long seen = s.events;
    if (!coming.empty()) block().progress++;
    yield();
    if (s.events == seen && !coming.empty()) finish_load(coming[s.random() % coming.size()]);
  }
  Lane& me = lane_state();
  me.seen[at] = b.phase;
  join(me.known, b.released);
}

void load_tile(uint32_t to, const TensorMap& map, int32_t inner, int32_t outer, uint32_t at) {
  Async& s = async();
  const Barrier& b = barrier(at);
  if (!b.fenced) fail("a load with a barrier whose initialisation is not fenced from the asynchronous proxy");
  if (map.box[0] * 2 != 128) fail("a box of %u columns: only rows of 128 bytes are modelled", map.box[0]);
  if (to % 1024) fail("a load to %u: the swizzle's pattern starts at multiples of 1024", to);
  s.offset(to, map.box[1] * 128, "a load");
  for (uint32_t i = 0; i < map.box[1] * 8; i++) {
    Piece& piece = s.piece(to + 16 * i, "a load");
    if (piece.pending) fail("a load onto what another has not filled yet");
    if (piece.barrier) fail("a load onto a barrier");
    for (int g = 0; g < GROUPS; g++)
      for (int w = 4 * g; piece.reads[g] && w < 4 * g + 4; w++)
        if (lane_state().known[w] < piece.reads[g]) fail("a load onto what a wgmma of warp %d may still be reading", w);
    piece.pending = true, piece.filled = false;
  }
  for (uint32_t r = 0; r < map.box[1]; r++) {
    const int64_t row = static_cast<int64_t>(outer) + r, first = std::max(inner, 0);
    const int64_t last = std::min(static_cast<int64_t>(inner) + map.box[0], static_cast<int64_t>(map.size[0]));
    if (row >= 0 && row < static_cast<int64_t>(map.size[1]) && first < last)
      check_global(map.base + row * map.stride + first * 2, (last - first) * 2, false, 2);
  }
  s.loads.push_back(Load{to, at, map, inner, outer});
  s.event();
}

void wgmma_fence() { lane_state().fenced = true; }

void wgmma(float* d, int n, uint64_t a, uint64_t b, bool a_transposed, bool b_transposed, int site) {
  Async& s = async();
  const size_t index = fiber().index / GROUP;
  if (n % 8 || n < 8 || n > 256) fail("wgmma with n = %d", n);
  if ((index + 1) * GROUP > s.lanes.size() || index >= GROUPS) fail("wgmma in a warpgroup that is not whole");
  Lane& me = lane_state();
  Group& group = s.groups[index];
  const Product product{++me.issued, 0, d, n, a, b, a_transposed, b_transposed};
  if (group.arrived == 0) group.site = site, group.product = product;
  const Product& first = group.product;
  if (group.site != site || first.a != a || first.b != b || first.a_transposed != a_transposed || first.b_transposed != b_transposed || first.n != n)
    fail("wgmma in line %d while other threads of the warpgroup are at another, or have other operands", site);
  const bool busy = std::any_of(me.accumulators.begin(), me.accumulators.end(), [&](const Accumulator& x) { return x.d == d; });
  if (!busy && !me.fenced) fail("wgmma without wgmma.fence after its accumulators were used otherwise");
  if (!busy) {
    me.accumulators.push_back(Accumulator{d, std::vector<float>(d, d + n / 2)});
    for (int i = 0; i < n / 2; i++) memcpy(&d[i], &POISON, 4);
  }
  me.products.push_back(product);
  block().progress++;
  const unsigned epoch = group.epoch;
  if (++group.arrived == GROUP) {
    check_operand(a, a_transposed, 64, product.number);
    check_operand(b, b_transposed, n, product.number);
    group.arrived = 0, group.epoch++;
    state().counters.flops += 2 * 64 * n * 16;
    products_issued++;
    s.event();
    return;
  }
  while (group.epoch == epoch) yield();
}

void wgmma_commit() {
  Lane& me = lane_state();
  me.commits++;
  for (Product& product : me.products)
    if (product.committed == 0) product.committed = me.commits;
}

void wgmma_wait(long pending, int site) {
  let_others_run();
  Lane& me = lane_state();
  while (!me.products.empty() && me.products.front().committed && me.products.front().committed <= me.commits - pending) {
    const Product product = me.products.front();
    me.products.erase(me.products.begin());
    size_t index = 0;
    while (me.accumulators[index].d != product.d) index++;
    finish_product(product, me.accumulators[index].value);
    me.known[fiber().index / 32] = product.number;
    if (std::none_of(me.products.begin(), me.products.end(), [&](const Product& other) { return other.d == product.d; })) free_accumulator(me, index);
  }
  wait_warp(site);  // .sync: for the whole warp
}

}  // namespace emu

extern "C" {
long emu_wgmmas() {  // since the last call
  const long count = emu::products_issued;
  emu::products_issued = 0;
  return count;
}
uint32_t emu_operand(uint64_t descriptor, int transposed, uint32_t mn, uint32_t k) { return emu::Descriptor(descriptor, transposed).at(mn, k); }
int emu_tensor_map(const void* base, uint64_t cols, uint64_t rows, uint64_t stride, uint32_t box_cols, uint32_t box_rows) {
  emu::TensorMap map;
  return emu::encode_tiled(&map, base, {cols, rows}, stride, {box_cols, box_rows});
}
}
