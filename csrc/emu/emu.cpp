// The run-time of the execution model in emu.h: fibers, barriers, checks, and the functions through which a test drives it.
#include "emu.h"

asm(".text\n"
    ".globl emu_switch\n"
    ".hidden emu_switch\n"
    "emu_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n"
    " mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
    " ret\n");

namespace emu {

State& state() {
  static State instance;
  return instance;
}

#if defined(__SANITIZE_ADDRESS__)
static void *main_fake, *main_bottom;
static size_t main_size;
#endif

void yield() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(b.current->done || state().failed ? nullptr : &fake, main_bottom, main_size);
#endif
  emu_switch(&b.current->sp, b.main_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fail(const char* format, ...) {
  char text[512], where[128];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof(text), format, list);
  va_end(list);
  State& s = state();
  Block& b = block();
  snprintf(where, sizeof(where), "block (%u,%u,%u) thread %d: ", b.bid.x, b.bid.y, b.bid.z, b.current ? b.current->index : -1);
  if (!s.failed) s.message = std::string(where) + text;
  s.failed = true;
  for (;;) yield();  // never resumed
}

static bool ordered(int other, unsigned other_block, unsigned other_warp) {
  Block& b = block();
  const int self = fiber().index;
  return other == self || other_block < b.epoch || (other / 32 == self / 32 && other_warp < b.warps[self / 32].epoch);
}

void check_shared(Shadow& s, bool write, long index, const char* name) {
  Block& b = block();
  const int self = fiber().index, own = self / 32;
  const unsigned warp_epoch = b.warps[own].epoch;
  if (s.pending) fail("%s of %s[%ld], which a cp.async has not filled yet", write ? "write" : "read", name, index);
  if (s.writer >= 0 && !ordered(s.writer, s.write_block, s.write_warp))
    fail("race: %s of %s[%ld] and a write by thread %d without a barrier between", write ? "write" : "read", name, index, s.writer);
  if (write) {
    if (s.reader != -1 && s.read_block == b.epoch) {
      const bool alone = s.reader == self;
      const bool warp_passed = s.reader != -3 && s.reader_warp == own && s.read_warp < warp_epoch;
      if (!alone && !warp_passed) fail("race: write of %s[%ld] and a read by another thread without a barrier between", name, index);
    }
    s.writer = self, s.write_block = b.epoch, s.write_warp = warp_epoch, s.filled = 1, s.reader = -1;
    return;
  }
  if (!s.filled) fail("read of %s[%ld], which nobody has written", name, index);
  const bool fresh = s.reader == -1 || s.read_block < b.epoch || (s.reader != -3 && s.reader_warp == own && s.read_warp < warp_epoch);
  if (fresh) s.reader = self;
  else if (s.reader != self) s.reader = s.reader != -3 && s.reader_warp == own ? -2 : -3;
  s.reader_warp = own, s.read_block = b.epoch, s.read_warp = warp_epoch;
}

void check_global(const void* address, size_t bytes, bool write, size_t alignment, bool coherent, bool again) {
  State& s = state();
  if (!again) (write ? s.counters.written : s.counters.read) += bytes;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at % alignment) fail("access of %zu bytes at an address that is not a multiple of %zu", bytes, alignment);
  if (s.buffers.empty()) return;
  static size_t last = 0;
  if (last >= s.buffers.size() || at < s.buffers[last].begin || at >= s.buffers[last].end) {
    for (last = 0; last < s.buffers.size(); last++)
      if (at >= s.buffers[last].begin && at < s.buffers[last].end) break;
    if (last == s.buffers.size()) fail("%s of %zu bytes outside every buffer", write ? "write" : "read", bytes);
  }
  Buffer& buffer = s.buffers[last];
  if (at + bytes > buffer.end) fail("%s of %zu bytes across the end of buffer %zu", write ? "write" : "read", bytes, last);
  if (write && !buffer.writable) fail("write to buffer %zu, an input", last);
  const uint32_t self = 1 + block().index * block().fibers.size() + fiber().index;
  for (size_t i = (at - buffer.begin) / 2; i < (at + bytes - buffer.begin + 1) / 2; i++) {
    if (s.together) check_order(buffer, last, i, write, coherent);
    else if (buffer.writer[i] && buffer.writer[i] != self)
      fail("%s at byte %zu of buffer %zu, which another thread wrote in this launch", write ? "write" : "read", 2 * i, last);
    if (write) buffer.writer[i] = self;
    const int bit = write ? 2 : 1;
    if (!(buffer.seen[i] & bit)) (write ? s.counters.distinct_written : s.counters.distinct_read) += 2, buffer.seen[i] |= bit;
  }
}

