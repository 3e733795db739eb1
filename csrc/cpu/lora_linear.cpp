// A frozen linear layer with a low-rank adapter: each tile of the output is the base product with the adapter's added in the same accumulators,
// and rounded once. The dropout mask (common/dropout.h) is drawn again wherever a tile of it is needed; neither it nor the dropped input is
// stored. Products are oneDNN's on panels of 64 columns, which are packed by the thread that uses them, so that nothing of the weight's size exists twice.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/dropout.h"
#include "common/isa.h"
#include "cpu/panels.h"
#include "cpu/tasks.h"
#include "cpu/vec.h"

namespace mswift {
namespace {

MSWIFT_TARGET_AVX2
namespace avx2 {
using namespace mswift::avx2;
#include "cpu/panels.inc"
#include "cpu/lora_linear.inc"
}  // namespace avx2
MSWIFT_TARGET_END
MSWIFT_TARGET_AVX512
namespace avx512 {
using namespace mswift::avx512;
#include "cpu/panels.inc"
#include "cpu/lora_linear.inc"
}  // namespace avx512
MSWIFT_TARGET_END

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
constexpr int64_t kTile = 64;      // tokens of a tile
constexpr int64_t kStretch = 512;  // of a sum that is done at a time where its operand has to be made first
constexpr int64_t kDepth = 1024;   // of any sum that is done at a time, with kRows tokens against kGroup panels
constexpr int64_t kRows = 256, kGroup = 2;

/// The functions of the .inc files for the processor at hand.
template <class T>
struct Parts {
  void (*transpose)(const uint32_t*, int64_t, int64_t, int64_t, uint32_t*);
  void (*interleave)(const T*, int64_t, int64_t, int64_t, int64_t, T*);
  void (*round)(const float*, int64_t, T*);
  void (*draw)(const uint32_t*, int64_t, uint32_t, uint32_t*);
  void (*keep)(const T*, int64_t, const uint8_t*, uint32_t, T*);
  void (*mask)(float*, int64_t, const uint8_t*, uint32_t, float);
  void (*finish)(float*, int64_t, const float*, const float*, T*, T*);
  void (*scale)(const float*, int64_t, int64_t, T*);
  void (*add_products)(const T*, const T*, int64_t, float*);

  /// Panel [depth / pair][64][pair] of 64 rows of src [.][depth], for products over `depth`.
  void across(const T* src, int64_t rows, int64_t depth, T* dst) const {
    constexpr int64_t pair = Product<T>::pair;
    transpose(reinterpret_cast<const uint32_t*>(src), depth / pair, std::min(rows, kPanel), depth / pair, reinterpret_cast<uint32_t*>(dst));
  }
  /// Panel of 64 columns of src [rows][ld], of which `columns` are there, for products over the rows.
  void down(const T* src, int64_t ld, int64_t rows, int64_t columns, T* dst) const {
    interleave(src, ld, rows, round_up(rows, Product<T>::pair), std::min(columns, kPanel), dst);
  }
};

#define MSWIFT_PARTS(level)                                                                                                                            \
  {&level::transpose_panel, &level::interleave_panel, &level::round_rows, &level::draw_row, &level::keep_row<T>, &level::mask_row,                     \
   &level::finish_row<T>, &level::scale_rows, &level::add_products<T>}
template <class T>
Parts<T> parts() {
  if (at_least(Isa::avx512)) return MSWIFT_PARTS(avx512);
  return MSWIFT_PARTS(avx2);
}

/// A dropout mask for the columns that are here.
class Mask {
 public:
  Mask(at::IntArrayRef given, int64_t columns) {
    TORCH_CHECK(given.size() == 5 && given[0] >= 0 && given[0] < 256, "dropout: wanted [threshold below 256, seed, first row, first column, full width]");
    threshold = static_cast<uint32_t>(given[0]), seed_ = static_cast<uint64_t>(given[1]), row_ = given[2];
    if (!threshold) return;
    factor = 256.f / static_cast<float>(256 - threshold);
    first_ = given[3], width_ = std::max<int64_t>(0, given[4] - given[3]);
    for (int64_t quad = first_ / 4; quad <= (first_ + columns) / 4; quad++) hashes_.push_back(mswift_column_hash(seed_, static_cast<uint32_t>(quad)));
  }

  uint32_t threshold = 0;
  float factor = 1.f;

