// What the two halves of the head's softmax share: linear_softmax.cpp (statistics and the input's gradient) and linear_softmax_weight.cpp (the
// weight's gradient). In an anonymous namespace, as each compiles its own.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "cpu/avx512.h"
#include "cpu/panels.h"
#include "cpu/vec.h"

namespace mswift {
namespace {

MSWIFT_TARGET_AVX2
namespace avx2 {
using namespace mswift::avx2;
#include "cpu/panels.inc"
#include "cpu/linear_softmax.inc"
}  // namespace avx2
MSWIFT_TARGET_END
MSWIFT_TARGET_AVX512
namespace avx512 {
using namespace mswift::avx512;
#include "cpu/panels.inc"
#include "cpu/linear_softmax.inc"
}  // namespace avx512
MSWIFT_TARGET_END
MSWIFT_TARGET_AVX512_BF16
namespace avx512_bf16 {
using namespace mswift::avx512;
static inline void put(uint16_t* to, V value) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(value.v)); }
/// Its distance from the reference in steps of 1 / 1024, from 48 below to 16 above it (beyond: e^-48, which is nothing): finer than what p is rounded to.
static inline void keep(int16_t* to, V, V distance) { store(to, fma(distance, all(1024.f), all(16384.f))); }
#include "cpu/linear_softmax.inc"

/// dst[c][r] = src[r][c], rows of dst 64 long; reads whole vectors of 32 columns.
static inline void turn(const int16_t* src, int64_t ld, int64_t rows, int64_t columns, int16_t* dst) {
  const __m512i pick = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4,
                                        2, 0);
  const __m512i next = _mm512_add_epi16(pick, _mm512_set1_epi16(1));
  for (int64_t r = 0; r < rows; r += 32) {
    const int64_t height = rows - r < 32 ? rows - r : 32;
    const __mmask32 mask = static_cast<__mmask32>((1ull << height) - 1);
    for (int64_t c = 0; c < columns; c += 32) {
      __m512i low[16], high[16];  // two columns of 16 rows each
      for (int64_t i = 0; i < 16; i++) {
        low[i] = _mm512_loadu_si512(src + (r + (i < height ? i : 0)) * ld + c);
        high[i] = _mm512_loadu_si512(src + (r + (16 + i < height ? 16 + i : 0)) * ld + c);
      }
      transpose16(low);
      transpose16(high);
      for (int64_t i = 0; i < 16 && c + 2 * i < columns; i++) {
        int16_t* to = dst + (c + 2 * i) * 64 + r;
        const __m512i even = _mm512_permutex2var_epi16(low[i], pick, high[i]), odd = _mm512_permutex2var_epi16(low[i], next, high[i]);
        if (height == 32) {
          _mm512_storeu_si512(to, even);
          if (c + 2 * i + 1 < columns) _mm512_storeu_si512(to + 64, odd);
        } else {
          _mm512_mask_storeu_epi16(to, mask, even);
          if (c + 2 * i + 1 < columns) _mm512_mask_storeu_epi16(to + 64, mask, odd);
        }
      }
    }
  }
}
}  // namespace avx512_bf16
MSWIFT_TARGET_END

using avx512_bf16::turn;
inline void turn(const float* src, int64_t ld, int64_t rows, int64_t columns, float* dst) {
  for (int64_t c = 0; c < columns; c++)
    for (int64_t r = 0; r < rows; r++) dst[c * 64 + r] = src[r * ld + c];
}

constexpr int64_t kBlock = 512;  // vocabulary rows that are packed at a time; also tokens at a time in the weight's gradient
constexpr int64_t kTile = 64;    // tokens (vocabulary rows in the weight's gradient) of a tile

/// The functions of linear_softmax.inc for the processor at hand; T: float, or uint16_t for bf16.
template <class T>
struct Parts {
  using Row = avx2::Row;
  using K = std::conditional_t<std::is_same_v<T, float>, float, int16_t>;  // a kept logit
  void (*softmax_row)(float*, int64_t, int64_t, const float*, float, float, int64_t, Row*, T*, T*, K*, float*, float*);
  float (*gradient_row)(float*, int64_t, float, float, float, const float*, const float*, const float*, const float*, const int32_t*, int32_t, T*);
  float (*plain_row)(const float*, int64_t, int64_t, float, float, const float*, const float*, const float*, const int32_t*, int32_t, T*);
  float (*kept_row)(const K*, int64_t, int64_t, float, float, const float*, const float*, const float*, const int32_t*, int32_t, T*);
  void (*rescale)(float*, float*, int64_t, float, float);
  void (*transpose)(const uint32_t*, int64_t, int64_t, int64_t, uint32_t*);
  void (*interleave)(const T*, int64_t, int64_t, int64_t, int64_t, T*);
  void (*round)(const float*, int64_t, uint16_t*);
};
static_assert(sizeof(avx2::Row) == sizeof(avx512::Row) && sizeof(avx2::Row) == sizeof(avx512_bf16::Row));

#define MSWIFT_ROWS(level)                                                                                                                 \
  reinterpret_cast<decltype(Parts<T>::softmax_row)>(&level::softmax_row<T, K>), &level::gradient_row<T>, &level::plain_row<float, T>, \
      &level::plain_row<K, T>
