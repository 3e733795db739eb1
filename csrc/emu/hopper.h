// What Hopper adds, for the execution model: shared memory that loads by tensor map (TMA) fill and wgmma reads, both asynchronously, and the
// barriers in memory (mbarrier) between them. Facts after the PTX ISA, sections "mbarrier", "cp.async.bulk.tensor", "Asynchronous Warpgroup
// Level Matrix Instructions" (matrix descriptor format, canonical layouts), and the driver's text on cuTensorMapEncodeTiled.
//
//   loads      arrive as late as they can: when a thread waits for their barrier and nobody else can go on; in an order that the seed shuffles
//   products   are computed, and their operands read, when they are waited for, which again is when nobody else can go on
//   findings   an operand that no load has filled, or whose barrier a thread of the warpgroup has not waited for; a load onto what a product may
//              still read: by the order that barriers give, whatever happened first; accumulators touched before they are waited for (they
//              hold NaN meanwhile); no wgmma.fence before; barriers without their fence; more bytes or arrivals than a barrier expects
// This memory has addresses of its own and is not seen by the generic accesses of emu.h. Not modelled: clusters, stores by tensor map, boxes of
// other rows than 128 bytes, base offsets of descriptors, generic accesses between loads and products (the kernels here have none).
#pragma once
#include "emu.h"

#define __grid_constant__

namespace emu {

struct alignas(64) TensorMap {  // two dimensions of 2-byte elements, 128-byte swizzle, zeros beyond the limits
  const unsigned char* base;
  uint64_t size[2], stride;  // elements (the inner dimension first), bytes
  uint32_t box[2];
};
int encode_tiled(TensorMap* map, const void* base, const uint64_t (&size)[2], uint64_t stride, const uint32_t (&box)[2]);  // a CUresult

uint32_t async_memory();  // where the block's dynamic shared memory begins, for addresses as PTX takes them
void barrier_init(uint32_t at, uint32_t arrivals);
void barrier_fence();
void barrier_arrive(uint32_t at, uint32_t expected_bytes);
void barrier_wait(uint32_t at, uint32_t parity);
void load_tile(uint32_t to, const TensorMap& map, int32_t inner, int32_t outer, uint32_t barrier);

void wgmma_fence();
// d += A B: m64nNk16, both operands by descriptor, transposed: the other dimension than k is the dense one
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool a_transposed, bool b_transposed, int site);
void wgmma_commit();
void wgmma_wait(long pending, int site);

}  // namespace emu
