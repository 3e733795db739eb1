// What a kernel may use: CUDA under nvcc, the execution model of ../emu elsewhere. Kernels include this and never touch CUDA directly.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

using Stream = cudaStream_t;
template <class T> using SharedPtr = T*;
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name, count)                  \
  extern __shared__ __align__(16) unsigned char dyn_[]; \
  T* name = reinterpret_cast<T*>(dyn_)
#define FAULT(n) false
#define CONSTANT_TABLE __constant__ const

template <class K, class... A> int launch(K kernel, dim3 grid, dim3 block, size_t dynamic_bytes, Stream stream, const A&... args) {
  if (dynamic_bytes > 32 * 1024) {  // with the static arrays this may pass 48 KiB, beyond which a kernel has to ask
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes));
    if (error != cudaSuccess) return cudaGetLastError(), static_cast<int>(error);
  }
  kernel<<<grid, block, dynamic_bytes, stream>>>(args...);
  return static_cast<int>(cudaGetLastError());
}

// A launch whose blocks all run at once, so that they may wait for each other; an error where the device cannot hold them.
template <class... P, class... A> int launch_together(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, Stream stream, const A&... args) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes));
  if (error == cudaSuccess) error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, dynamic_bytes, stream);
  const cudaError_t last = cudaGetLastError();
  return static_cast<int>(error == cudaSuccess ? last : error);
}
// How many blocks of it the current device holds at once
template <class... P> int blocks_at_once(void (*kernel)(P...), int threads, size_t dynamic_bytes) {
  int device = 0, processors = 0, each = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes)) != cudaSuccess ||
      cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, dynamic_bytes) != cudaSuccess)
    return cudaGetLastError(), 0;
  return processors * each;
}
inline int clear(void* p, size_t bytes, Stream stream) { return static_cast<int>(cudaMemsetAsync(p, 0, bytes, stream)); }

// Bytes of shared memory that one block may ask for on the current device
inline size_t shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return cudaGetLastError(), 0;
  return static_cast<size_t>(bytes);
}

#define sync_block() __syncthreads()
#define shuffle_xor(value, mask) __shfl_xor_sync(~0u, value, mask)
// Between blocks that run at once: one more has come; wait for so many. The barriers of the block before and after make it all threads' matter.
__device__ __forceinline__ void signal_blocks(uint32_t* counter) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}
__device__ __forceinline__ void await_blocks(const uint32_t* counter, uint32_t value) {
  uint32_t seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(seen) : "l"(__cvta_generic_to_global(counter)) : "memory");
  while (static_cast<int32_t>(seen - value) < 0);
  __threadfence();
}
#define fast_exp(x) __expf(x)
#define fast_divide(a, b) __fdividef(a, b)
template <class T> __device__ __forceinline__ T load(const T* p) { return __ldg(p); }
template <class T> __device__ __forceinline__ T load_again(const T* p) { return *p; }  // of memory that this kernel writes as well
template <class T> __device__ __forceinline__ void store(T* p, T value) { *p = value; }

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// 16 bytes from global to shared memory past the registers; bytes beyond `valid` become zero
template <class Chunk> __device__ __forceinline__ void copy_async(Chunk* tile, int index, const void* source, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(tile + index)), "l"(source), "r"(valid) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory"); }
template <bool TRANSPOSED, class Chunk> __device__ __forceinline__ void load_matrices(uint32_t (&r)[4], Chunk* tile, int index) {
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(tile + index)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(tile + index)) : "memory");
}
// D += A (16x16 bf16, rows) B (16x8 bf16, columns), fragments as the PTX manual lays them out
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }

#else
#include "../emu/emu.h"

