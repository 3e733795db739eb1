#include "cpu/grouped_tiles.h"

#include <immintrin.h>

#include "common/dropout.h"
#include "common/isa.h"

namespace mswift::grouped {

constexpr int kRows = 6;  // 6 x 4 sums in registers, with 4 vectors of the weight and one of x: 29 of 32

MSWIFT_TARGET_AVX512_BF16

static inline __mmask32 low_lanes(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }
static inline __m512bh load(const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }
static inline __m512bh load(const uint16_t* from, __mmask32 lanes) { return (__m512bh)_mm512_maskz_loadu_epi16(lanes, from); }

// ---- dropout ----

static inline __m512i mix(__m512i h) {  // mswift_mix
  h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
  h = _mm512_mullo_epi32(h, _mm512_set1_epi32(0x7feb352d));
  h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 15));
  h = _mm512_mullo_epi32(h, _mm512_set1_epi32(static_cast<int>(0x846ca68bU)));
  return _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
}

static inline __m512i column_hashes(const Mask& mask, uint32_t quad) {  // of the 64 columns from 4 quad on
  const __m512i quads = _mm512_add_epi32(_mm512_set1_epi32(quad), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i spread = _mm512_mullo_epi32(quads, _mm512_set1_epi32(static_cast<int>(0x9e3779b1U)));
  return mix(_mm512_add_epi32(spread, _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(mask.seed)))));
}

static inline uint64_t kept(const Mask& mask, __m512i hashes, int64_t row) {  // the bytes of 16 draws are those of 64 columns in order
  const uint64_t r = static_cast<uint64_t>(mask.first_row + row);
  const uint32_t of_row = static_cast<uint32_t>(r) * 0x85ebca77U + static_cast<uint32_t>(r >> 32) * 0xc2b2ae3dU + static_cast<uint32_t>(mask.seed >> 32);
  const __m512i draws = mix(_mm512_add_epi32(hashes, _mm512_set1_epi32(static_cast<int>(of_row))));
  return _mm512_cmpge_epu8_mask(draws, _mm512_set1_epi8(static_cast<char>(mask.threshold)));
}

/// Which of the 64 columns from `column` on are kept.
struct Keep {
  __m512i low, high;
  uint64_t real;
  int shift;
};

static inline Keep keep_from(const Mask& mask, int64_t column) {
  const uint32_t first = mask.first_column + static_cast<uint32_t>(column);
  const int64_t left = static_cast<int64_t>(mask.full_width) - first;
  const uint64_t real = left >= 64 ? ~0ull : left <= 0 ? 0ull : (1ull << left) - 1;
  return {column_hashes(mask, first / 4), column_hashes(mask, first / 4 + 16), real, static_cast<int>(first % 4)};
}

static inline uint64_t keep(const Mask& mask, const Keep& columns, int64_t row) {
  uint64_t bits = kept(mask, columns.low, row);
  if (columns.shift) bits = bits >> columns.shift | kept(mask, columns.high, row) << (64 - columns.shift);
  return bits & columns.real;
}

void masked_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, const Mask& mask, uint16_t* to) {
  for (int64_t c = 0; c < columns; c += 64) {
    const Keep kept_columns = keep_from(mask, c);
    const __mmask32 here = low_lanes(columns - c), there = low_lanes(columns - c - 32);
    for (int64_t r = 0; r < rows; r++) {
      const uint64_t bits = keep(mask, kept_columns, r);
      const uint16_t* source = from + r * stride + c;
      uint16_t* target = to + r * columns + c;
      _mm512_mask_storeu_epi16(target, here, _mm512_maskz_loadu_epi16(here & static_cast<__mmask32>(bits), source));
      if (there) _mm512_mask_storeu_epi16(target + 32, there, _mm512_maskz_loadu_epi16(there & static_cast<__mmask32>(bits >> 32), source + 32));
    }
  }
}

// ---- weights read by rows: both factors lie along the depth, so that lanes are summed at the end ----