#define MSWIFT_REST(level) &level::rescale, &level::transpose_panel, &level::interleave_panel, &level::round_rows
template <class T>
Parts<T> parts() {
  using K = typename Parts<T>::K;
  if constexpr (std::is_same_v<T, uint16_t>)
    return {MSWIFT_ROWS(avx512_bf16), MSWIFT_REST(avx512)};  // and nothing less
  else if (at_least(Isa::avx512))
    return {MSWIFT_ROWS(avx512), MSWIFT_REST(avx512)};
  else
    return {MSWIFT_ROWS(avx2), MSWIFT_REST(avx2)};
}

/// As panels: all of src [rows][depth], 64 rows each, for products over `depth`; or its columns [from, from + 64), for products over the rows.
template <class T>
void pack_transposed(const Parts<T>& part, const T* src, int64_t rows, int64_t depth, T* dst) {
  part.transpose(reinterpret_cast<const uint32_t*>(src), depth / Product<T>::pair, std::min(rows, kPanel), depth / Product<T>::pair,
                 reinterpret_cast<uint32_t*>(dst));
}
template <class T>
void pack_panel(const Parts<T>& part, const T* src, int64_t ld, int64_t rows, int64_t padded, int64_t from, T* dst) {
  part.interleave(src + from, ld, rows, padded, std::min(kPanel, ld - from), dst);
}

struct Limits {
  int64_t valid;
  float scale, cap;
};

/// Of how many tokens the logits are kept, in whole panels: in the memory of the weight's gradient, and in all with `room` bytes besides.
struct KeptTokens {
  int64_t own, all;

  KeptTokens(const at::Tensor& hidden, const at::Tensor& weight, int64_t room) {
    const int64_t wanted = round_up(hidden.size(0), kPanel), panel = kPanel * weight.size(0) * hidden.element_size();
    own = std::min(wanted, hidden.size(1) / kPanel * kPanel);
    all = std::min(wanted, own + (panel ? room / panel * kPanel : 0));
  }
};

/// Logits that wait for the weight's gradient, of the first `tokens` (0: none).
template <class T>
struct Kept {
  using K = typename Parts<T>::K;
  static constexpr bool relative = !std::is_same_v<K, float>;
  static constexpr float step = relative ? 1.f / 1024.f : 1.f, origin = -16.f;
  int64_t tokens, own, width;
  K *logits, *more;   // in the gradient's memory those of tokens [0, own), the others beside it
  float* references;  // [blocks of 512 vocabulary rows][tokens]: what the block's kept logits are relative to

  /// Those of `height` (at most 64) vocabulary rows from `first` on and of the 64 tokens from `token` on: [height][64], in front of those of the next 64.
  K* at(int64_t first, int64_t height, int64_t token) const {
    return token < own ? logits + first * width + token * height : more + first * (tokens - own) + (token - own) * height;
  }
};

template <class T>
Kept<T> kept_in(const at::Tensor& kept, const at::Tensor& more, const at::Tensor& references) {
  using K = typename Kept<T>::K;
  return {references.size(1), references.size(1) - more.size(1), kept.size(1), static_cast<K*>(kept.data_ptr()), static_cast<K*>(more.data_ptr()),
          references.data_ptr<float>()};
}

inline void check(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& labels, int64_t valid) {
  TORCH_CHECK(hidden.dim() == 2, "hidden: got ", hidden.dim(), " dimensions, wanted [tokens, hidden size]");
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == hidden.size(1), "weight: got ", weight.sizes(), ", wanted [vocabulary, ", hidden.size(1), "]");
  TORCH_CHECK(weight.scalar_type() == hidden.scalar_type(), "weight: got ", weight.scalar_type(), ", wanted that of hidden, ", hidden.scalar_type());
  TORCH_CHECK(hidden.scalar_type() == at::kFloat || (hidden.scalar_type() == at::kBFloat16 && at_least(Isa::avx512_bf16)),
              "hidden: got ", hidden.scalar_type(), ", which the CPU kernel does not take with ", name_of(isa()));
  TORCH_CHECK(hidden.scalar_type() == at::kFloat || hidden.size(1) % 2 == 0, "hidden: got an odd size, ", hidden.size(1), ", in bfloat16");
  TORCH_CHECK(at_least(Isa::avx2), "hidden: this processor has no AVX2");
  TORCH_CHECK(labels.dim() == 1 && labels.size(0) == hidden.size(0) && labels.scalar_type() == at::kLong, "labels: wanted int64 [", hidden.size(0), "]");
  TORCH_CHECK(valid >= 0 && valid <= weight.size(0), "valid: got ", valid, ", wanted at most the rows of weight, ", weight.size(0));
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias: wanted [", weight.size(0), "]");
}

/// The bias in fp32, with room for whole vectors behind its end.
inline std::vector<float> padded_bias(const std::optional<at::Tensor>& bias) {
  if (!bias) return {};
  const at::Tensor wide = bias->to(at::kFloat).contiguous();
  std::vector<float> values(round_up(wide.size(0), kBlock) + kBlock, 0.f);
  std::copy_n(wide.const_data_ptr<float>(), wide.size(0), values.begin());
  return values;
}

}  // namespace
}  // namespace mswift
