// softmax(hidden @ weight.T) in tiles that stay in the cache: its statistics and the mean of the weight's rows under it (which is the gradient
// of the log-sum-exp); the weight's gradient is in linear_softmax_weight.cpp. The products are oneDNN's, through torch's brgemm, on panels of 64 columns that are
// packed once for all tokens.
//
// The label's logit is kept out of the sums: 1 - p of the label is then a sum of small numbers and not a difference of nearly equal ones, so
// that a token which the model already knows has an exact loss and gradient in bf16 too.
//
// The weight's gradient needs the logits once more. As many as its own memory holds are kept there by the sweep: the rows of the gradient of 64
// vocabulary rows keep the logits of these rows for as many tokens as the hidden size, [tokens / 64][rows][64], until the gradient is written.
// A few more are kept beside it.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cmath>

#include "cpu/linear_softmax.h"

namespace mswift {
namespace {

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
  Kept<T> kept;
  using K = typename Kept<T>::K;

  int64_t panels() const { return (width + kPanel - 1) / kPanel; }

  void pack(const Parts<T>& part, int64_t first, int64_t count, int64_t task) const {
    const int64_t over_depth = (count + kPanel - 1) / kPanel;
    if (task < over_depth)
      pack_transposed(part, weight + (first + task * kPanel) * width, count - task * kPanel, width, by_depth + task * kPanel * width);
    else
      pack_panel(part, weight + first * width, width, count, round_up(count, kPanel), (task - over_depth) * kPanel,
                 by_row + (task - over_depth) * kPanel * kBlock);
  }

  /// Puts by the logits of tokens [from, to), as far as there is room; q: at the beginning of the rows of z.
  void put_by(int64_t first, int64_t count, int64_t from, int64_t to, const K* q) const {
    constexpr int64_t ld = kBlock * sizeof(float) / sizeof(K);
    for (int64_t c = 0; c < count; c += kPanel) {
      const int64_t height = std::min(kPanel, count - c), end = std::min(to, kept.tokens);
      for (int64_t t = from, next; t < end; t = next) {
        next = std::min(end, t / kPanel * kPanel + kPanel);
        turn(q + (t - from) * ld + c, ld, next - t, height, kept.at(first + c, height, t / kPanel * kPanel) + t % kPanel);
      }
      for (int64_t v = 0; v < height && to == tokens && end == tokens && end < kept.tokens; v++)
        std::fill_n(kept.at(first + c, height, end / kPanel * kPanel) + v * kPanel + end % kPanel, kept.tokens - end, K(0));
    }
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
                       rows + t, mean ? e + row : nullptr, mean2 ? ez + row : nullptr, t < kept.tokens ? reinterpret_cast<K*>(z + row) : nullptr, &factor, &shift);
      if (t < kept.tokens) kept.references[first / kBlock * kept.tokens + t] = rows[t].reference;
      if (mean && factor != 1.f && first > 0) part.rescale(mean + t * width, mean2 ? mean2 + t * width : nullptr, width, factor, shift);
    }
    if (from < kept.tokens) put_by(first, count, from, to, reinterpret_cast<const K*>(z));
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
void sweep(const at::Tensor& hidden, const at::Tensor& weight, const std::vector<float>& bias, const at::Tensor& labels, Limits limits, at::Tensor& stats,
           at::Tensor& mean, at::Tensor& mean2, const Kept<T>& kept) {
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  std::vector<avx2::Row> rows(tokens, {avx2::kLowest, 0.f, 0.f, -INFINITY});
  const at::Tensor packed = at::empty({kBlock * (width + (mean.numel() ? round_up(width, kPanel) : 0))}, hidden.options());
  const bool wanted = mean.numel() > 0;
  T* room = static_cast<T*>(packed.data_ptr());
  const Sweep<T> job{static_cast<const T*>(hidden.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
                     bias.empty() ? nullptr : bias.data(), labels.const_data_ptr<int64_t>(), tokens, width, limits, rows.data(),
                     wanted ? mean.data_ptr<float>() : nullptr, mean2.numel() ? mean2.data_ptr<float>() : nullptr, room, room + kBlock * width, kept};
  if (tokens > 0) job.run();
  float* out = stats.data_ptr<float>();
  for (int64_t t = 0; t < tokens; t++) {
    out[t] = rows[t].reference;
    out[tokens + t] = rows[t].others;
    out[2 * tokens + t] = rows[t].spread;
    out[3 * tokens + t] = rows[t].label;
  }
}

/// Asks for large pages, where memory is had for the first time: it costs less to take it so.
void prefer_large_pages(const at::Tensor& memory) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.data_ptr()) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory.data_ptr()) + memory.nbytes()) / page * page;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // a wish: it may be refused
#endif
}