template <int R, bool Whole>
static inline void step_by_rows(const Factors& f, const uint16_t* const w[4], int64_t k, __mmask32 lanes, __m512 (&sums)[R][4]) {
  __m512bh columns[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    columns[c] = Whole ? load(w[c] + k) : load(w[c] + k, lanes);
    if (Whole) __builtin_prefetch(w[c] + 4 * f.w_stride + k);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    const __m512bh row = Whole ? load(f.x + r * f.x_stride + k) : load(f.x + r * f.x_stride + k, lanes);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], row, columns[c]);
  }
}

template <int R>
static inline void add_by_rows(const Factors& f, const uint16_t* const w[4], __m512 (&sums)[R][4]) {
  int64_t k = 0;
  for (; k + 32 <= f.depth; k += 32) step_by_rows<R, true>(f, w, k, ~0u, sums);
  if (k < f.depth) step_by_rows<R, false>(f, w, k, low_lanes(f.depth - k), sums);
}

static inline __m128 sums_of_lanes(__m512 v, __m512 w, __m512 x, __m512 y) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v, w), _mm512_unpackhi_ps(v, w));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  const __m512d ad = _mm512_castps_pd(a), bd = _mm512_castps_pd(b);
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ad, bd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ad, bd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int R>
static void tile_by_rows(Factors base, Factors adapter, Output output, int64_t column, int64_t count) {
  const uint16_t *w[4], *up[4];
#pragma GCC unroll 6
  for (int c = 0; c < 4; c++) {
    const int64_t n = column + (c < count ? c : count - 1);
    w[c] = base.w + n * base.w_stride;
    up[c] = adapter.w + n * adapter.w_stride;
  }
  __m512 sums[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
  add_by_rows<R>(base, w, sums);
  if (adapter.depth) add_by_rows<R>(adapter, up, sums);
  const __mmask8 lanes = static_cast<__mmask8>((1 << count) - 1);
  const __m128 bias = output.bias ? _mm_maskz_loadu_ps(lanes, output.bias + column) : _mm_setzero_ps();
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    const __m128 value = _mm_fmadd_ps(sums_of_lanes(sums[r][0], sums[r][1], sums[r][2], sums[r][3]), _mm_set1_ps(output.alpha), bias);
    _mm_mask_storeu_epi16(output.to + r * output.stride + column, lanes, (__m128i)_mm_cvtneps_pbh(value));
  }
}

// ---- weights read by columns: two rows of the weight side by side, each output column in a lane of its own ----

/// P: pairs of vectors, 32 columns each. Lane 4 l + j of the first of a pair is column 8 l + j, of the second 8 l + 4 + j.
template <int R, int P, bool Whole, bool Pair>
static inline void step_by_columns(const Factors& f, const uint16_t* w, int64_t k, const __mmask32 (&lanes)[P], __m512 (&sums)[R][2 * P]) {
  __m512bh both[2 * P];
#pragma GCC unroll 2
  for (int p = 0; p < P; p++) {
    const uint16_t* at = w + k * f.w_stride + 32 * p;
    const __m512i even = Whole ? (__m512i)load(at) : (__m512i)load(at, lanes[p]);
    __m512i odd = _mm512_setzero_si512();
    if (Pair) odd = Whole ? (__m512i)load(at + f.w_stride) : (__m512i)load(at + f.w_stride, lanes[p]);
    both[2 * p] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
    both[2 * p + 1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    const uint16_t* x = f.x + r * f.x_stride + k;
    int32_t word = 0;
    __builtin_memcpy(&word, x, Pair ? 4 : 2);
    const __m512bh row = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 4
    for (int c = 0; c < 2 * P; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], row, both[c]);
  }
}

template <int R, int P, bool Whole>
static inline void add_by_columns(const Factors& f, int64_t column, const __mmask32 (&lanes)[P], __m512 (&sums)[R][2 * P]) {
  const uint16_t* w = f.w + column;
  int64_t k = 0;
  for (; k + 2 <= f.depth; k += 2) step_by_columns<R, P, Whole, true>(f, w, k, lanes, sums);
  if (k < f.depth) step_by_columns<R, P, Whole, false>(f, w, k, lanes, sums);
}

