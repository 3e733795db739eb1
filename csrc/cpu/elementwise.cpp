// What stands between the products of a transformer block, each in one pass: norms, gated activations, rotary positions.
#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/isa.h"
#include "cpu/vec.h"

namespace mswift::elementwise {

using at::Tensor;

/// gate(a, b) = a * sigmoid(slope * a * (1 + cubic * a^2)) * (b + offset), a at most `limit`, b within +-limit: silu, gpt-oss's gate (slope 1.702)
/// and gelu by tanh (slope 2 * sqrt(2 / pi), cubic 0.044715).
struct Gate {
  float slope, cubic, limit, offset;
  bool is_silu;  // silu without limit and offset: shorter
};

#define MSWIFT_SCALARS                                                                                                \
  static inline float from_bits(uint32_t bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }                 \
  static inline uint32_t to_bits(float x) { uint32_t bits; __builtin_memcpy(&bits, &x, 4); return bits; }             \
  static inline float wide(float x) { return x; }                                                                     \
  static inline float wide(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }                          \
  static inline void put(float* to, float x) { *to = x; }                                                             \
  static inline void put(uint16_t* to, float x) { /* to nearest, ties to even; not a number stays that */             \
    const uint32_t bits = to_bits(x);                                                                                 \
    *to = static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                     \
  }                                                                                                                   \
  static inline void put(float* to, V x) { store(to, x); }

MSWIFT_TARGET_AVX2
namespace avx2 {
using namespace mswift::avx2;
MSWIFT_SCALARS
static inline void put(uint16_t* to, V x) { store(to, x); }
#include "cpu/rows.inc"
}  // namespace avx2
MSWIFT_TARGET_END

MSWIFT_TARGET_AVX512
namespace avx512 {
using namespace mswift::avx512;
MSWIFT_SCALARS
static inline void put(uint16_t* to, V x) { store(to, x); }
#include "cpu/rows.inc"
}  // namespace avx512
MSWIFT_TARGET_END

MSWIFT_TARGET_AVX512_BF16
namespace avx512_bf16 {  // one instruction rounds 16 values
using namespace mswift::avx512;
MSWIFT_SCALARS
static inline void put(uint16_t* to, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x.v)); }
#include "cpu/rows.inc"
}  // namespace avx512_bf16
MSWIFT_TARGET_END

// A row function for this processor.
#define MSWIFT_ROW(function, ...)                                            \
  (at_least(Isa::avx512_bf16) ? avx512_bf16::function(__VA_ARGS__)           \
                              : at_least(Isa::avx512) ? avx512::function(__VA_ARGS__) : avx2::function(__VA_ARGS__))

template <class Value>
const Value* data_of(const Tensor& x) { return static_cast<const Value*>(x.const_data_ptr()); }
template <class Value>
Value* data_of(Tensor& x) { return static_cast<Value*>(x.mutable_data_ptr()); }

template <class Work>
void by_type(const Tensor& x, const char* name, const Work& work) {
  TORCH_CHECK(at_least(Isa::avx2), name, ": needs a CPU with AVX2");
  if (x.scalar_type() == at::kFloat)
    work(float{});
  else if (x.scalar_type() == at::kBFloat16)
    work(uint16_t{});
  else
    TORCH_CHECK(false, name, ": must be float32 or bfloat16, got ", x.scalar_type());
}

template <class Row>
void over_rows(int64_t rows, int64_t columns, const Row& row) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) row(r);
  });
}

static Tensor factors(const Tensor& weight, bool zero_centred) {
  Tensor wide = weight.to(at::kFloat).contiguous();
  return zero_centred ? wide + 1.0 : wide;
}

static void normalise(const Tensor& x, const Tensor* residual, const Tensor& w, double eps, Tensor* sum, Tensor& y, Tensor& rstd) {
  const int64_t n = x.size(-1), rows = n ? x.numel() / n : 0;
  by_type(x, "rms_norm", [&](auto value) {
    using Value = decltype(value);
    const Value* added = residual ? data_of<Value>(*residual) : nullptr;
    Value* kept = sum ? data_of<Value>(*sum) : nullptr;
    over_rows(rows, n, [&](int64_t r) {
      const auto at = r * n;
      MSWIFT_ROW(
          rms_norm_row, data_of<Value>(x) + at, added ? added + at : nullptr, data_of<float>(w), n, static_cast<float>(eps), kept ? kept + at : nullptr,
          data_of<Value>(y) + at, data_of<float>(rstd) + r);
    });
  });
}

