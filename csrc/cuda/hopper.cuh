// Hopper's own instructions (sm_90a): loads by tensor map (TMA), barriers in shared memory that they complete (mbarrier), products of a whole
// warpgroup that read their operands there (wgmma). After the PTX ISA, sections "mbarrier", "cp.async.bulk.tensor" and "Asynchronous Warpgroup
// Level Matrix Instructions". Shared memory is spoken of by its 32-bit addresses; elsewhere than under nvcc ../emu/hopper.h stands for it all.
#pragma once
#include "device.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cudaTypedefs.h>
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "only for sm_90a"
#endif

using TensorMap = CUtensorMap;

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return cudaGetLastError(), 0;
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline bool is_hopper() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 && device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

// The driver's function, without linking against the driver; nullptr: it has none.
inline PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found) : nullptr;
}
inline int encode_tiled(TensorMap* map, const void* base, const uint64_t (&size)[2], uint64_t stride, const uint32_t (&box)[2]) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = encoder();
  const cuuint64_t dims[2] = {size[0], size[1]}, strides[1] = {stride};
  const cuuint32_t boxes[2] = {box[0], box[1]}, steps[2] = {1, 1};
  if (encode == nullptr) return CUDA_ERROR_NOT_FOUND;
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base), dims, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

__device__ __forceinline__ uint32_t async_memory() {
  extern __shared__ __align__(1024) unsigned char async_[];
  return shared_address(async_);
}
__device__ __forceinline__ void barrier_init(uint32_t at, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(at), "r"(arrivals) : "memory");
}
// What was initialised becomes visible to loads; a barrier of the block makes it visible to the other threads.
__device__ __forceinline__ void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(at) : "memory"); }
__device__ __forceinline__ void barrier_expect(uint32_t at, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t at, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra out;\nbra again;\nout:\n}\n" ::"r"(at),
      "r"(parity) : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap& map, int32_t inner, int32_t outer, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(to),
               "l"(&map), "r"(inner), "r"(outer), "r"(barrier) : "memory");
}

// The registers of an accumulator stay where they are across this line.
template <int NF> __device__ __forceinline__ void hold(float (&d)[NF][4]) {
#pragma unroll
  for (int j = 0; j < NF; j++) asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory"); }

// D (64 x 256, spread over the warpgroup: a warp's 16 rows as mma.sync keeps them) += A (64 x 16, K-major) B, whose dense dimension is k, or n
// if B_COLUMNS.
#define QUAD(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define QUADS(j) QUAD(j), QUAD(j + 1), QUAD(j + 2), QUAD(j + 3), QUAD(j + 4), QUAD(j + 5), QUAD(j + 6), QUAD(j + 7)
template <bool B_COLUMNS> __device__ __forceinline__ void wgmma(float (&d)[32][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
      ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, 1, 1, 1, 0, %130;\n"
      : QUADS(0), QUADS(8), QUADS(16), QUADS(24) : "l"(a), "l"(b), "n"(B_COLUMNS ? 1 : 0));
}
#undef QUADS
#undef QUAD

#else
#include "../emu/hopper.h"
using emu::TensorMap, emu::encode_tiled, emu::async_memory, emu::barrier_init, emu::barrier_fence, emu::barrier_wait, emu::load_tile;
using emu::wgmma_commit, emu::wgmma_fence;

inline int multiprocessors() { return 2; }  // fewer than a test has tiles
inline bool is_hopper() { return true; }
inline void barrier_arrive(uint32_t at) { emu::barrier_arrive(at, 0); }
inline void barrier_expect(uint32_t at, uint32_t bytes) { emu::barrier_arrive(at, bytes); }
template <int NF> inline void hold(float (&)[NF][4]) {}
template <int PENDING> inline void wgmma_wait() { emu::wgmma_wait(PENDING, __LINE__); }
template <bool B_COLUMNS> inline void wgmma(float (&d)[32][4], uint64_t a, uint64_t b) {
  emu::wgmma(&d[0][0], 256, a, b, false, B_COLUMNS, __LINE__);
}
#endif

constexpr int WARPGROUP = 128;

// A matrix in shared memory as a load with the 128-byte swizzle leaves it: rows of 128 bytes, its pattern repeating every 8 rows. Bits 0-13: the
// start, 16-29: from 64 elements of the dense dimension to the next 64 (not used if that is k), 32-45: from 8 rows to the next 8; all in
// 16 bytes; 49-51: 0, as patterns start at multiples of 1024; 62-63: 1, the swizzle of 128 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t start, uint32_t across) {
  const uint64_t swizzle = FAULT(43) ? 0 : 1;
  return swizzle << 62 | static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(across >> 4) << 16 | (start >> 4 & 0x3fff);
}

// Host: `rows` rows of `cols` bf16, `stride` elements apart, to be loaded in boxes of box_rows x 64; whether that can be.
inline bool tensor_map(TensorMap& map, const void* p, int64_t rows, int64_t cols, int64_t stride, int box_rows) {
  const uint64_t size[2] = {static_cast<uint64_t>(cols), static_cast<uint64_t>(rows)};
  const uint32_t box[2] = {64, static_cast<uint32_t>(box_rows)};
  return wide_rows<bf16>(p, stride) && encode_tiled(&map, p, size, static_cast<uint64_t>(stride) * 2, box) == 0;
}