void wait_block(int site) {
  Block& b = block();
  if (b.arrived == 0) b.site = site;
  if (b.site != site) fail("barrier in line %d while others wait in line %d", site, b.site);
  if (b.live != static_cast<int>(b.fibers.size())) fail("barrier in line %d after %zu threads have left", site, b.fibers.size() - b.live);
  b.progress++;
  const unsigned epoch = b.epoch;
  if (++b.arrived == b.live) {
    b.arrived = 0;
    b.epoch++;
    if (state().together) pass_barrier();
    return;
  }
  while (b.epoch == epoch) yield();
}

void wait_warp(int site) {
  Block& b = block();
  Warp& w = warp();
  if (w.arrived == 0) w.site = site;
  if (w.site != site) fail("warp-wide call in line %d while other lanes are in line %d", site, w.site);
  if (w.live != 32) fail("warp-wide call in line %d after %d lanes have left", site, 32 - w.live);
  b.progress++;
  const unsigned epoch = w.epoch;
  if (++w.arrived == 32) {
    w.arrived = 0;
    w.epoch++;
    return;
  }
  while (w.epoch == epoch) yield();
}

void commit_copies() {
  Fiber& f = fiber();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void wait_copies(size_t pending) {
  Fiber& f = fiber();
  while (f.groups.size() > pending) {
    for (Copy& copy : f.groups.front()) copy.finish();
    f.groups.erase(f.groups.begin());
  }
}

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int site) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  uint32_t(*slot)[6] = publish(words, 6, site);
  const int group = lane() / 4, pair = lane() % 4;
  float left[2][16], right[2][16];
  for (int k = 0; k < 16; k++) {
    const int owner = (k % 8) / 2, shift = 16 * (k % 2), half = k / 8;
    for (int i = 0; i < 2; i++) {
      left[i][k] = widen(slot[group * 4 + owner][half * 2 + i] >> shift);
      right[i][k] = widen(slot[(pair * 2 + i) * 4 + owner][4 + half] >> shift);
    }
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++)
      for (int k = 0; k < 16; k++) d[i * 2 + j] += left[i][k] * right[j][k];
  if (lane() == 0) state().counters.flops += 2 * 16 * 8 * 16;
}

static void entry() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, const_cast<const void**>(&main_bottom), &main_size);
#endif
  (*b.body)();
  Fiber& f = *b.current;
  if (!f.open.empty() || !f.groups.empty()) fail("left with cp.async copies that it never waited for");
  if (b.extension) b.extension->leave();
  if (b.arrived) fail("left while %d threads wait at the barrier in line %d", b.arrived, b.site);
  if (warp().arrived) fail("left while %d lanes of its warp wait in line %d", warp().arrived, warp().site);
  f.done = true;
  b.progress++;
  b.live--;
  warp().live--;
  for (;;) yield();
}

static void resume(Block& b, Fiber& f) {
  state().block = &b;
  b.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fake, b.stacks + f.index * STACK, STACK);
#endif
  emu_switch(&b.main_sp, f.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
}

static void prepare(Block& b, dim3 threads, long index) {
  const int count = b.fibers.size();
  b.index = index;
  b.bid = dim3(index % b.gdim.x, index / b.gdim.x % b.gdim.y, index / (static_cast<long>(b.gdim.x) * b.gdim.y));
  b.live = count;
  b.arrived = 0;
  b.shared.clear();
  b.extension.reset();
  b.warps.assign((count + 31) / 32, Warp());
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(b.stacks, count * STACK);  // frames of fibers that ended or were dropped never returned
#endif
  for (int t = 0; t < count; t++) {
    Fiber& f = b.fibers[t];
    f.index = t, f.done = false, f.open.clear(), f.groups.clear();
    f.tid = dim3(t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y));
    b.warps[t / 32].live++;
    void** sp = reinterpret_cast<void**>(b.stacks + (t + 1) * STACK - 64);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void*>(&entry);
    f.sp = sp - 6;
  }
}