static void check_norm(const Tensor& x, const Tensor& weight, const char* name) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), name, ": weight must be [hidden] of x, got ", weight.sizes());
}

static std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_, const Tensor& weight, double eps, bool zero_centred) {
  check_norm(x_, weight, "rms_norm");
  const Tensor x = x_.contiguous(), w = factors(weight, zero_centred);
  Tensor y = at::empty(x.sizes(), x.options()), rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  normalise(x, nullptr, w, eps, nullptr, y, rstd);
  return {y, rstd};
}

static std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x_, const Tensor& residual_, const Tensor& weight, double eps, bool zero_centred) {
  check_norm(x_, weight, "add_rms_norm");
  TORCH_CHECK(residual_.sizes() == x_.sizes() && residual_.scalar_type() == x_.scalar_type(), "add_rms_norm: residual must be as x, got ", residual_.sizes());
  const Tensor x = x_.contiguous(), residual = residual_.contiguous(), w = factors(weight, zero_centred);
  Tensor y = at::empty(x.sizes(), x.options()), sum = at::empty(x.sizes(), x.options());
  Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  normalise(x, &residual, w, eps, &sum, y, rstd);
  return {y, sum, rstd};
}

constexpr int64_t kSummed = 32;  // rows whose parts of the weight's gradient one thread adds up, so that the order of additions is fixed

static std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad_, const std::optional<Tensor>& grad_sum_, const Tensor& x_, const Tensor& weight, const Tensor& rstd_, bool zero_centred,
    bool of_weight) {
  check_norm(x_, weight, "rms_norm_backward");
  TORCH_CHECK(rstd_.sizes() == x_.sizes().slice(0, x_.dim() - 1) && rstd_.scalar_type() == at::kFloat, "rms_norm_backward: rstd must be float32, one a row of x, got ",
              rstd_.sizes());
  const Tensor rstd = rstd_.contiguous(), grad = grad_.contiguous(), x = x_.contiguous(), w = factors(weight, zero_centred), grad_sum = grad_sum_ ? grad_sum_->contiguous() : Tensor();
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "rms_norm_backward: grad must be as x");
  TORCH_CHECK(!grad_sum.defined() || (grad_sum.sizes() == x.sizes() && grad_sum.scalar_type() == x.scalar_type()), "rms_norm_backward: grad_sum must be as x");
  const int64_t n = x.size(-1), rows = n ? x.numel() / n : 0, each = of_weight ? kSummed : 1, blocks = (rows + each - 1) / each;
  Tensor dx = at::empty(x.sizes(), x.options()), parts = at::zeros({of_weight ? blocks : 0, n}, x.options().dtype(at::kFloat));
  by_type(x, "rms_norm_backward", [&](auto value) {
    using Value = decltype(value);
    const Value* added = grad_sum.defined() ? data_of<Value>(grad_sum) : nullptr;
    over_rows(blocks, n * each, [&](int64_t block) {
      for (int64_t r = block * each; r < std::min(rows, (block + 1) * each); r++) {
        const auto at = r * n;
        const Value *of_y = data_of<Value>(grad) + at, *of_x = data_of<Value>(x) + at;
        const float scale = data_of<float>(rstd)[r];
        MSWIFT_ROW(rms_norm_backward_row, of_y, added ? added + at : nullptr, of_x, data_of<float>(w), n, scale, data_of<Value>(dx) + at);
        if (of_weight) MSWIFT_ROW(rms_norm_weight_row, of_y, of_x, n, scale, data_of<float>(parts) + block * n);
      }
    });
  });
  return {dx, of_weight ? parts.sum(0) : at::empty({0}, parts.options())};
}

static Gate gate_of(double slope, double cubic, double limit, double offset) {
  TORCH_CHECK(limit > 0, "gated_activation: limit must be above 0, got ", limit);
  const bool is_silu = slope == 1.0 && cubic == 0.0 && std::isinf(limit) && offset == 0.0;
  return {static_cast<float>(slope), static_cast<float>(cubic), static_cast<float>(limit), static_cast<float>(offset), is_silu};
}