  /// Draws for columns [from, from + n), one byte each; room holds n / 4 + 2 words. Columns beyond the full width have none.
  template <class T>
  const uint8_t* draws(const Parts<T>& part, int64_t row, int64_t from, int64_t n, uint32_t* room) const {
    const int64_t quad = (first_ + from) / 4 - first_ / 4, skip = (first_ + from) % 4;
    part.draw(hashes_.data() + quad, (skip + n + 3) / 4, mswift_row_term(seed_, static_cast<uint64_t>(row_ + row)), room);
    return reinterpret_cast<const uint8_t*>(room) + skip;
  }
  int64_t there(int64_t from, int64_t n) const { return std::clamp<int64_t>(width_ - from, 0, n); }

  /// Rows [row, row + rows) of columns [from, from + n) of x, zero where they are dropped.
  template <class T>
  void drop(const Parts<T>& part, const T* x, int64_t ld, int64_t row, int64_t rows, int64_t from, int64_t n, T* dst, int64_t dst_ld) const {
    uint32_t room[kStretch / 4 + 2];
    const int64_t live = there(from, n);
    for (int64_t r = 0; r < rows; r++) {
      T* out = dst + r * dst_ld;
      part.keep(x + (row + r) * ld + from, live, draws(part, row + r, from, n, room), threshold, out);
      std::fill(out + live, out + n, T(0));
    }
  }

  /// Rows of a tile [rows][64] at row `row` and column `from` in place, with the factor.
  template <class T>
  void apply(const Parts<T>& part, int64_t row, int64_t rows, int64_t from, int64_t n, float* z) const {
    uint32_t room[kPanel / 4 + 2];
    const int64_t live = there(from, n);
    for (int64_t r = 0; r < rows; r++, z += kPanel) {
      part.mask(z, live, draws(part, row + r, from, n, room), threshold, factor);
      std::fill(z + live, z + n, 0.f);
    }
  }