// Every block of `alive` to its end, in turns; a round in which nobody gets on is a deadlock.
static void run_blocks(std::vector<Block>& alive, std::mt19937& random) {
  State& s = state();
  std::vector<Block*> order;
  for (Block& b : alive) order.push_back(&b);
  std::vector<int> turns(alive[0].fibers.size());
  for (size_t i = 0; i < turns.size(); i++) turns[i] = i;
  for (long last = -1;;) {
    long progress = 0, live = 0;
    for (const Block& b : alive) progress += b.progress, live += b.live;
    if (live == 0 || s.failed) return;
    if (last == progress) {
      s.failed = true;
      const Block& b = alive[0];
      s.message = s.together ? "deadlock: " + waiting(*s.together)
                             : "deadlock: " + std::to_string(b.arrived) + " of " + std::to_string(b.live) + " threads wait at a barrier, the others elsewhere";
    }
    last = progress;
    if (s.seed) std::shuffle(order.begin(), order.end(), random);
    for (Block* b : order) {
      if (s.seed) std::shuffle(turns.begin(), turns.end(), random);
      for (int t : turns)
        if (!b->fibers[t].done && !s.failed) resume(*b, b->fibers[t]);
    }
  }
}

int run(dim3 grid, dim3 threads, size_t dynamic_bytes, const std::function<void()>& body, bool together) {
  State& s = state();
  const size_t count = static_cast<size_t>(threads.x) * threads.y * threads.z;
  const long blocks = static_cast<long>(grid.x) * grid.y * grid.z, at_once = together ? blocks : 1;
  if (blocks == 0 || count == 0 || count > 1024 || grid.y > 65535 || grid.z > 65535) return 9;  // cudaErrorInvalidConfiguration
  if (together && blocks > s.resident) return 720;                                               // cudaErrorCooperativeLaunchTooLarge
  s.failed = false;
  if (count * at_once > s.stack_count) {
    if (s.stacks) munmap(s.stacks, s.stack_count * STACK);
    s.stack_count = count * at_once;
    s.stacks = static_cast<char*>(mmap(nullptr, s.stack_count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  std::vector<Block> alive(at_once);
  for (long k = 0; k < at_once; k++) {
    Block& b = alive[k];
    b.gdim = grid, b.bdim = threads, b.body = &body, b.dynamic_bytes = dynamic_bytes, b.stacks = s.stacks + k * count * STACK;
    b.fibers.resize(count);
  }
  s.counters.launches++;
  for (Buffer& buffer : s.buffers) std::fill(buffer.writer.begin(), buffer.writer.end(), 0), std::fill(buffer.seen.begin(), buffer.seen.end(), 0);
  const std::unique_ptr<Together> shared = together ? start_together(blocks) : nullptr;
  s.together = shared.get();
  std::mt19937 random(s.seed);
  std::vector<long> order(blocks);
  for (long i = 0; i < blocks; i++) order[i] = i;
  if (s.seed) std::shuffle(order.begin(), order.end(), random);
  for (long begin = 0; begin < blocks && !s.failed; begin += at_once) {
    for (long k = 0; k < at_once; k++) prepare(alive[k], threads, order[begin + k]);
    run_blocks(alive, random);
  }
  s.block = nullptr, s.together = nullptr;
  return s.failed ? FAILED : 0;
}

}  // namespace emu

extern "C" {
const char* mswift_cuda_error(int) { return emu::state().message.c_str(); }
const char* emu_message() { return emu::state().message.c_str(); }
void emu_configure(unsigned seed, int fault) {
  emu::state().seed = seed;
  emu::state().fault = fault;
  emu::state().message.clear();
  emu::state().counters = {};
}
void emu_resident(int blocks) { emu::state().resident = blocks; }
void emu_forget() { emu::state().buffers.clear(); }
void emu_register(const void* address, size_t bytes, int writable) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  emu::state().buffers.push_back({at, at + bytes, writable != 0, std::vector<uint32_t>((bytes + 1) / 2), std::vector<unsigned char>((bytes + 1) / 2)});
}
void emu_counters(long* out) { memcpy(out, &emu::state().counters, sizeof(emu::Counters)); }
}