static Tensor gated(const Tensor& x_, double slope, double cubic, double limit, double offset) {
  TORCH_CHECK(x_.dim() >= 1 && x_.size(-1) % 2 == 0, "gated_activation: x must be [..., gate and up side by side], got ", x_.sizes());
  const Tensor x = x_.contiguous();
  const Gate g = gate_of(slope, cubic, limit, offset);
  auto shape = x.sizes().vec();
  const int64_t n = shape.back() /= 2, rows = n ? x.numel() / (2 * n) : 0;
  Tensor y = at::empty(shape, x.options());
  by_type(x, "gated_activation", [&](auto value) {
    using Value = decltype(value);
    over_rows(rows, 4 * n, [&](int64_t r) {
      const Value* row = data_of<Value>(x) + r * 2 * n;
      MSWIFT_ROW(gate_row, row, row + n, n, g, data_of<Value>(y) + r * n);
    });
  });
  return y;
}

static Tensor gated_backward(const Tensor& grad_, const Tensor& x_, double slope, double cubic, double limit, double offset) {
  TORCH_CHECK(x_.dim() >= 1 && x_.size(-1) % 2 == 0, "gated_activation_backward: x must be [..., gate and up side by side], got ", x_.sizes());
  auto half = x_.sizes().vec();
  half.back() /= 2;
  const Tensor grad = grad_.contiguous(), x = x_.contiguous();
  TORCH_CHECK(grad.sizes() == half && grad.scalar_type() == x.scalar_type(), "gated_activation_backward: grad must be ", at::IntArrayRef(half), " in the dtype of x, got ",
              grad.sizes());
  const Gate g = gate_of(slope, cubic, limit, offset);
  const int64_t n = grad.size(-1), rows = n ? grad.numel() / n : 0;
  Tensor dx = at::empty(x.sizes(), x.options());
  by_type(x, "gated_activation_backward", [&](auto value) {
    using Value = decltype(value);
    over_rows(rows, 4 * n, [&](int64_t r) {
      const Value* row = data_of<Value>(x) + r * 2 * n;
      Value* to = data_of<Value>(dx) + r * 2 * n;
      MSWIFT_ROW(gate_backward_row, data_of<Value>(grad) + r * n, row, row + n, n, g, to, to + n);
    });
  });
  return dx;
}

static void check_table(const Tensor& table, int64_t tokens, int64_t width) {
  TORCH_CHECK(
      table.dim() == 3 && table.size(0) == 2 && table.size(1) == tokens && table.scalar_type() == at::kFloat && 2 * table.size(2) <= width,
      "rotate: table must be float32 [2, s, half of the rotated columns], got ", table.sizes());
}

// Row r of [s, b]: `turn` gets where it begins in a tensor of these strides, its place, and a function that rotates one head of `n` columns.
template <class Value, class Turn>
static void over_tokens(const Tensor& x, const Tensor& table, int64_t columns, int64_t n, bool interleaved, bool back, const Turn& turn) {
  const int64_t s = x.size(0), b = x.size(1), half = table.size(2);
  const float sign = back ? -1.0f : 1.0f;
  over_rows(s * b, columns, [&](int64_t r) {
    const int64_t t = r / b;
    const float *cos = data_of<float>(table) + t * half, *sin = cos + s * half;
    turn(t * x.stride(0) + r % b * x.stride(1), r, [&](const Value* from, Value* to) {
      if (interleaved)
        MSWIFT_ROW(rotate_pairs_row, from, cos, sin, half, n, sign, to);
      else
        MSWIFT_ROW(rotate_halves_row, from, cos, sin, half, n, sign, to);
    });
  });
}

static Tensor rotate(const Tensor& x_, const Tensor& table_, bool interleaved, bool back) {
  const Tensor x = x_.stride(-1) == 1 ? x_ : x_.contiguous(), table = table_.contiguous();
  TORCH_CHECK(x.dim() == 4, "rotate: x must be [s, b, heads, columns], got ", x.sizes());
  check_table(table, x.size(0), x.size(3));
  const int64_t heads = x.size(2), n = x.size(3);
  Tensor y = at::empty(x.sizes(), x.options());
  by_type(x, "rotate", [&](auto value) {
    using Value = decltype(value);
    over_tokens<Value>(x, table, heads * n, n, interleaved, back, [&](int64_t at, int64_t r, const auto& turn) {
      for (int64_t h = 0; h < heads; h++) turn(data_of<Value>(x) + at + h * x.stride(2), data_of<Value>(y) + (r * heads + h) * n);
    });
  });
  return y;
}

