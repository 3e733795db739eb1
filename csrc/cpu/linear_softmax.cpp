// softmax(hidden @ weight.T) in tiles that stay in the cache: its statistics and the mean of the weight's rows under it (which is the gradient
// of the log-sum-exp), and the gradient of the weight. The products are oneDNN's, through torch's brgemm, on panels of 64 columns that are
// packed once for all tokens.
//
// The label's logit is kept out of the sums: 1 - p of the label is then a sum of small numbers and not a difference of nearly equal ones, so
// that a token which the model already knows has an exact loss and gradient in bf16 too.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/isa.h"
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

constexpr int64_t kBlock = 512;  // vocabulary rows that are packed at a time; also tokens at a time in the weight's gradient
constexpr int64_t kTile = 64;    // tokens (vocabulary rows in the weight's gradient) of a tile

/// The functions of linear_softmax.inc for the processor at hand; T: float, or uint16_t for bf16.
template <class T>
struct Parts {
  using Row = avx2::Row;
  void (*softmax_row)(float*, int64_t, int64_t, const float*, float, float, int64_t, Row*, T*, T*, float*, float*);
  void (*rescale)(float*, float*, int64_t, float, float);
  float (*gradient_row)(float*, int64_t, float, float, float, const float*, const float*, const float*, const float*, const int32_t*, int32_t, T*);
  void (*transpose)(const uint32_t*, int64_t, int64_t, int64_t, uint32_t*);
  void (*interleave)(const T*, int64_t, int64_t, int64_t, int64_t, T*);
  void (*round)(const float*, int64_t, uint16_t*);
};
static_assert(sizeof(avx2::Row) == sizeof(avx512::Row));

template <class T>
Parts<T> parts() {
  if (at_least(Isa::avx512))
    return {reinterpret_cast<decltype(Parts<T>::softmax_row)>(&avx512::softmax_row<T>), &avx512::rescale, &avx512::gradient_row<T>,
            &avx512::transpose_panel, &avx512::interleave_panel, &avx512::round_rows};
  return {&avx2::softmax_row<T>, &avx2::rescale, &avx2::gradient_row<T>, &avx2::transpose_panel, &avx2::interleave_panel, &avx2::round_rows};
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

template <class T>
struct Sweep {
  const T *hidden, *weight;
  const float* bias;  // [valid rounded up], or null
  const int64_t* labels;
  int64_t tokens, width;
  Limits limits;
  avx2::Row* rows;
  float *mean, *mean2;  // [tokens][width], or null
  T *by_depth, *by_row;  // packed block, both ways

  int64_t panels() const { return (width + kPanel - 1) / kPanel; }

  void pack(const Parts<T>& part, int64_t first, int64_t count, int64_t task) const {
    const int64_t over_depth = (count + kPanel - 1) / kPanel;
    if (task < over_depth)
      pack_transposed(part, weight + (first + task * kPanel) * width, count - task * kPanel, width, by_depth + task * kPanel * width);
    else
      pack_panel(part, weight + first * width, width, count, round_up(count, kPanel), (task - over_depth) * kPanel,
                 by_row + (task - over_depth) * kPanel * kBlock);
  }

  /// Tokens [from, to) against the packed block of vocabulary rows [first, first + count).
  void tile(const Parts<T>& part, int64_t first, int64_t count, int64_t from, int64_t to, float* z, T* e, T* ez) const {
    const int64_t padded = round_up(count, kPanel), height = to - from;
    for (int64_t c = 0; c < padded; c += kPanel)
      Product<T>::run(height, kPanel, width, width, kPanel, kBlock, false, hidden + from * width, by_depth + c * width, z + c);
    for (int64_t t = from; t < to; t++) {
      const int64_t row = (t - from) * kBlock, label = labels[t] - first;
      float factor, shift;
      part.softmax_row(z + row, count, padded, bias ? bias + first : nullptr, limits.scale, limits.cap, label >= 0 && label < count ? label : -1,
                       rows + t, mean ? e + row : nullptr, mean2 ? ez + row : nullptr, &factor, &shift);
      if (mean && factor != 1.f && first > 0) part.rescale(mean + t * width, mean2 ? mean2 + t * width : nullptr, width, factor, shift);
    }
    for (int64_t p = 0; mean && p < panels(); p++) {
      const int64_t columns = std::min(kPanel, width - p * kPanel), to_panel = from * width + p * kPanel;
      const T* b = by_row + p * kPanel * kBlock;
      Product<T>::run(height, columns, padded, kBlock, kPanel, width, first > 0, e, b, mean + to_panel);
      if (mean2) Product<T>::run(height, columns, padded, kBlock, kPanel, width, first > 0, ez, b, mean2 + to_panel);
    }
  }

  void run() const {
    const Parts<T> part = parts<T>();
    const int64_t threads = at::get_num_threads();
    const int64_t tiles = std::max<int64_t>(1, round_up((tokens + kTile - 1) / kTile, std::min(threads, tokens)));
    for (int64_t first = 0; first < limits.valid; first += kBlock) {
      const int64_t count = std::min(kBlock, limits.valid - first);
      each<T>((count + kPanel - 1) / kPanel + (mean ? panels() : 0), [&](int64_t i) { pack(part, first, count, i); });
      at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> z(kTile * kBlock);
        std::vector<T> e(mean ? kTile * kBlock : 0), ez(mean2 ? kTile * kBlock : 0);
        for (int64_t i = begin; i < end; i++) {
          const int64_t from = i * tokens / tiles, to = (i + 1) * tokens / tiles;
          if (to > from) tile(part, first, count, from, to, z.data(), e.data(), ez.data());
        }
        Product<T>::release();
      });
    }
  }
};

