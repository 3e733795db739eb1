// One vector type a region: fp32 lanes with loads and stores of fp32 and bf16. A kernel is written once against `V` in an .inc file, which is
// included in namespace avx2 and in namespace avx512, each between its MSWIFT_TARGET_x and MSWIFT_TARGET_END (see common/isa.h).
// bf16 is passed as uint16_t.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/isa.h"

namespace mswift {

MSWIFT_TARGET_AVX2
namespace avx2 {

struct V {
  static constexpr int64_t width = 8;
  __m256 v;
};
static inline V load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline V load(const uint16_t* p) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))}; }
static inline void store(float* p, V a) { _mm256_storeu_ps(p, a.v); }
static inline __m256i bf16_bits(V a) {  // round to nearest even, in the low half of each lane; a NaN stays one
  const __m256i bits = _mm256_castps_si256(a.v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
static inline void store(uint16_t* p, V a) {
  const __m256i bits = bf16_bits(a);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
static inline V all(float x) { return {_mm256_set1_ps(x)}; }
static inline V add(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline V sub(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline V mul(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline V div(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }     // a b + c
static inline V fnma(V a, V b, V c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }   // c - a b
static inline V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }                 // b where one is NaN
static inline V min(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline V zero_below(V x, V limit, V value) { return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_LT_OQ), value.v)}; }
/// value where keys[i] == key, else 0
static inline V where_equal(const int32_t* keys, int32_t key, V value) {
  const __m256i same = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i*)keys), _mm256_set1_epi32(key));
  return {_mm256_and_ps(_mm256_castsi256_ps(same), value.v)};
}
static inline V round(V a) { return {_mm256_round_ps(a.v, 8)}; }
static inline V scale2(V p, V n) {  // p 2^n for whole n in [-126, 127]
  return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23)))};
}
static inline float sum(V a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline float largest(V a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

#include "cpu/vec_exp.inc"

}  // namespace avx2
MSWIFT_TARGET_END

MSWIFT_TARGET_AVX512
namespace avx512 {

struct V {
  static constexpr int64_t width = 16;
  __m512 v;
};
static inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline V load(const uint16_t* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))}; }
static inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
static inline __m512i bf16_bits(V a) {
  const __m512i bits = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}
static inline void store(uint16_t* p, V a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bf16_bits(a))); }
static inline V load(const int16_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)))}; }
static inline void store(int16_t* p, V a) {  // the nearest whole numbers, within the range
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
static inline V all(float x) { return {_mm512_set1_ps(x)}; }
static inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline V fnma(V a, V b, V c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
static inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline V zero_below(V x, V limit, V value) {
  return {_mm512_mask_mov_ps(value.v, _mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), _mm512_setzero_ps())};
}
static inline V where_equal(const int32_t* keys, int32_t key, V value) {
  return {_mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(key)), value.v)};
}
static inline V round(V a) { return {_mm512_roundscale_ps(a.v, 8)}; }
static inline V scale2(V p, V n) { return {_mm512_scalef_ps(p.v, n.v)}; }
static inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
static inline float largest(V a) { return _mm512_reduce_max_ps(a.v); }

#include "cpu/vec_exp.inc"

}  // namespace avx512
MSWIFT_TARGET_END

}  // namespace mswift