 private:
  uint64_t seed_ = 0;
  int64_t row_ = 0, first_ = 0, width_ = 0;
  std::vector<uint32_t> hashes_;
};

/// low [rows][rank] = scale dropout(x) b, with b packed by `pack(panel, dst)` over `depth`; `own(row, rank)`: whether it counts.
template <class T, class Pack, class Own>
void narrow(const Parts<T>& part, const T* x, int64_t rows, int64_t depth, int64_t rank, float scale, const Mask& mask, const Pack& pack, const Own& own,
            T* low) {
  const int64_t wide = round_up(rank, kPanel), length = round_up(depth, Product<T>::pair);
  std::vector<T> packed(wide * length);
  for (int64_t j = 0; j < rank; j += kPanel) pack(j, packed.data() + j * length);
  each<T>((rows + kTile - 1) / kTile, [&](int64_t i) {
    const int64_t from = i * kTile, height = std::min(kTile, rows - from);
    std::vector<float> z(kTile * wide);
    std::vector<T> kept(mask.threshold ? kTile * kStretch : 0);
    for (int64_t k = 0; k < depth; k += mask.threshold ? kStretch : depth) {
      const int64_t some = mask.threshold ? std::min(kStretch, depth - k) : depth;
      const T* a = x + from * depth;
      if (mask.threshold) {
        mask.drop(part, x, depth, from, height, k, some, kept.data(), kStretch);
        a = kept.data();
      }
      for (int64_t j = 0; j < rank; j += kPanel)
        Product<T>::run(height, std::min(kPanel, rank - j), some, mask.threshold ? kStretch : depth, kPanel, wide, k > 0, a,
                        packed.data() + j * length + k * kPanel, z.data() + j);
    }
    for (int64_t t = 0; t < height; t++) {
      float* row = z.data() + t * wide;
      for (int64_t j = 0; j < rank; j++) row[j] = own(from + t, j) ? row[j] * scale * mask.factor : 0.f;
      part.round(row, rank, low + (from + t) * rank);
    }
  });
}

/// Tiles of x [rows][depth] main + mask (low [rows][rank] up), both packed by panels of 64 of `n` columns, handed to `finish(row, column, width, z)`.
/// A thread packs kGroup panels and takes its rows past them in blocks; a long sum is done in stretches, whose operands stay in an L2 cache.
template <class T, class PackMain, class PackUp, class Finish>
void wide(const Parts<T>& part, const T* x, int64_t rows, int64_t depth, const T* low, int64_t rank, int64_t n, const Mask& mask, const PackMain& pack_main,
          const PackUp& pack_up, const Finish& finish) {
  const int64_t groups = (n + kGroup * kPanel - 1) / (kGroup * kPanel), tiles = (rows + kTile - 1) / kTile, threads = at::get_num_threads();
  const int64_t splits = std::min(tiles, threads == 1 ? 1 : (4 * threads + groups - 1) / groups);
  const int64_t length = round_up(depth, Product<T>::pair), lift = round_up(rank, Product<T>::pair), block = depth > kDepth ? kRows : kTile;
  run_tasks(groups * splits, [&](const auto& next) {
    std::vector<T> main(length * kGroup * kPanel), up(lift * kGroup * kPanel);
    std::vector<float> room(block * kGroup * kPanel);
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t column = task / splits * kGroup * kPanel, end_column = std::min(n, column + kGroup * kPanel), split = task % splits;
      const int64_t panels = (end_column - column + kPanel - 1) / kPanel, end = std::min(rows, (split + 1) * tiles / splits * kTile);
      for (int64_t p = 0; p < panels; p++) {
        pack_main(column + p * kPanel, main.data() + p * length * kPanel);
        pack_up(column + p * kPanel, up.data() + p * lift * kPanel);
      }
      const auto each_tile = [&](int64_t start, const auto& job) {  // job(first row, rows, panel, first column, columns, its sums)
        for (int64_t from = start; from < std::min(end, start + block); from += kTile)
          for (int64_t p = 0; p < panels; p++)
            job(from, std::min(kTile, end - from), p, column + p * kPanel, std::min(kPanel, n - column - p * kPanel),
                room.data() + (from - start) * kGroup * kPanel + p * kTile * kPanel);
      };
      for (int64_t start = split * tiles / splits * kTile; start < end; start += block) {
        each_tile(start, [&](int64_t from, int64_t height, int64_t p, int64_t c, int64_t width, float* z) {
          Product<T>::run(height, kPanel, rank, rank, kPanel, kPanel, false, low + from * rank, up.data() + p * lift * kPanel, z);
          if (mask.threshold) mask.apply(part, from, height, c, width, z);
          if (block == kTile) Product<T>::run(height, kPanel, depth, depth, kPanel, kPanel, true, x + from * depth, main.data() + p * length * kPanel, z);
        });
        for (int64_t k = 0; block > kTile && k < depth; k += kDepth)
          each_tile(start, [&](int64_t from, int64_t height, int64_t p, int64_t, int64_t, float* z) {
            Product<T>::run(height, kPanel, std::min(kDepth, depth - k), depth, kPanel, kPanel, true, x + from * depth + k,
                            main.data() + (p * length + k) * kPanel, z);
          });
        each_tile(start, [&](int64_t from, int64_t height, int64_t, int64_t c, int64_t width, float* z) {
          for (int64_t t = 0; t < height; t++) finish(from + t, c, width, z + t * kPanel);
        });
      }
    }
    Product<T>::release();
  });
}

/// z [rank][64] = low^T columns of a [rows][64], whose stretches `pack(from, count, dst)` makes; flipped: low^T [rank][rows rounded up].
template <class T, class Pack>
void outer(const T* flipped, int64_t rows, int64_t rank, const Pack& pack, T* room, float* z) {
  const int64_t padded = round_up(rows, Product<T>::pair);
  for (int64_t from = 0; from < rows; from += kStretch) {
    const int64_t count = std::min(kStretch, rows - from);
    pack(from, count, room);
    Product<T>::run(rank, kPanel, round_up(count, Product<T>::pair), padded, kPanel, kPanel, from > 0, flipped + from, room, z);
  }
}

template <class T>
std::vector<T> flip(const T* low, int64_t rows, int64_t rank) {
  const int64_t padded = round_up(rows, Product<T>::pair);
  std::vector<T> flipped(rank * padded, T(0));
  for (int64_t t = 0; t < rows; t++)
    for (int64_t j = 0; j < rank; j++) flipped[j * padded + t] = low[t * rank + j];
  return flipped;
}

// ---- operators ---------------------------------------------------------------------------------------------------------------------------

void check_factor(const OptionalTensor& factor, int64_t out) {
  TORCH_CHECK(!factor || (factor->scalar_type() == at::kFloat && factor->dim() == 1 && factor->size(0) == out), "factor: wanted float32 [", out, "]");
}

void check_factors(const Tensor& weight, const Tensor& a, const Tensor& b, const OptionalTensor& factor) {
  TORCH_CHECK(weight.dim() == 2, "weight: got ", weight.dim(), " dimensions, wanted [out, in]");
  TORCH_CHECK(a.dim() == 2 && a.size(0) >= 1 && a.size(1) == weight.size(1), "a: got ", a.sizes(), ", wanted [rank, ", weight.size(1), "]");
  TORCH_CHECK(b.dim() == 2 && b.size(0) == weight.size(0) && b.size(1) == a.size(0), "b: got ", b.sizes(), ", wanted [", weight.size(0), ", ", a.size(0), "]");
  TORCH_CHECK(a.scalar_type() == weight.scalar_type() && b.scalar_type() == weight.scalar_type(), "a, b: wanted the type of weight, ", weight.scalar_type());
  check_factor(factor, weight.size(0));
}

/// Sizes of bf16 operands have to be even: they are multiplied in pairs.
void check_rows(const Tensor& x, int64_t columns, const char* name, const Tensor& like, int64_t rank) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == columns, name, ": got ", x.sizes(), ", wanted [tokens, ", columns, "]");
  TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": got ", x.scalar_type(), ", wanted the type of the weights, ", like.scalar_type());
  const bool half = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK((x.scalar_type() == at::kFloat && at_least(Isa::avx2)) || (half && at_least(Isa::avx512_bf16)), name, ": got ", x.scalar_type(),
              ", which the CPU kernel does not take with ", name_of(isa()));
  TORCH_CHECK(!half || (columns % 2 == 0 && rank % 2 == 0), name, ": got odd sizes in bfloat16, ", columns, " columns and rank ", rank);
}

