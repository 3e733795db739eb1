// The gradient of the weight of softmax(hidden @ weight.T), summed in fp32 over all tokens for 64 vocabulary rows at a time and rounded once. Logits
// that the sweep kept are read, the others computed again.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <utility>

#include "cpu/linear_softmax.h"

namespace mswift {
namespace {

template <class T>
struct WeightGradient {
  const T *hidden, *weight;
  const float* bias;
  const int32_t* labels;                            // [tokens rounded up], -1 beyond
  const float *lse, *a, *b, *g;                     // [tokens rounded up]; b: null, and a and g with the scale in them, where the row is a plain one
  int64_t tokens, width;
  Limits limits;
  T *by_depth, *by_row;  // the hidden states, packed both ways; by_depth from the first token on whose logits are not kept
  T* grad_weight;
  float* grad_bias;  // or null
  Kept<T> kept;      // in the memory of grad_weight

  int64_t panels() const { return (width + kPanel - 1) / kPanel; }

  void pack(const Parts<T>& part, int64_t task) const {
    const int64_t padded = round_up(tokens, kPanel), blocks = (padded - kept.tokens) / kPanel, from = kept.tokens + task * kPanel;
    if (task < blocks)
      pack_transposed(part, hidden + from * width, tokens - from, width, by_depth + task * kPanel * width);
    else
      pack_panel(part, hidden, width, tokens, padded, (task - blocks) * kPanel, by_row + (task - blocks) * kPanel * padded);
  }

  /// exp(logit + base) is the probability.
  void fill_base(int64_t first, float* base) const {
    const float* references = kept.references + first / kBlock * kept.tokens;
    const int64_t known = Kept<T>::relative ? std::min(kept.tokens, tokens) : 0, padded = round_up(tokens, kPanel);
    for (int64_t t = 0; t < known; t++) base[t] = references[t] + Kept<T>::origin - lse[t];
    for (int64_t t = known; t < padded; t++) base[t] = -lse[t];
  }

  /// Gradients of the logits of one vocabulary row for `count` tokens, of which `known` are kept; the others' products are in z.
  float row(const Parts<T>& part, int64_t first, int64_t height, int64_t v, int64_t from, int64_t count, int64_t known, float* z, const float* base,
            T* e) const {
    const float shift = bias ? bias[first + v] : 0.f;
    const int32_t id = static_cast<int32_t>(first + v);
    if (b)
      return part.gradient_row(z, count, shift, limits.scale, limits.cap, lse + from, a + from, b + from, g + from, labels + from, id, e);
    const int64_t next = from + known, beside = std::clamp(kept.own, from, next);
    float total = 0.f;
    for (const auto& [begin, end] : {std::pair{from, beside}, std::pair{beside, next}})
      if (begin < end)
        total += part.kept_row(kept.at(first, height, begin) + v * kPanel, height * kPanel, end - begin, Kept<T>::step, 0.f, base + begin, a + begin,
                               g + begin, labels + begin, id, e + begin - from);
    return total + part.plain_row(z + known, kPanel, count - known, limits.scale, shift * limits.scale, base + next, a + next, g + next, labels + next, id,
                                  e + known);
  }

  void tile(const Parts<T>& part, int64_t first, int64_t height, float* z, T* e, const float* base, float* sums) const {
    const int64_t padded = round_up(tokens, kPanel);
    for (int64_t from = 0; from < padded; from += kBlock) {
      const int64_t count = std::min(kBlock, padded - from), known = std::clamp<int64_t>(kept.tokens - from, 0, count);
      for (int64_t c = known; c < count; c += kPanel)
        Product<T>::run(height, kPanel, width, width, kPanel, kBlock, false, weight + first * width, by_depth + (from + c - kept.tokens) * width, z + c);
      for (int64_t v = 0; v < height; v++) {
        const float total = row(part, first, height, v, from, count, known, z + v * kBlock, base, e + v * kBlock);
        if (grad_bias) grad_bias[first + v] = (from > 0 ? grad_bias[first + v] : 0.f) + total;
      }
      for (int64_t p = 0; p < panels(); p++)
        Product<T>::run(height, std::min(kPanel, width - p * kPanel), count, kBlock, kPanel, width, from > 0, e,
                        by_row + p * kPanel * padded + from * kPanel, sums + p * kPanel);
    }
  }

