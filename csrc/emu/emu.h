// The CUDA execution model on the CPU, for tests of correctness: every thread of a block is a fiber, run until it waits.
//
// A kernel that includes ../cuda/device.cuh without nvcc is compiled against this. What is checked while it runs:
//   barriers   every thread of a block passes the same barriers in the same order; nobody leaves while others still wait
//   warps      shuffles, ldmatrix and mma find all 32 lanes alive and at the same call
//   shared     bounds; reads of what was never written or is still in flight (cp.async); two accesses, one of them a write, that no barrier
//              orders (whatever the order in which the fibers happened to run)
//   global     (buffers that the test registered) bounds, alignment, writes to inputs, one element written by two threads,
//              reads of what another thread wrote in the same launch; in a launch whose blocks wait for each other (together.cpp),
//              accesses by two threads, one of them a write, that no barrier and no counter orders
// A finding ends the launch; its text is in emu_message(). Threads and blocks run in an order that the seed shuffles.
// What is not modelled: time, the order of memory operations within a barrier interval beyond the above, hardware's rounding inside mma.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emu {

#if !defined(__x86_64__)
#error "emu: the switch between fibers is written for x86-64"
#endif
extern "C" void emu_switch(void** save, void* load);

constexpr size_t STACK = 128 << 10;
constexpr int FAILED = 9999;  // error code of a launch that a check ended

struct Warp {
  int arrived = 0, live = 0, site = 0;
  unsigned epoch = 0;
  uint32_t slot[2][32][6];
};

struct Copy {
  std::function<void()> finish;
};

struct Fiber {
  void* sp = nullptr;
  dim3 tid;
  int index = 0;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed cp.async groups, oldest first
  std::vector<Copy> open;                 // issued, not committed
};

struct SharedArray {
  std::vector<unsigned char> shadow;
  unsigned char* bytes = nullptr;
  ~SharedArray() { free(bytes); }
};

struct Extension {  // what hopper.h keeps for a block
  virtual void leave() = 0;  // a thread ends
  virtual ~Extension() = default;
};

struct Block {
  dim3 bid, bdim, gdim;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int arrived = 0, live = 0, site = 0;
  unsigned epoch = 0;
  long progress = 0, index = 0;
  size_t dynamic_bytes = 0;
  char* stacks = nullptr;
  void* main_sp = nullptr;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::map<const void*, std::unique_ptr<SharedArray>> shared;
  std::unique_ptr<Extension> extension;
};

struct Buffer {  // global memory that a test told of
  uintptr_t begin, end;
  bool writable;
  std::vector<uint32_t> writer;     // per 2 bytes: 1 + thread that wrote it in this launch
  std::vector<unsigned char> seen;  // per 2 bytes: 1 read, 2 written in this launch
  // of blocks that run together, per 2 bytes: when it was written; the thread that read it last; when each block read it last (0: not since)
  std::vector<uint32_t> written_at, reader, read_at;
};

struct Together {  // what blocks of one launch know of each other's accesses: together.cpp
  std::vector<std::vector<unsigned>> known, coming;  // [block][other]: barriers of the other before which all is known; from the next barrier on
  std::map<const void*, std::vector<unsigned>> released;
  std::vector<std::string> awaited;  // what a block waits for, if it does
};

struct Counters {
  long read, written, distinct_read, distinct_written, flops, launches;
};

struct State {
  Block* block = nullptr;
  char* stacks = nullptr;
  size_t stack_count = 0;
  std::vector<Buffer> buffers;
  Counters counters{};
  std::string message;
  unsigned seed = 0;
  int fault = 0;
  bool failed = false;
  Together* together = nullptr;
  int resident = 12;  // how many blocks run at once
};
State& state();

inline Block& block() { return *state().block; }
inline Fiber& fiber() { return *block().current; }
inline Warp& warp() { return block().warps[fiber().index / 32]; }
inline int lane() { return fiber().index % 32; }
void yield();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
int run(dim3 grid, dim3 threads, size_t dynamic_bytes, const std::function<void()>& body, bool together = false);
void wait_block(int site);
void wait_warp(int site);
void commit_copies();
void wait_copies(size_t pending);
// coherent: it sees what other blocks wrote. `again`: the end of an access that has been counted
void check_global(const void* address, size_t bytes, bool write, size_t alignment, bool coherent = false, bool again = false);

// --- together.cpp
std::unique_ptr<Together> start_together(long blocks);
void check_order(Buffer& buffer, size_t number, size_t element, bool write, bool coherent);
void pass_barrier();
std::string waiting(const Together& together);
void signal(uint32_t* counter);
void await(const uint32_t* counter, uint32_t value);
void clear(void* address, size_t bytes);

inline bool fault(int n) { return state().fault == n; }

// --- shared memory: each element has a shadow of who wrote and who read it last, and in which interval between barriers
struct Shadow {
  int16_t writer, reader;  // thread, or for readers: -1 none, -2 several of one warp, -3 several warps
  int16_t reader_warp;
  uint8_t filled, pending;
  unsigned write_block, write_warp, read_block, read_warp;
};