static void rotate_in_place(const Tensor& x_, const Tensor& table_, int64_t width, int64_t each, int64_t turned, bool interleaved, bool back) {
  TORCH_CHECK(x_.dim() >= 3 && width > 0, "rotate_: x must be [s, b, heads of `width` columns], got ", x_.sizes());
  TORCH_CHECK(0 < turned && turned <= each, "rotate_: turned must be in [1, each], got ", turned, " of ", each);
  at::assert_no_internal_overlap(x_);
  Tensor x = x_.view({x_.size(0), x_.size(1), c10::multiply_integers(x_.sizes().slice(2))});  // fails if heads do not lie side by side
  TORCH_CHECK(x.stride(2) == 1 || x.size(2) <= 1, "rotate_: columns must lie side by side, got strides ", x_.strides());
  const Tensor table = table_.contiguous();
  TORCH_CHECK(x.size(2) % (each * width) == 0, "rotate_: x must hold a multiple of ", each, " heads of ", width, " columns, got ", x.size(2), " columns");
  check_table(table, x.size(0), width);
  by_type(x, "rotate_", [&](auto value) {
    using Value = decltype(value);
    Value* data = data_of<Value>(x);
    over_tokens<Value>(x, table, x.size(2), width, interleaved, back, [&](int64_t at, int64_t, const auto& turn) {
      for (Value* group = data + at; group < data + at + x.size(2); group += each * width)
        for (Value* head = group; head < group + turned * width; head += width) turn(head, head);
    });
  });
}

// What is left of torch.library's own registration, which takes no operator that writes into its argument. Nothing needs what stood there.
struct RotationInPlace : torch::autograd::Function<RotationInPlace> {
  static void call(const Tensor& x, const Tensor& table, int64_t width, int64_t each, int64_t turned, bool interleaved, bool back) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mswift::rotate_", "").typed<decltype(call)>();
    op.call(x, table, width, each, turned, interleaved, back);
  }

  static Tensor forward(
      torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& table, int64_t width, int64_t each, int64_t turned, bool interleaved, bool back) {
    const at::AutoDispatchBelowADInplaceOrView below;
    call(x, table, width, each, turned, interleaved, back);
    ctx->mark_dirty({x});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({table});
    ctx->saved_data["how"] = std::vector<int64_t>{width, each, turned, interleaved, back};
    return x;
  }

  // By reference, so that a gradient that nobody else holds can be told: it is turned back where it lies.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list& grads) {
    torch::autograd::variable_list found(7);
    if (!grads[0].defined()) return found;
    Tensor grad = std::move(grads[0]);
    const bool alone = !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grad) && grad.is_contiguous() && grad.use_count() == 1 && grad.storage().use_count() == 1;
    if (!alone) grad = grad.clone(at::MemoryFormat::Contiguous);
    const auto how = ctx->saved_data["how"].toIntVector();
    call(grad, ctx->get_saved_variables()[0], how[0], how[1], how[2], how[3], !how[4]);
    found[0] = grad;
    return found;
  }

  static void differentiable(const Tensor& x, const Tensor& table, int64_t width, int64_t each, int64_t turned, bool interleaved, bool back) {
    apply(x, table, width, each, turned, interleaved, back);
  }
};

}  // namespace mswift::elementwise

TORCH_LIBRARY_IMPL(mswift, Autograd, m) { m.impl("rotate_", mswift::elementwise::RotationInPlace::differentiable); }

TORCH_LIBRARY_IMPL(mswift, CPU, m) {
  m.impl("rms_norm", mswift::elementwise::rms_norm);
  m.impl("add_rms_norm", mswift::elementwise::add_rms_norm);
  m.impl("rms_norm_backward", mswift::elementwise::rms_norm_backward);
  m.impl("gated_activation", mswift::elementwise::gated);
  m.impl("gated_activation_backward", mswift::elementwise::gated_backward);
  m.impl("rotate", mswift::elementwise::rotate);
  m.impl("rotate_", mswift::elementwise::rotate_in_place);
}