void check_ids(const OptionalTensor& ids, int64_t tokens, int64_t adapters, int64_t rank) {
  TORCH_CHECK(adapters >= 1 && rank % adapters == 0, "adapters: got ", adapters, ", wanted a divisor of the ranks together, ", rank);
  TORCH_CHECK(!ids || (ids->scalar_type() == at::kLong && ids->dim() == 1 && ids->size(0) == tokens), "ids: wanted int64 [", tokens, "]");
}

const float* floats(const OptionalTensor& given, Tensor& kept) {
  if (!given) return nullptr;
  kept = given->to(at::kFloat).contiguous();
  return kept.const_data_ptr<float>();
}

/// Whether a rank of the adapters belongs to a token.
struct Own {
  const int64_t* ids;
  int64_t each;
  bool operator()(int64_t token, int64_t rank) const { return !ids || ids[token] == rank / each; }
};

template <class T>
const T* read(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T>
T* write(const Tensor& x) { return static_cast<T*>(x.data_ptr()); }

/// `job(T())` for the type of a tensor.
template <class Job>
void by_type(const Tensor& x, const Job& job) {
  if (x.scalar_type() == at::kFloat)
    job(float());
  else
    job(uint16_t());
}

std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias, const Tensor& a_, const Tensor& b_,
                                               const OptionalTensor& factor, const OptionalTensor& ids_, int64_t adapters, double scale,
                                               at::IntArrayRef dropout) {
  check_factors(weight_, a_, b_, factor);
  check_rows(x_, weight_.size(1), "x", weight_, a_.size(0));
  check_ids(ids_, x_.size(0), adapters, a_.size(0));
  const int64_t rows = x_.size(0), in = weight_.size(1), out = weight_.size(0), rank = a_.size(0);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == out), "bias: wanted [", out, "]");
  const Tensor x = x_.contiguous(), weight = weight_.contiguous(), a = a_.contiguous(), b = b_.contiguous();
  Tensor kept_bias, kept_factor, ids = ids_ ? ids_->contiguous() : Tensor();
  const float *bias_row = floats(bias, kept_bias), *factors = floats(factor, kept_factor);
  const Mask mask(dropout, in), none({0, 0, 0, 0, 0}, 0);
  Tensor y = at::empty({rows, out}, x.options()), low = at::empty({rows, rank}, x.options());
  Tensor inner = at::empty({factors ? rows : 0, out}, x.options());
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Parts<T> part = parts<T>();
    const T *w = read<T>(weight), *down = read<T>(a), *up = read<T>(b);
    narrow(part, read<T>(x), rows, in, rank, static_cast<float>(scale), mask,
           [&](int64_t j, T* dst) { part.across(down + j * in, rank - j, in, dst); }, Own{ids_ ? ids.const_data_ptr<int64_t>() : nullptr, rank / adapters},
           write<T>(low));
    wide(part, read<T>(x), rows, in, read<T>(low), rank, out, none, [&](int64_t c, T* dst) { part.across(w + c * in, out - c, in, dst); },
         [&](int64_t c, T* dst) { part.across(up + c * rank, out - c, rank, dst); },
         [&](int64_t t, int64_t c, int64_t width, float* z) {
           part.finish(z, width, factors ? factors + c : nullptr, bias_row ? bias_row + c : nullptr, factors ? write<T>(inner) + t * out + c : nullptr,
                       write<T>(y) + t * out + c);
         });
  });
  return {y, low, inner};
}