void check_shared(Shadow& shadow, bool write, long index, const char* name);

template <class T> struct Shared {
  T* data;
  Shadow* shadow;
  long size;
  const char* name;

  struct Ref {
    const Shared& of;
    long index;
    operator T() const {
      of.check(index, false);
      return of.data[index];
    }
    const Ref& operator=(const T& value) const {
      of.check(index, true);
      of.data[index] = value;
      return *this;
    }
    const Ref& operator=(const Ref& other) const { return *this = static_cast<T>(other); }
    const Ref& operator+=(const T& value) const { return *this = static_cast<T>(*this) + value; }
  };

  void check(long index, bool write) const {
    if (index < 0 || index >= size) fail("index %ld of shared array %s[%ld]", index, name, size);
    check_shared(shadow[index], write, index, name);
  }
  Ref operator[](long index) const { return Ref{*this, index}; }
  Shared operator+(long offset) const { return Shared{data + offset, shadow + offset, size - offset, name}; }
};

template <class T> Shared<T> shared(const void* key, long count, const char* name) {
  auto& entry = block().shared[key];
  if (!entry) {
    entry = std::make_unique<SharedArray>();
    entry->bytes = static_cast<unsigned char*>(malloc(count * sizeof(T)));
    memset(entry->bytes, 0xff, count * sizeof(T));  // NaN for every float type
    entry->shadow.resize(count * sizeof(Shadow));
    for (long i = 0; i < count; i++) {
      const Shadow fresh{-1, -1, -1, 0, 0, 0, 0, 0, 0};
      memcpy(&entry->shadow[i * sizeof(Shadow)], &fresh, sizeof(Shadow));
    }
  }
  return Shared<T>{reinterpret_cast<T*>(entry->bytes), reinterpret_cast<Shadow*>(entry->shadow.data()), count, name};
}

template <class T> Shared<T> dynamic_shared(const void* key, long count, const char* name) {
  if (count * sizeof(T) > block().dynamic_bytes)
    fail("%s wants %zu bytes of dynamic shared memory, the launch gave %zu", name, count * sizeof(T), block().dynamic_bytes);
  return shared<T>(key, count, name);
}

// --- what lanes of a warp exchange: up to six words a lane, published, then readable by all until the exchange after the next
inline uint32_t (*publish(const uint32_t* words, int count, int site))[6] {
  Warp& w = warp();
  uint32_t(*slot)[6] = w.slot[w.epoch & 1];
  for (int i = 0; i < count; i++) slot[lane()][i] = words[i];
  wait_warp(site);
  return slot;
}

template <class T> T exchange(T value, int source, int site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves one or two words");
  uint32_t words[2] = {0, 0};
  memcpy(words, &value, sizeof(T));
  uint32_t(*slot)[6] = publish(words, 2, site);
  T result;
  memcpy(&result, slot[source & 31], sizeof(T));
  return result;
}

inline float widen(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int site);

template <class Chunk> void ldmatrix(uint32_t (&r)[4], const Shared<Chunk>& tile, int index, bool transposed, int site) {
  const uint32_t word = index;
  uint32_t(*slot)[6] = publish(&word, 1, site);
  const int row = lane() / 4, pair = lane() % 4;
  for (int j = 0; j < 4; j++) {
    uint16_t lo[8], hi[8];
    const Chunk first = tile[slot[j * 8 + (transposed ? 2 * pair : row)][0]];
    memcpy(lo, &first, 16);
    if (transposed) {
      const Chunk second = tile[slot[j * 8 + 2 * pair + 1][0]];
      memcpy(hi, &second, 16);
      r[j] = lo[row] | static_cast<uint32_t>(hi[row]) << 16;
    } else {
      r[j] = lo[2 * pair] | static_cast<uint32_t>(lo[2 * pair + 1]) << 16;
    }
  }
}

// The bytes arrive when the thread waits for them, not before: until then the element is in flight.
template <class Chunk> void cp_async(const Shared<Chunk>& tile, long index, const void* source, int valid) {
  if (valid < 0 || valid > 16) fail("cp.async of %d valid bytes", valid);
  if (valid) check_global(source, valid, false, 16, true);
  tile.check(index, true);
  tile.shadow[index].pending = 1;
  fiber().open.push_back(Copy{[=] {
    if (valid && state().together) check_global(source, valid, false, 16, true, true);
    tile.shadow[index].pending = 0;
    tile.check(index, true);
    Chunk chunk;
    memset(&chunk, 0, sizeof(chunk));
    if (valid) memcpy(&chunk, source, valid);
    tile.data[index] = chunk;
  }});
}

}  // namespace emu

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emu::fiber().tid)
#define blockIdx (emu::block().bid)
#define blockDim (emu::block().bdim)
#define gridDim (emu::block().gdim)
