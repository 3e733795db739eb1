// Products with a frozen weight of nf4 or int8 codes, dequantised strip by strip into a buffer that stays in the cache and never as a whole; an
// adapter in the same sums. bf16; see mswift/kernels/quantised_linear.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "cpu/grouped_tiles.h"
#include "cpu/tasks.h"

namespace mswift::quantised {
namespace {

using at::Tensor;
constexpr int64_t kStripRows = 128;     // rows of the weight that are dequantised at a time, as output columns of the forward product
constexpr int64_t kStripColumns = 64;   // its columns, as output columns of the gradient
constexpr int64_t kCached = 256 << 10;  // bytes of input rows at a time

// The quantiles of a normal distribution between -1 and 1 (QLoRA, appendix E).
alignas(64) constexpr float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                                        -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

struct Codes {
  const uint8_t* codes;
  const float* scales;
  int64_t rows, columns, block;  // block 0: int8, one scale a row; else nf4, two codes a byte, the first in the high half, one scale a block
};

MSWIFT_TARGET_AVX512_BF16

/// Columns [first, last) of one row, in steps of 16; `to` begins with the first of them.
static void dequantise(const Codes& w, int64_t row, int64_t first, int64_t last, uint16_t* to) {
  const __m512 table = _mm512_load_ps(kNf4);
  const __m512i halves = _mm512_set4_epi32(0, 4, 0, 4);
  for (int64_t c = first; c < last; c += 16) {
    const int64_t at = row * w.columns + c;
    __m512 value, scale;
    if (w.block) {
      const __m128i bytes = _mm_loadl_epi64((const __m128i*)(w.codes + at / 2));
      const __m512i codes = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes)), halves);
      value = _mm512_permutexvar_ps(codes, table);  // of an index the low four bits
      scale = _mm512_set1_ps(w.scales[at / w.block]);
    } else {
      value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(w.codes + at))));
      scale = _mm512_set1_ps(w.scales[row]);
    }
    _mm256_storeu_si256((__m256i*)(to + c - first), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(value, scale)));
  }
}

MSWIFT_TARGET_END

const uint16_t* bits(const Tensor& x) { return static_cast<const uint16_t*>(x.const_data_ptr()); }

void check_rows(const char* name, const Tensor& x, int64_t columns) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == columns, name, ": wanted [rows, ", columns, "], got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, name, ": wanted bfloat16, got ", x.scalar_type());
}

Codes checked(const Tensor& codes, const Tensor& scales, int64_t rows, int64_t columns, int64_t block) {
  TORCH_CHECK(at_least(Isa::avx512_bf16), "codes: this processor has no AVX512-BF16");
  TORCH_CHECK(rows > 0 && columns > 0 && columns % 16 == 0, "columns: wanted a multiple of 16, got ", rows, " x ", columns);
  TORCH_CHECK(block >= 0 && block % 16 == 0, "block: wanted 0 for int8 or a multiple of 16, got ", block);
  TORCH_CHECK(codes.is_contiguous() && codes.scalar_type() == (block ? at::kByte : at::kChar) && codes.numel() == rows * columns / (block ? 2 : 1),
              "codes: wanted ", block ? "uint8, two codes a byte, " : "int8 ", rows, " x ", columns, ", got ", codes.scalar_type(), " ", codes.sizes());
  TORCH_CHECK(scales.is_contiguous() && scales.scalar_type() == at::kFloat && scales.numel() == (block ? (rows * columns + block - 1) / block : rows),
              "scales: wanted float32, one ", block ? "a block" : "a row", ", got ", scales.scalar_type(), " ", scales.sizes());
  return {static_cast<const uint8_t*>(codes.const_data_ptr()), scales.const_data_ptr<float>(), rows, columns, block};
}

/// out = x W^T + low up^T + bias, or with `by_columns` x W + mask (low up), W [rows, columns].
struct Job {
  Codes w;
  Tensor x, low, up, bias, out;
  grouped::Mask mask;
  bool by_columns;