struct Swept {
  at::Tensor stats, mean, mean2, kept, more, references;
};

/// gradient: 0 none, 1 the mean, 2 also the mean weighted by (logit - reference). room: logits are kept, with so many bytes besides; -1: none are.
Swept swept(const at::Tensor& hidden_, const at::Tensor& weight_, const std::optional<at::Tensor>& bias, const at::Tensor& labels_, Limits limits,
            int64_t gradient, int64_t room) {
  check(hidden_, weight_, bias, labels_, limits.valid);
  const at::Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous(), labels = labels_.contiguous();
  const auto wide = hidden.options().dtype(at::kFloat);
  const int64_t tokens = hidden.size(0), width = hidden.size(1), rows = room < 0 ? 0 : weight.size(0);
  const bool empty = limits.valid == 0 || tokens == 0;
  const auto make = [&](bool wanted) { return !wanted ? at::empty({0, width}, wide) : empty ? at::zeros({tokens, width}, wide) : at::empty({tokens, width}, wide); };
  Swept to{at::empty({4, tokens}, wide), make(gradient > 0), make(gradient > 1)};
  const KeptTokens count(hidden, weight, room);
  to.kept = at::empty({rows, width}, weight.options());
  to.more = at::empty({rows, room < 0 ? 0 : count.all - count.own}, weight.options());
  to.references = at::empty({(limits.valid + kBlock - 1) / kBlock, room < 0 ? 0 : count.all}, wide);
  prefer_large_pages(to.kept);
  prefer_large_pages(to.more);
  const std::vector<float> biases = padded_bias(bias);
  if (hidden.scalar_type() == at::kFloat)
    sweep<float>(hidden, weight, biases, labels, limits, to.stats, to.mean, to.mean2, kept_in<float>(to.kept, to.more, to.references));
  else
    sweep<uint16_t>(hidden, weight, biases, labels, limits, to.stats, to.mean, to.mean2, kept_in<uint16_t>(to.kept, to.more, to.references));
  return to;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_softmax(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                                              const at::Tensor& labels, int64_t valid, double scale, double cap, int64_t gradient) {
  const Swept all = swept(hidden, weight, bias, labels, {valid, static_cast<float>(scale), static_cast<float>(cap)}, gradient, -1);
  return {all.stats, all.mean, all.mean2};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_softmax_keeping(const at::Tensor& hidden, const at::Tensor& weight,
                                                                                              const std::optional<at::Tensor>& bias,
                                                                                              const at::Tensor& labels, int64_t valid, double scale,
                                                                                              bool gradient, int64_t room) {
  TORCH_CHECK(room >= 0, "room: got ", room, ", wanted a number of bytes");
  const Swept all = swept(hidden, weight, bias, labels, {valid, static_cast<float>(scale), 0.f}, gradient, room);
  return {all.stats, all.mean, all.kept, all.more, all.references};
}

}  // namespace

TORCH_LIBRARY_IMPL(mswift, CPU, m) {
  m.impl("linear_softmax", &linear_softmax);
  m.impl("linear_softmax_keeping", &linear_softmax_keeping);
}

}  // namespace mswift