template <class T>
struct WeightGradient {
  const T *hidden, *weight;
  const float* bias;
  const int32_t* labels;                            // [tokens rounded up], -1 beyond
  const float *lse, *a, *b, *g;                     // [tokens rounded up]
  int64_t tokens, width;
  Limits limits;
  T *by_depth, *by_row;  // the hidden states, packed both ways
  T* grad_weight;
  float* grad_bias;  // or null

  int64_t panels() const { return (width + kPanel - 1) / kPanel; }

  void pack(const Parts<T>& part, int64_t task) const {
    const int64_t blocks = (tokens + kPanel - 1) / kPanel, padded = round_up(tokens, kPanel);
    if (task < blocks)
      pack_transposed(part, hidden + task * kPanel * width, tokens - task * kPanel, width, by_depth + task * kPanel * width);
    else
      pack_panel(part, hidden, width, tokens, padded, (task - blocks) * kPanel, by_row + (task - blocks) * kPanel * padded);
  }

  void tile(const Parts<T>& part, int64_t first, int64_t height, float* z, T* e, float* sums) const {
    const int64_t padded = round_up(tokens, kPanel);
    for (int64_t from = 0; from < padded; from += kBlock) {
      const int64_t count = std::min(kBlock, padded - from);
      for (int64_t c = 0; c < count; c += kPanel)
        Product<T>::run(height, kPanel, width, width, kPanel, kBlock, false, weight + first * width, by_depth + (from + c) * width, z + c);
      for (int64_t v = 0; v < height; v++) {
        const float total = part.gradient_row(z + v * kBlock, count, bias ? bias[first + v] : 0.f, limits.scale, limits.cap, lse + from, a + from,
                                              b + from, g + from, labels + from, static_cast<int32_t>(first + v), e + v * kBlock);
        if (grad_bias) grad_bias[first + v] = (from > 0 ? grad_bias[first + v] : 0.f) + total;
      }
      for (int64_t p = 0; p < panels(); p++)
        Product<T>::run(height, std::min(kPanel, width - p * kPanel), count, kBlock, kPanel, width, from > 0, e,
                        by_row + p * kPanel * padded + from * kPanel, sums + p * kPanel);
    }
  }