  void finish(const Parts<float>&, int64_t first, int64_t height, const float* sums) const { std::copy_n(sums, height * width, grad_weight + first * width); }
  void finish(const Parts<uint16_t>& part, int64_t first, int64_t height, const float* sums) const {
    part.round(sums, height * width, grad_weight + first * width);
  }

  void run() const {
    const Parts<T> part = parts<T>();
    const int64_t padded = round_up(tokens, kPanel);
    each<T>((padded - kept.tokens) / kPanel + panels(), [&](int64_t i) { pack(part, i); });
    at::parallel_for(0, (limits.valid + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> z(kTile * kBlock), sums(kTile * width), base(padded);
      std::vector<T> e(kTile * kBlock);
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = i * kTile, height = std::min(kTile, limits.valid - first);
        fill_base(first, base.data());
        tile(part, first, height, z.data(), e.data(), base.data(), sums.data());
        finish(part, first, height, sums.data());
      }
      Product<T>::release();
    });
  }
};

/// What both operators are given.
struct Given {
  at::Tensor hidden, weight, labels, factors;  // contiguous; factors: fp32 [4][tokens]
  std::vector<float> bias;
  std::vector<int32_t> local;  // labels, rounded up with -1

  Given(const at::Tensor& hidden_, const at::Tensor& weight_, const std::optional<at::Tensor>& bias_, const at::Tensor& labels_, const at::Tensor& factors_,
        int64_t valid) {
    check(hidden_, weight_, bias_, labels_, valid);
    const int64_t tokens = hidden_.size(0);
    TORCH_CHECK(factors_.scalar_type() == at::kFloat && factors_.dim() == 2 && factors_.size(0) == 4 && factors_.size(1) == tokens,
                "factors: wanted float32 [4, ", tokens, "]");
    hidden = hidden_.contiguous(), weight = weight_.contiguous(), labels = labels_.contiguous(), factors = factors_.contiguous();
    bias = padded_bias(bias_);
    local.assign(round_up(tokens, kPanel), -1);
    for (int64_t t = 0; t < tokens; t++) local[t] = static_cast<int32_t>(std::clamp<int64_t>(labels.const_data_ptr<int64_t>()[t], -1, INT32_MAX));
  }