static inline void store_pair(uint16_t* to, __mmask32 lanes, __m512 first, __m512 second, float alpha) {
  const __m512 factor = _mm512_set1_ps(alpha);
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(second, factor), _mm512_mul_ps(first, factor));
  const __m512i ordered = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), rounded);
  _mm512_mask_storeu_epi16(to, lanes, ordered);
}

template <int R, int P, bool Whole>
static void tile_by_columns(Factors base, Factors adapter, const Mask& mask, Output output, int64_t row, int64_t column, int64_t last) {
  __mmask32 lanes[P];
#pragma GCC unroll 6
  for (int p = 0; p < P; p++) lanes[p] = low_lanes(last - column - 32 * p);
  __m512 sums[R][2 * P];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 6
    for (int c = 0; c < 2 * P; c++) sums[r][c] = _mm512_setzero_ps();
  if (adapter.depth) {
    add_by_columns<R, P, Whole>(adapter, column, lanes, sums);
    if (mask.threshold) {
      const Keep columns = keep_from(mask, column);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const uint64_t bits = keep(mask, columns, row + r);
#pragma GCC unroll 6
        for (int p = 0; p < P; p++) {
          const uint32_t here = static_cast<uint32_t>(bits >> (32 * p));
          sums[r][2 * p] = _mm512_maskz_mov_ps(static_cast<__mmask16>(_pext_u32(here, 0x0f0f0f0fu)), sums[r][2 * p]);
          sums[r][2 * p + 1] = _mm512_maskz_mov_ps(static_cast<__mmask16>(_pext_u32(here, 0xf0f0f0f0u)), sums[r][2 * p + 1]);
        }
      }
    }
  }
  add_by_columns<R, P, Whole>(base, column, lanes, sums);
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 6
    for (int p = 0; p < P; p++)
      store_pair(output.to + r * output.stride + column + 32 * p, lanes[p], sums[r][2 * p], sums[r][2 * p + 1], output.alpha);
}

MSWIFT_TARGET_END

// ---- blocks ----

/// The factors of the rows from `row` on.
static Factors from_row(Factors f, int64_t row) {
  f.x += row * f.x_stride;
  return f;
}

static Output from_row(Output output, int64_t row) {
  output.to += row * output.stride;
  return output;
}

#define MSWIFT_BY_HEIGHT(height, call)                                          \
  switch (height) {                                                             \
    case 1: { constexpr int R = 1; call; break; }                               \
    case 2: { constexpr int R = 2; call; break; }                               \
    case 3: { constexpr int R = 3; call; break; }                               \
    case 4: { constexpr int R = 4; call; break; }                               \
    case 5: { constexpr int R = 5; call; break; }                               \
    default: { constexpr int R = 6; call; break; }                              \
  }

void by_rows(const Factors& base, const Factors& adapter, const Output& output, int64_t rows, int64_t first, int64_t last) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t column = first; column < last; column += 4) {
    const int64_t count = last - column < 4 ? last - column : 4;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = t * rows / tiles, height = (t + 1) * rows / tiles - row;
      MSWIFT_BY_HEIGHT(height, tile_by_rows<R>(from_row(base, row), from_row(adapter, row), from_row(output, row), column, count))
    }
  }
}

void by_columns(const Factors& base, const Factors& adapter, const Mask& mask, const Output& output, int64_t rows, int64_t first, int64_t last) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t column = first; column < last; column += kColumns)
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = t * rows / tiles, height = (t + 1) * rows / tiles - row;
      const Factors b = from_row(base, row), a = from_row(adapter, row);
      const Output o = from_row(output, row);
      if (last - column >= kColumns)
        MSWIFT_BY_HEIGHT(height, (tile_by_columns<R, 2, true>(b, a, mask, o, row, column, last)))
      else if (last - column > kColumns / 2)
        MSWIFT_BY_HEIGHT(height, (tile_by_columns<R, 2, false>(b, a, mask, o, row, column, last)))
      else
        MSWIFT_BY_HEIGHT(height, (tile_by_columns<R, 1, false>(b, a, mask, o, row, column, last)))
    }
}

}  // namespace mswift::grouped