using std::min;
using std::max;
using Stream = void*;
template <class T> using SharedPtr = emu::Shared<T>;
#define SHARED(T, name, count)   \
  static const char name##_key = 0; \
  const emu::Shared<T> name = emu::shared<T>(&name##_key, count, #name)
#define DYNAMIC_SHARED(T, name, count) \
  static const char name##_key = 0;    \
  const emu::Shared<T> name = emu::dynamic_shared<T>(&name##_key, count, #name)
#define FAULT(n) emu::fault(n)
#define CONSTANT_TABLE static const

template <class K, class... A> int launch(K kernel, dim3 grid, dim3 block, size_t dynamic_bytes, Stream, const A&... args) {
  return emu::run(grid, block, dynamic_bytes, [&] { kernel(args...); });
}

template <class K, class... A> int launch_together(K kernel, dim3 grid, dim3 block, size_t dynamic_bytes, Stream, const A&... args) {
  return emu::run(grid, block, dynamic_bytes, [&] { kernel(args...); }, true);
}
template <class K> int blocks_at_once(K, int, size_t) { return emu::state().resident; }
inline int clear(void* p, size_t bytes, Stream) { return emu::clear(p, bytes), 0; }

inline size_t shared_memory_limit() { return 227 * 1024; }  // as sm_90 and sm_100

#define sync_block() emu::wait_block(__LINE__)
#define shuffle_xor(value, mask) emu::exchange(value, emu::lane() ^ (mask), __LINE__)
inline void signal_blocks(uint32_t* counter) { emu::signal(counter); }
inline void await_blocks(const uint32_t* counter, uint32_t value) { emu::await(counter, value); }
#define fast_exp(x) expf(x)
#define fast_divide(a, b) ((a) / (b))
#define rsqrtf(x) (1.0f / sqrtf(x))
template <class T> inline T load(const T* p) { return emu::check_global(p, sizeof(T), false, alignof(T)), *p; }
template <class T> inline T load_again(const T* p) { return emu::check_global(p, sizeof(T), false, alignof(T), true), *p; }
template <class T> inline void store(T* p, T value) { emu::check_global(p, sizeof(T), true, alignof(T)), *p = value; }

template <class Chunk> inline void copy_async(const emu::Shared<Chunk>& tile, int index, const void* source, int valid) {
  emu::cp_async(tile, index, source, valid);
}
inline void copy_commit() { emu::commit_copies(); }
template <int PENDING> inline void copy_wait() { emu::wait_copies(PENDING); }
template <bool TRANSPOSED, class Chunk> inline void load_matrices(uint32_t (&r)[4], const emu::Shared<Chunk>& tile, int index) {
  emu::ldmatrix(r, tile, index, TRANSPOSED, __LINE__);
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emu::mma(d, a, b, __LINE__); }
inline float bits_to_float(uint32_t bits) {
  float value;
  return memcpy(&value, &bits, 4), value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  return memcpy(&bits, &value, 4), bits;
}
#endif

constexpr int WARP = 32;

// bf16 by its bits, so that no library's type shows in a signature; rounded to nearest, ties to even
struct bf16 {
  uint16_t bits;
};
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return narrow<bf16>(low).bits | static_cast<uint32_t>(narrow<bf16>(high).bits) << 16;
}

// 16 bytes: what a thread moves at once
struct alignas(16) Chunk {
  uint32_t word[4];
};
template <class T> struct Pack {
  static constexpr int SIZE = 16 / sizeof(T);
};
__device__ __forceinline__ bf16 half_of(const Chunk& chunk, int i) { return bf16{static_cast<uint16_t>(chunk.word[i / 2] >> (16 * (i % 2)))}; }
template <class T> __device__ __forceinline__ void unpack(float (&out)[Pack<T>::SIZE], const Chunk& chunk);
template <> __device__ __forceinline__ void unpack<float>(float (&out)[4], const Chunk& chunk) {
  for (int i = 0; i < 4; i++) out[i] = bits_to_float(chunk.word[i]);
}
template <> __device__ __forceinline__ void unpack<bf16>(float (&out)[8], const Chunk& chunk) {
  for (int i = 0; i < 8; i++) out[i] = widen(half_of(chunk, i));
}
template <class T> __device__ __forceinline__ Chunk packed(const float (&in)[Pack<T>::SIZE]);
template <> __device__ __forceinline__ Chunk packed<float>(const float (&in)[4]) {
  return Chunk{{float_to_bits(in[0]), float_to_bits(in[1]), float_to_bits(in[2]), float_to_bits(in[3])}};
}
template <> __device__ __forceinline__ Chunk packed<bf16>(const float (&in)[8]) {
  return Chunk{{pack(in[0], in[1]), pack(in[2], in[3]), pack(in[4], in[5]), pack(in[6], in[7])}};
}

#if defined(__CUDACC__)
template <> __device__ __forceinline__ bf16 load<bf16>(const bf16* p) { return bf16{__ldg(&p->bits)}; }
template <> __device__ __forceinline__ Chunk load<Chunk>(const Chunk* p) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return Chunk{{v.x, v.y, v.z, v.w}};
}
template <> __device__ __forceinline__ Chunk load_again<Chunk>(const Chunk* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return Chunk{{v.x, v.y, v.z, v.w}};
}
template <> __device__ __forceinline__ void store<Chunk>(Chunk* p, Chunk value) {
  *reinterpret_cast<uint4*>(p) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}
#endif

// The elements [at, at + Pack) of a row of `count`: in one access where the row allows it, else one by one with zeros beyond the end.
template <class T> __device__ __forceinline__ void load_pack(float (&out)[Pack<T>::SIZE], const T* row, int64_t at, int64_t count, bool wide) {
  if (wide && at + Pack<T>::SIZE <= count) {
    unpack<T>(out, load(reinterpret_cast<const Chunk*>(row + at)));
    return;
  }
#pragma unroll
  for (int i = 0; i < Pack<T>::SIZE; i++) out[i] = at + i < count ? widen(load(row + at + i)) : 0.0f;
}
template <class T> __device__ __forceinline__ void store_pack(const float (&in)[Pack<T>::SIZE], T* row, int64_t at, int64_t count, bool wide) {
  if (wide && at + Pack<T>::SIZE <= count) {
    store(reinterpret_cast<Chunk*>(row + at), packed<T>(in));
    return;
  }
#pragma unroll
  for (int i = 0; i < Pack<T>::SIZE; i++)
    if (at + i < count) store(row + at + i, narrow<T>(in[i]));
}

// Host: whether rows of `stride` elements of T from `p` on may be read in 16-byte pieces.
template <class T> inline bool wide_rows(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % Pack<T>::SIZE == 0;
}

template <int THREADS> __device__ __forceinline__ float block_sum(float value, SharedPtr<float> scratch) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) value += shuffle_xor(value, mask);
  const int tid = threadIdx.x;
  if (tid % WARP == 0) scratch[tid / WARP] = value;
  if (!FAULT(1)) sync_block();
  value = 0.0f;
#pragma unroll
  for (int w = 0; w < THREADS / WARP; w++) value += scratch[w];
  if (!FAULT(2)) sync_block();  // the scratch may be written again
  return value;
}
