// The dropout mask as a function of (seed, row, column): drawn again wherever it is needed, never stored, the same on every device and
// for every split of the work. One hash serves four neighbouring columns, eight bits each; an element is kept if its byte is at least
// `threshold` = round(256 p), and is then multiplied by 256 / (256 - threshold). No header but this one defines it.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define MSWIFT_BOTH __host__ __device__ __forceinline__
#else
#define MSWIFT_BOTH inline
#endif

/// A bijection of 32 bits in which every input bit reaches every output bit.
MSWIFT_BOTH uint32_t mswift_mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352dU;
  h ^= h >> 15;
  h *= 0x846ca68bU;
  h ^= h >> 16;
  return h;
}

/// What four columns, and what a row, bring to a hash; kernels compute each of them once.
MSWIFT_BOTH uint32_t mswift_column_hash(uint64_t seed, uint32_t quad) { return mswift_mix((uint32_t)seed + quad * 0x9e3779b1U); }
MSWIFT_BOTH uint32_t mswift_row_term(uint64_t seed, uint64_t row) {
  return (uint32_t)row * 0x85ebca77U + (uint32_t)(row >> 32) * 0xc2b2ae3dU + (uint32_t)(seed >> 32);
}

/// Four draws of eight bits, for columns 4 * quad .. 4 * quad + 3 of a row; column c has the bits from 8 * (c % 4) on.
MSWIFT_BOTH uint32_t mswift_draws(uint64_t seed, uint64_t row, uint32_t quad) {
  return mswift_mix(mswift_column_hash(seed, quad) + mswift_row_term(seed, row));
}

MSWIFT_BOTH bool mswift_keep(uint64_t seed, uint64_t row, uint32_t column, uint32_t threshold) {
  return ((mswift_draws(seed, row, column / 4) >> (8 * (column % 4))) & 255) >= threshold;
}