std::tuple<Tensor, Tensor> lora_linear_grad_input(const Tensor& grad_, const Tensor& weight_, const Tensor& a_, const Tensor& b_, const OptionalTensor& factor,
                                                  const OptionalTensor& ids_, int64_t adapters, double scale, at::IntArrayRef dropout, bool wanted) {
  check_factors(weight_, a_, b_, factor);
  check_rows(grad_, weight_.size(0), "grad", weight_, a_.size(0));
  check_ids(ids_, grad_.size(0), adapters, a_.size(0));
  const int64_t rows = grad_.size(0), in = weight_.size(1), out = weight_.size(0), rank = a_.size(0);
  const Tensor grad = grad_.contiguous(), weight = weight_.contiguous(), a = a_.contiguous(), b = b_.contiguous();
  Tensor kept_factor, ids = ids_ ? ids_->contiguous() : Tensor();
  const float* factors = floats(factor, kept_factor);
  const Mask mask(dropout, in), none({0, 0, 0, 0, 0}, 0);
  Tensor grad_x = at::empty({wanted ? rows : 0, in}, grad.options()), grad_low = at::empty({rows, rank}, grad.options());
  by_type(grad, [&](auto zero) {
    using T = decltype(zero);
    const Parts<T> part = parts<T>();
    const T *w = read<T>(weight), *down = read<T>(a), *up = read<T>(b);
    // Rows of the weight and of b times the factor are what the gradient times it would be; panels of them are packed anyway.
    const auto pack = [&](const T* src, int64_t ld, int64_t columns, T* dst) {
      if (!factors) return part.down(src, ld, out, columns, dst);
      std::vector<T> some(kStretch * kPanel);
      for (int64_t from = 0; from < out; from += kStretch) {
        const int64_t count = std::min(kStretch, out - from), width = std::min(kPanel, columns);
        for (int64_t r = 0; r < count; r++) std::copy_n(src + (from + r) * ld, width, some.data() + r * width);
        part.scale(factors + from, count, width, some.data());
        part.down(some.data(), width, count, width, dst + from * kPanel);
      }
    };
    narrow(part, read<T>(grad), rows, out, rank, static_cast<float>(scale), none, [&](int64_t j, T* dst) { pack(up + j, rank, rank - j, dst); },
           Own{ids_ ? ids.const_data_ptr<int64_t>() : nullptr, rank / adapters}, write<T>(grad_low));
    if (!wanted) return;
    wide(part, read<T>(grad), rows, out, read<T>(grad_low), rank, in, mask, [&](int64_t c, T* dst) { pack(w + c, in, in - c, dst); },
         [&](int64_t c, T* dst) { part.down(down + c, in, rank, in - c, dst); },
         [&](int64_t t, int64_t c, int64_t width, float* z) { part.round(z, width, write<T>(grad_x) + t * in + c); });
  });
  return {grad_x, grad_low};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_grad_factors(const Tensor& grad_, const Tensor& x_, const Tensor& low_, const Tensor& grad_low_,
                                                            const OptionalTensor& factor, const Tensor& inner_, at::IntArrayRef dropout) {
  TORCH_CHECK(grad_.dim() == 2 && x_.dim() == 2 && grad_.size(0) == x_.size(0), "grad: wanted [tokens, out] with the tokens of x, ", x_.sizes());
  TORCH_CHECK(low_.dim() == 2, "low: got ", low_.dim(), " dimensions, wanted [tokens, rank]");
  const int64_t rows = x_.size(0), in = x_.size(1), out = grad_.size(1), rank = low_.size(1);
  check_rows(x_, in, "x", low_, rank);
  check_rows(grad_, out, "grad", low_, rank);
  TORCH_CHECK(low_.size(0) == rows && grad_low_.sizes() == low_.sizes(), "low, grad_low: wanted [", rows, ", rank] each");
  TORCH_CHECK(grad_low_.scalar_type() == low_.scalar_type(), "grad_low: got ", grad_low_.scalar_type(), ", wanted the type of low, ", low_.scalar_type());
  check_factor(factor, out);
  TORCH_CHECK(!factor || (inner_.sizes() == grad_.sizes() && inner_.scalar_type() == grad_.scalar_type()), "inner: wanted ", grad_.sizes(),
              " in the type of grad with a factor, got ", inner_.scalar_type(), " ", inner_.sizes());
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), low = low_.contiguous(), grad_low = grad_low_.contiguous(), inner = inner_.contiguous();
  Tensor kept_factor;
  const float* factors = floats(factor, kept_factor);
  const Mask mask(dropout, in);
  Tensor grad_a = at::zeros({rank, in}, x.options()), grad_b = at::zeros({out, rank}, x.options());
  Tensor grad_factor = at::zeros({factors ? out : 0}, x.options().dtype(at::kFloat));
  if (rows == 0) return {grad_a, grad_b, grad_factor};
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Parts<T> part = parts<T>();
    const std::vector<T> low_t = flip(read<T>(low), rows, rank), grad_low_t = flip(read<T>(grad_low), rows, rank);
    const int64_t panels_a = (in + kPanel - 1) / kPanel, panels_b = (out + kPanel - 1) / kPanel;
    run_tasks(panels_a + panels_b, [&](const auto& next) {
      std::vector<T> room(kStretch * kPanel), kept(mask.threshold ? kStretch * kPanel : 0);
      std::vector<float> z(rank * kPanel), turned(rank * kPanel);
      for (int64_t task = next(); task >= 0; task = next()) {
        if (task < panels_a) {
          const int64_t c = task * kPanel, width = std::min(kPanel, in - c);
          outer(grad_low_t.data(), rows, rank,
                [&](int64_t from, int64_t count, T* dst) {
                  if (!mask.threshold) return part.down(read<T>(x) + from * in + c, in, count, width, dst);
                  mask.drop(part, read<T>(x), in, from, count, c, width, kept.data(), kPanel);
                  part.down(kept.data(), kPanel, count, width, dst);
                },
                room.data(), z.data());
          for (float& value : z) value *= mask.factor;
          for (int64_t j = 0; j < rank; j++) part.round(z.data() + j * kPanel, width, write<T>(grad_a) + j * in + c);
          continue;
        }
        const int64_t c = (task - panels_a) * kPanel, width = std::min(kPanel, out - c);
        outer(low_t.data(), rows, rank,
              [&](int64_t from, int64_t count, T* dst) {
                part.down(read<T>(grad) + from * out + c, out, count, width, dst);
                for (int64_t t = from; factors && t < from + count; t++)
                  part.add_products(read<T>(grad) + t * out + c, read<T>(inner) + t * out + c, width, grad_factor.data_ptr<float>() + c);
              },
              room.data(), z.data());
        for (int64_t i = 0; i < width; i++)
          for (int64_t j = 0; j < rank; j++) turned[i * rank + j] = z[j * kPanel + i] * (factors ? factors[c + i] : 1.f);
        part.round(turned.data(), width * rank, write<T>(grad_b) + c * rank);
      }
      Product<T>::release();
    });
  });
  return {grad_a, grad_b, grad_factor};
}

