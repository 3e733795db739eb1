#include "cpu/attention_tiles.h"

#include <immintrin.h>

#include "cpu/avx512.h"

namespace mswift::attention {

using bf16 = c10::BFloat16;

MSWIFT_TARGET_AVX512

static inline __mmask16 lanes(int begin, int end) {  // of 16 lanes those in [begin, end)
  const uint32_t from_begin = begin <= 0 ? 0xffffu : begin >= 16 ? 0u : 0xffffu << begin;
  const uint32_t to_end = end <= 0 ? 0u : end >= 16 ? 0xffffu : (1u << end) - 1;
  return static_cast<__mmask16>(from_begin & to_end);
}

static inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
static inline void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
static inline void store_masked(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }
static inline __m512 load_masked(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

void rescale_rows(float* output, const float* rescale, int columns) {
  for (int r = 0; r < kTile; r++) {
    if (rescale[r] == 1.0f) continue;
    const __m512 factor = _mm512_set1_ps(rescale[r]);
    for (int c = 0; c < columns; c += 16) _mm512_storeu_ps(output + r * columns + c, _mm512_mul_ps(factor, _mm512_loadu_ps(output + r * columns + c)));
  }
}

// 32-bit words: to[c][r] = from[r][c]; zero beyond `rows`. `to` has kTile columns.
static void transpose_words(const uint32_t* from, int64_t stride, int rows, int columns, uint32_t* to) {
  for (int r = 0; r < kTile; r += 16)
    for (int c = 0; c < columns; c += 16) {
      const __mmask16 inside = lanes(0, columns - c);
      __m512i v[16];
      for (int i = 0; i < 16; i++) v[i] = r + i < rows ? _mm512_maskz_loadu_epi32(inside, from + (r + i) * stride + c) : _mm512_setzero_si512();
      transpose16(v);
      for (int i = 0; i < 16 && c + i < columns; i++) _mm512_storeu_si512(to + (c + i) * kTile + r, v[i]);
    }
}

static inline const uint32_t* words(const void* from) { return static_cast<const uint32_t*>(from); }

void pack_right_transposed(const float* from, int64_t stride, int rows, int columns, float* to) {
  transpose_words(words(from), stride, rows, columns, reinterpret_cast<uint32_t*>(to));
}

void pack_right_transposed(const bf16* from, int64_t stride, int rows, int columns, bf16* to) {  // pairs along a row stay together
  transpose_words(words(from), stride / 2, rows, columns / 2, reinterpret_cast<uint32_t*>(to));
}

void pack_left_transposed(const float* from, int64_t stride, int rows, int columns, float* to) {
  pack_right_transposed(from, stride, rows, columns, to);
}

static inline __m512i halves(const uint16_t* from, int64_t stride, int r, int c, int rows) {  // 16 values of row r, each in a word of its own
  if (r >= rows) return _mm512_setzero_si512();
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + r * stride + c)));
}

void pack_left_transposed(const bf16* from, int64_t stride, int rows, int columns, bf16* to) {
  const auto* source = reinterpret_cast<const uint16_t*>(from);
  auto* target = reinterpret_cast<uint16_t*>(to);
  for (int c = 0; c < columns; c += 16)
    for (int r = 0; r < kTile; r += 16) {
      __m512i v[16];
      for (int i = 0; i < 16; i++)
        v[i] = halves(source, stride, r + i, c, rows);
      transpose16(v);
      for (int i = 0; i < 16; i++)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + (c + i) * kTile + r), _mm512_cvtepi32_epi16(v[i]));
    }
}

void pack_right(const float* from, int64_t stride, int rows, int columns, float* to) {
  for (int r = 0; r < kTile; r++)
    for (int c = 0; c < columns; c += 16) store(to + r * columns + c, r < rows ? load(from + r * stride + c) : _mm512_setzero_ps());
}

void pack_right(const bf16* from, int64_t stride, int rows, int columns, bf16* to) {  // rows 2i and 2i + 1 side by side, value by value
  const auto* source = reinterpret_cast<const uint16_t*>(from);
  auto* target = reinterpret_cast<uint32_t*>(to);
  for (int r = 0; r < kTile; r += 2)
    for (int c = 0; c < columns; c += 16)
      _mm512_storeu_si512(target + r / 2 * columns + c, _mm512_or_si512(halves(source, stride, r, c, rows), _mm512_slli_epi32(halves(source, stride, r + 1, c, rows), 16)));
}

static inline void store_right(float*, int, int, __m512, __m512) {}  // plain d scores are the right factor in fp32

#define MSWIFT_VALUE float
#include "cpu/attention_values.h"
#undef MSWIFT_VALUE

MSWIFT_TARGET_END
MSWIFT_TARGET_AVX512_BF16

static inline __m512 load(const bf16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}
static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline void store(bf16* to, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x)); }
static inline void store_masked(bf16* to, __mmask16 mask, __m512 x) { _mm256_mask_storeu_epi16(to, mask, narrow(x)); }

static inline void store_right(bf16* to, int r, int c, __m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32(narrow(even)), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(odd)), 16);
  _mm512_storeu_si512(reinterpret_cast<uint32_t*>(to) + r / 2 * kTile + c, _mm512_or_si512(low, high));
}

#define MSWIFT_VALUE bf16
#include "cpu/attention_values.h"
#undef MSWIFT_VALUE

MSWIFT_TARGET_END

}  // namespace mswift::attention