  void run() const {
    const int64_t step = by_columns ? kStripColumns : kStripRows, width = out.size(1);
    run_tasks((width + step - 1) / step, [&](const auto& next) {
      std::vector<uint16_t> strip(by_columns ? w.rows * kStripColumns : kStripRows * w.columns);
      for (int64_t i = next(); i >= 0; i = next()) one(i * step, std::min(width, (i + 1) * step), strip.data());
    });
  }

  void one(int64_t first, int64_t last, uint16_t* strip) const {
    if (by_columns)
      for (int64_t r = 0; r < w.rows; r++) dequantise(w, r, first, last, strip + r * kStripColumns);
    else
      for (int64_t r = first; r < last; r++) dequantise(w, r, 0, w.columns, strip + (r - first) * w.columns);
    const int64_t rows = x.size(0), depth = x.size(1), width = out.size(1), rank = low.defined() ? low.size(1) : 0;
    const int64_t block = std::clamp<int64_t>(kCached / (2 * depth), 24, 192);
    for (int64_t r = 0; r < rows; r += block) {
      const int64_t height = std::min(block, rows - r);
      const uint16_t* w_here = by_columns ? strip - first : strip - first * w.columns;  // where column or row 0 of the weight would be
      const grouped::Factors base{bits(x) + r * depth, depth, w_here, by_columns ? kStripColumns : w.columns, depth};
      const grouped::Factors adapter{rank ? bits(low) + r * rank : nullptr, rank, rank ? bits(up) : nullptr, rank ? up.size(1) : 0, rank};
      const float* biases = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
      const grouped::Output to{static_cast<uint16_t*>(out.data_ptr()) + r * width, width, biases, 1.f};
      grouped::Mask here = mask;
      here.first_row += r;
      if (by_columns)
        grouped::by_columns(base, adapter, here, to, height, first, last);
      else
        grouped::by_rows(base, adapter, to, height, first, last);
    }
  }
};

Tensor product(const Tensor& x, const Tensor& codes, const Tensor& scales, int64_t rows, int64_t columns, int64_t block, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& low, const std::optional<Tensor>& up, bool by_columns, at::IntArrayRef dropout) {
  const int64_t depth = by_columns ? rows : columns, width = by_columns ? columns : rows;
  Job job;
  job.w = checked(codes, scales, rows, columns, block);
  check_rows("x", x, depth);
  TORCH_CHECK(low.has_value() == up.has_value(), "up: wanted beside low");
  if (low) {
    check_rows("low", *low, by_columns ? up->size(0) : up->size(1));
    TORCH_CHECK(up->dim() == 2 && up->size(by_columns ? 1 : 0) == width && up->scalar_type() == at::kBFloat16, "up: wanted bfloat16 with ", width,
                by_columns ? " columns" : " rows", ", got ", up->sizes());
    TORCH_CHECK(low->size(0) == x.size(0), "low: wanted the rows of x, ", x.size(0), ", got ", low->size(0));
    job.low = low->contiguous();
    job.up = up->contiguous();
  }
  TORCH_CHECK(!bias || (!by_columns && bias->dim() == 1 && bias->size(0) == width), "bias: wanted [", width, "]");
  if (bias) job.bias = bias->to(at::kFloat).contiguous();
  TORCH_CHECK(dropout.size() == 5 && dropout[0] >= 0 && dropout[0] < 256, "dropout: wanted [threshold, seed, first row, first column, full width]");
  job.mask = {static_cast<uint64_t>(dropout[1]), dropout[2], static_cast<uint32_t>(dropout[3]), static_cast<uint32_t>(dropout[4]),
              static_cast<uint32_t>(dropout[0])};
  job.x = x.contiguous();
  job.out = at::empty({x.size(0), width}, x.options());
  job.by_columns = by_columns;
  job.run();
  return job.out;
}

}  // namespace
}  // namespace mswift::quantised

TORCH_LIBRARY_IMPL(mswift, CPU, m) { m.impl("quantised_product", mswift::quantised::product); }