Tensor lora_dropout(const Tensor& x_, at::IntArrayRef dropout) {
  TORCH_CHECK(x_.dim() == 2, "x: got ", x_.dim(), " dimensions, wanted [tokens, columns]");
  TORCH_CHECK((x_.scalar_type() == at::kFloat || x_.scalar_type() == at::kBFloat16) && at_least(Isa::avx2), "x: wanted float32 or bfloat16 and AVX2");
  const Tensor x = x_.contiguous();
  const int64_t rows = x.size(0), columns = x.size(1);
  const Mask mask(dropout, columns);
  Tensor y = at::empty_like(x);
  if (!mask.threshold) return y.copy_(x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Parts<T> part = parts<T>();
    const std::vector<float> factors(rows, mask.factor);
    at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t from = 0; from < columns; from += kStretch)
        mask.drop(part, read<T>(x), columns, begin, end - begin, from, std::min(kStretch, columns - from), write<T>(y) + begin * columns + from, columns);
      part.scale(factors.data(), end - begin, columns, write<T>(y) + begin * columns);
    });
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(mswift, CPU, m) {
  m.impl("lora_linear", &lora_linear);
  m.impl("lora_linear_grad_input", &lora_linear_grad_input);
  m.impl("lora_linear_grad_factors", &lora_linear_grad_factors);
  m.impl("lora_dropout", &lora_dropout);
}

}  // namespace mswift