  void keep(const Parts<float>&, int64_t, int64_t, const float*) const {}
  void keep(const Parts<uint16_t>& part, int64_t first, int64_t height, const float* sums) const {
    part.round(sums, height * width, grad_weight + first * width);
  }

  void run() const {
    const Parts<T> part = parts<T>();
    constexpr bool direct = std::is_same_v<T, float>;
    each<T>((tokens + kPanel - 1) / kPanel + panels(), [&](int64_t i) { pack(part, i); });
    at::parallel_for(0, (limits.valid + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> z(kTile * kBlock), sums(direct ? 0 : kTile * width);
      std::vector<T> e(kTile * kBlock);
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = i * kTile, height = std::min(kTile, limits.valid - first);
        float* into = direct ? reinterpret_cast<float*>(grad_weight) + first * width : sums.data();
        tile(part, first, height, z.data(), e.data(), into);
        keep(part, first, height, into);
      }
      Product<T>::release();
    });
  }
};

void check(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& labels, int64_t valid) {
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
std::vector<float> padded_bias(const std::optional<at::Tensor>& bias) {
  if (!bias) return {};
  const at::Tensor wide = bias->to(at::kFloat).contiguous();
  std::vector<float> values(round_up(wide.size(0), kBlock) + kBlock, 0.f);
  std::copy_n(wide.const_data_ptr<float>(), wide.size(0), values.begin());
  return values;
}

template <class T>
void sweep(const at::Tensor& hidden, const at::Tensor& weight, const std::vector<float>& bias, const at::Tensor& labels, Limits limits, at::Tensor& stats,
           at::Tensor& mean, at::Tensor& mean2) {
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  std::vector<avx2::Row> rows(tokens, {avx2::kLowest, 0.f, 0.f, -INFINITY});
  const at::Tensor packed = at::empty({kBlock * (width + (mean.numel() ? round_up(width, kPanel) : 0))}, hidden.options());
  const bool wanted = mean.numel() > 0;
  T* room = static_cast<T*>(packed.data_ptr());
  const Sweep<T> job{static_cast<const T*>(hidden.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
                     bias.empty() ? nullptr : bias.data(), labels.const_data_ptr<int64_t>(), tokens, width, limits, rows.data(),
                     wanted ? mean.data_ptr<float>() : nullptr, mean2.numel() ? mean2.data_ptr<float>() : nullptr, room, room + kBlock * width};
  if (tokens > 0) job.run();
  float* out = stats.data_ptr<float>();
  for (int64_t t = 0; t < tokens; t++) {
    out[t] = rows[t].reference;
    out[tokens + t] = rows[t].others;
    out[2 * tokens + t] = rows[t].spread;
    out[3 * tokens + t] = rows[t].label;
  }
}

/// gradient: 0 none, 1 the mean, 2 also the mean weighted by (logit - reference).
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_softmax(const at::Tensor& hidden_, const at::Tensor& weight_, const std::optional<at::Tensor>& bias,
                                                              const at::Tensor& labels_, int64_t valid, double scale, double cap, int64_t gradient) {
  check(hidden_, weight_, bias, labels_, valid);
  const at::Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous(), labels = labels_.contiguous();
  const auto wide = hidden.options().dtype(at::kFloat);
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  at::Tensor stats = at::empty({4, tokens}, wide);
  const bool empty = valid == 0 || tokens == 0;
  const auto make = [&](bool wanted) { return !wanted ? at::empty({0, width}, wide) : empty ? at::zeros({tokens, width}, wide) : at::empty({tokens, width}, wide); };
  at::Tensor mean = make(gradient > 0), mean2 = make(gradient > 1);
  const Limits limits{valid, static_cast<float>(scale), static_cast<float>(cap)};
  const std::vector<float> biases = padded_bias(bias);
  if (hidden.scalar_type() == at::kFloat)
    sweep<float>(hidden, weight, biases, labels, limits, stats, mean, mean2);
  else
    sweep<uint16_t>(hidden, weight, biases, labels, limits, stats, mean, mean2);
  return {stats, mean, mean2};
}

template <class T>
void weight_gradient(const at::Tensor& hidden, const at::Tensor& weight, const std::vector<float>& bias, const std::vector<int32_t>& labels,
                     const std::vector<float>& factors, Limits limits, at::Tensor& grad_weight, at::Tensor& grad_bias) {
  const int64_t tokens = hidden.size(0), width = hidden.size(1), padded = round_up(tokens, kPanel);
  const at::Tensor packed = at::empty({padded * (width + round_up(width, kPanel))}, hidden.options());
  T* room = static_cast<T*>(packed.data_ptr());
  const float* f = factors.data();
  WeightGradient<T>{static_cast<const T*>(hidden.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()), bias.empty() ? nullptr : bias.data(),
                    labels.data(), f, f + padded, f + 2 * padded, f + 3 * padded, tokens, width, limits, room, room + padded * width,
                    static_cast<T*>(grad_weight.data_ptr()), grad_bias.numel() ? grad_bias.data_ptr<float>() : nullptr}
      .run();
}

/// factors [4][tokens] fp32: lse, a, b, g; a logit's gradient is p (a - b z) + g at the label.
std::tuple<at::Tensor, at::Tensor> linear_softmax_grad_weight(const at::Tensor& hidden_, const at::Tensor& weight_, const std::optional<at::Tensor>& bias,
                                                              const at::Tensor& labels_, const at::Tensor& factors_, int64_t valid, double scale,
                                                              double cap) {
  check(hidden_, weight_, bias, labels_, valid);
  const int64_t tokens = hidden_.size(0), padded = round_up(tokens, kPanel);
  TORCH_CHECK(factors_.scalar_type() == at::kFloat && factors_.dim() == 2 && factors_.size(0) == 4 && factors_.size(1) == tokens, "factors: wanted float32 [4, ",
              tokens, "]");
  const at::Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous(), labels = labels_.contiguous(), given = factors_.contiguous();
  std::vector<int32_t> local(padded, -1);
  for (int64_t t = 0; t < tokens; t++) local[t] = static_cast<int32_t>(std::clamp<int64_t>(labels.const_data_ptr<int64_t>()[t], -1, INT32_MAX));
  std::vector<float> factors(4 * padded, 0.f);
  for (int64_t i = 0; i < 4; i++) std::copy_n(given.const_data_ptr<float>() + i * tokens, tokens, factors.begin() + i * padded);
  std::fill(factors.begin() + tokens, factors.begin() + padded, INFINITY);  // a token that is not there has probability zero
  at::Tensor grad_weight = at::empty_like(weight), grad_bias = bias ? at::zeros({weight.size(0)}, given.options()) : at::empty({0}, given.options());
  if (valid < weight.size(0)) grad_weight.narrow(0, valid, weight.size(0) - valid).zero_();
  if (tokens == 0) return {grad_weight.zero_(), grad_bias};
  const Limits limits{valid, static_cast<float>(scale), static_cast<float>(cap)};
  const std::vector<float> biases = padded_bias(bias);
  if (hidden.scalar_type() == at::kFloat)
    weight_gradient<float>(hidden, weight, biases, local, factors, limits, grad_weight, grad_bias);
  else
    weight_gradient<uint16_t>(hidden, weight, biases, local, factors, limits, grad_weight, grad_bias);
  return {grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(mswift, CPU, m) {
  m.impl("linear_softmax", &linear_softmax);
  m.impl("linear_softmax_grad_weight", &linear_softmax_grad_weight);
}

}  // namespace mswift