  /// One row of the factors, rounded up with `beyond`.
  std::vector<float> row(int64_t i, float beyond, float times = 1.f) const {
    const int64_t tokens = hidden.size(0);
    std::vector<float> values(local.size(), beyond);
    for (int64_t t = 0; t < tokens; t++) values[t] = times * factors.const_data_ptr<float>()[i * tokens + t];
    return values;
  }
};

constexpr float kAbsent = INFINITY;  // the log-sum-exp of a token that is not there, whose probabilities are zero

template <class T>
void weight_gradient(const Given& given, const std::vector<float>& lse, const std::vector<float>& a, const float* b, const std::vector<float>& g,
                     Limits limits, at::Tensor& grad_weight, at::Tensor& grad_bias, const Kept<T>& kept) {
  const int64_t tokens = given.hidden.size(0), width = given.hidden.size(1), padded = round_up(tokens, kPanel), others = padded - kept.tokens;
  const at::Tensor packed = at::empty({others * width + padded * round_up(width, kPanel)}, given.hidden.options());
  T* room = static_cast<T*>(packed.data_ptr());
  WeightGradient<T>{static_cast<const T*>(given.hidden.const_data_ptr()), static_cast<const T*>(given.weight.const_data_ptr()),
                    given.bias.empty() ? nullptr : given.bias.data(), given.local.data(), lse.data(), a.data(), b, g.data(), tokens, width, limits, room,
                    room + others * width, static_cast<T*>(grad_weight.data_ptr()), grad_bias.numel() ? grad_bias.data_ptr<float>() : nullptr, kept}
      .run();
}

at::Tensor make_grad_bias(const Given& given, int64_t rows) { return at::zeros({given.bias.empty() ? 0 : rows}, given.factors.options()); }

/// factors: lse, a, b, g; a logit's gradient is p (a - b z) + g at the label.
std::tuple<at::Tensor, at::Tensor> linear_softmax_grad_weight(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                                              const at::Tensor& labels, const at::Tensor& factors, int64_t valid, double scale,
                                                              double cap) {
  const Given given(hidden, weight, bias, labels, factors, valid);
  at::Tensor grad_weight = at::empty_like(given.weight), grad_bias = make_grad_bias(given, weight.size(0));
  if (valid < weight.size(0)) grad_weight.narrow(0, valid, weight.size(0) - valid).zero_();
  if (hidden.size(0) == 0) return {grad_weight.zero_(), grad_bias};
  const Limits limits{valid, static_cast<float>(scale), static_cast<float>(cap)};
  const std::vector<float> b = given.row(2, 0.f);
  const bool plain = cap == 0 && std::all_of(b.begin(), b.end(), [](float x) { return x == 0.f; });
  const float times = plain ? limits.scale : 1.f;
  const std::vector<float> lse = given.row(0, kAbsent), a = given.row(1, 0.f, times), g = given.row(3, 0.f, times);
  if (given.hidden.scalar_type() == at::kFloat)
    weight_gradient<float>(given, lse, a, plain ? nullptr : b.data(), g, limits, grad_weight, grad_bias, {});
  else
    weight_gradient<uint16_t>(given, lse, a, plain ? nullptr : b.data(), g, limits, grad_weight, grad_bias, {});
  return {grad_weight, grad_bias};
}

/// factors: lse, a, g, and all of the gradient at the label; a logit's gradient is p a + g at the label. The gradient takes the place of `kept`.
at::Tensor linear_softmax_grad_weight_kept(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                           const at::Tensor& labels, const at::Tensor& factors, at::Tensor& kept, const at::Tensor& more,
                                           const at::Tensor& references, int64_t valid, double scale) {
  const Given given(hidden, weight, bias, labels, factors, valid);
  const int64_t tokens = hidden.size(0), own = KeptTokens(hidden, weight, 0).own, stored = references.dim() == 2 ? references.size(1) : 0;
  TORCH_CHECK(kept.sizes() == weight.sizes() && kept.scalar_type() == weight.scalar_type() && kept.is_contiguous(),
              "kept: wanted what linear_softmax_keeping gave for this weight, ", weight.sizes());
  TORCH_CHECK(references.scalar_type() == at::kFloat && references.dim() == 2 && references.size(0) == (valid + kBlock - 1) / kBlock && stored >= own &&
                  stored <= round_up(tokens, kPanel) && references.is_contiguous(),
              "references: wanted float32 [", (valid + kBlock - 1) / kBlock, ", kept tokens]");
  TORCH_CHECK(more.dim() == 2 && more.size(0) == weight.size(0) && more.size(1) == stored - own && more.scalar_type() == weight.scalar_type() &&
                  more.is_contiguous(),
              "more: wanted [", weight.size(0), ", ", stored - own, "] of the weight's type");
  at::Tensor grad_bias = make_grad_bias(given, weight.size(0));
  if (valid < weight.size(0)) kept.narrow(0, valid, weight.size(0) - valid).zero_();
  if (tokens == 0) {
    kept.zero_();
    return grad_bias;
  }
  const Limits limits{valid, static_cast<float>(scale), 0.f};
  const std::vector<float> lse = given.row(0, kAbsent), a = given.row(1, 0.f, limits.scale), whole = given.row(3, 0.f, limits.scale);
  std::vector<float> g = given.row(2, 0.f, limits.scale);
  std::copy_n(whole.begin(), stored, g.begin());  // a kept logit of a label has probability zero
  if (given.hidden.scalar_type() == at::kFloat)
    weight_gradient<float>(given, lse, a, nullptr, g, limits, kept, grad_bias, kept_in<float>(kept, more, references));
  else
    weight_gradient<uint16_t>(given, lse, a, nullptr, g, limits, kept, grad_bias, kept_in<uint16_t>(kept, more, references));
  return grad_bias;
}

}  // namespace

TORCH_LIBRARY_IMPL(mswift, CPU, m) {
  m.impl("linear_softmax_grad_weight", &linear_softmax_grad_weight);
  m.impl("linear_softmax_grad_weight_kept", &linear_softmax_grad_weight_kept);
}

}  // namespace mswift
