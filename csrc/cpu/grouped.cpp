// Products of rows that are sorted by group with the weight of their group: the linear layers of all experts of a mixture in one call, an
// adapter of each group in the same sums, its dropout drawn again where it is needed. bf16; see mswift/kernels/grouped_linear.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "cpu/grouped_tiles.h"
#include "cpu/tasks.h"

namespace mswift::grouped {
namespace {

using at::Tensor;
constexpr int64_t kStrip = 256;           // output columns of a task
constexpr int64_t kCached = 256 << 10;    // bytes of input rows of a task, which stay in the L2 cache

const uint16_t* bits(const Tensor& x) { return static_cast<const uint16_t*>(x.const_data_ptr()); }

/// Where each group's rows begin, and one more entry for their end.
std::vector<int64_t> offsets_of(const Tensor& counts_, int64_t rows, int64_t groups) {
  TORCH_CHECK(counts_.dim() == 1 && counts_.size(0) == groups && counts_.scalar_type() == at::kLong, "counts: wanted int64 [", groups, "], one a weight, got ",
              counts_.scalar_type(), " ", counts_.sizes());
  const Tensor counts = counts_.contiguous();
  std::vector<int64_t> offsets(groups + 1, 0);
  for (int64_t g = 0; g < groups; g++) {
    const int64_t count = counts.const_data_ptr<int64_t>()[g];
    TORCH_CHECK(count >= 0, "counts: got ", count, " rows in group ", g);
    offsets[g + 1] = offsets[g] + count;
  }
  TORCH_CHECK(offsets[groups] == rows, "counts: sum to ", offsets[groups], ", but there are ", rows, " rows");
  return offsets;
}

/// The matrices of all groups, one after another in memory or not.
struct Matrices {
  std::vector<Tensor> kept;
  int64_t rows = 0, columns = 0;

  Matrices(const char* name, at::TensorList list) {
    for (const Tensor& one : list) {
      TORCH_CHECK(one.dim() == 2 && one.sizes() == list[0].sizes(), name, ": wanted matrices of one shape, got ", one.sizes(), " beside ", list[0].sizes());
      TORCH_CHECK(one.scalar_type() == at::kBFloat16, name, ": wanted bfloat16, got ", one.scalar_type());
      kept.push_back(one.contiguous());
    }
    if (!kept.empty()) rows = kept[0].size(0), columns = kept[0].size(1);
  }
  Factors with(const Tensor& x, int64_t first, int64_t group) const {
    const int64_t depth = x.size(1);
    return {bits(x) + first * depth, depth, bits(kept[group]), columns, depth};
  }
};

/// The masks of all groups; one seed each, rows count from the group's first.
struct Masks {
  Tensor seeds;
  int64_t threshold, first_column, full_width;

  Masks(const std::optional<Tensor>& given, int64_t threshold, int64_t first_column, int64_t full_width, int64_t groups)
      : threshold(given ? threshold : 0), first_column(first_column), full_width(full_width) {
    TORCH_CHECK(threshold >= 0 && threshold < 256, "threshold: wanted 0 to 255, got ", threshold);
    TORCH_CHECK(first_column >= 0 && full_width >= 0 && first_column + full_width < (1ll << 31), "first_column: got ", first_column);
    if (!given) return;
    TORCH_CHECK(given->dim() == 1 && given->size(0) == groups && given->scalar_type() == at::kLong, "seeds: wanted int64 [", groups, "], got ", given->sizes());
    seeds = given->contiguous();
  }
  Mask of(int64_t group, int64_t first_row) const {
    if (!threshold) return {};
    return {static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[group]), first_row, static_cast<uint32_t>(first_column), static_cast<uint32_t>(full_width),
            static_cast<uint32_t>(threshold)};
  }
};

/// Some rows of one group against a strip of its output columns.
struct Task {
  int64_t group, first, rows, column;
};

std::vector<Task> tasks_of(const std::vector<int64_t>& offsets, int64_t depth, int64_t columns) {
  const int64_t block = std::clamp<int64_t>(kCached / (2 * std::max<int64_t>(1, depth)), 24, 192);
  std::vector<Task> tasks;
  for (size_t g = 0; g + 1 < offsets.size(); g++) {
    const int64_t count = offsets[g + 1] - offsets[g], parts = (count + block - 1) / block;
    for (int64_t p = 0; p < parts; p++) {
      const int64_t first = p * count / parts;
      for (int64_t c = 0; c < columns; c += kStrip) tasks.push_back({static_cast<int64_t>(g), first, (p + 1) * count / parts - first, c});
    }
  }
  return tasks;
}

void check_rows(const char* name, const Tensor& x, int64_t depth) {
  TORCH_CHECK(at_least(Isa::avx512_bf16), name, ": this processor has no AVX512-BF16");
  TORCH_CHECK(x.dim() == 2 && x.size(1) == depth, name, ": wanted [rows, ", depth, "], got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, name, ": wanted bfloat16, got ", x.scalar_type());
}

/// The rows of a group with zeros where its mask has them, in the memory of `kept`.
Tensor masked(const Tensor& rows, const Mask& mask, const Tensor& kept) {
  const int64_t width = rows.size(1);
  auto* to = static_cast<uint16_t*>(kept.mutable_data_ptr());
  at::parallel_for(0, rows.size(0), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    Mask from = mask;
    from.first_row += begin;
    masked_rows(bits(rows) + begin * width, width, end - begin, width, from, to + begin * width);
  });
  return kept;
}

Tensor product(const Tensor& x_, at::TensorList weights_, const Tensor& counts, at::TensorList biases_, const std::optional<Tensor>& low_, at::TensorList up_,
               bool columns, double alpha, const std::optional<Tensor>& seeds, int64_t threshold, int64_t first_column, int64_t full_width) {
  const int64_t groups = static_cast<int64_t>(weights_.size());
  TORCH_CHECK(groups > 0, "weights: wanted one a group, got none");
  const Matrices weights("weights", weights_), up("up", up_);
  const int64_t depth = columns ? weights.rows : weights.columns, width = columns ? weights.columns : weights.rows;
  check_rows("x", x_, depth);
  const std::vector<int64_t> offsets = offsets_of(counts, x_.size(0), groups);
  const Masks masks(seeds, threshold, first_column, full_width, groups);
  TORCH_CHECK(up_.empty() == !low_.has_value() && (up_.empty() || static_cast<int64_t>(up_.size()) == groups), "up: wanted one a group beside low, got ", up_.size());
  TORCH_CHECK(up_.empty() || (columns ? up.columns : up.rows) == width, "up: wanted the output columns of the weights, ", width, ", got ", up.rows, " x ", up.columns);
  if (low_) check_rows("low", *low_, columns ? up.rows : up.columns);
  if (low_) TORCH_CHECK(low_->size(0) == x_.size(0), "low: wanted the rows of x, ", x_.size(0), ", got ", low_->size(0));
  std::vector<Tensor> biases;
  for (const Tensor& bias : biases_) {
    TORCH_CHECK(bias.dim() == 1 && bias.size(0) == width, "biases: wanted [", width, "], got ", bias.sizes());
    biases.push_back(bias.to(at::kFloat).contiguous());
  }
  TORCH_CHECK(biases.empty() || (!columns && static_cast<int64_t>(biases.size()) == groups), "biases: wanted one a group, got ", biases.size());
  const Tensor x = x_.contiguous(), low = low_ ? low_->contiguous() : Tensor();
  Tensor out = at::empty({x.size(0), width}, x.options());
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  const std::vector<Task> tasks = tasks_of(offsets, depth, width);
  run_tasks(static_cast<int64_t>(tasks.size()), [&](const auto& next) {
    std::vector<uint16_t> kept;  // rows of x after dropout: a task's at a time, which stay in the cache
    for (int64_t i = next(); i >= 0; i = next()) {
      const Task& t = tasks[i];
      const int64_t first = offsets[t.group] + t.first, last = std::min(width, t.column + kStrip);
      Factors base = weights.with(x, first, t.group);
      if (masks.threshold && !low_) {
        kept.resize(t.rows * depth);
        masked_rows(base.x, depth, t.rows, depth, masks.of(t.group, t.first), kept.data());
        base.x = kept.data();
      }
      const Factors adapter = low_ ? up.with(low, first, t.group) : Factors{nullptr, 0, nullptr, 0, 0};
      const Output output{to + first * width, width, biases.empty() ? nullptr : biases[t.group].const_data_ptr<float>(), static_cast<float>(alpha)};
      if (columns)
        by_columns(base, adapter, low_ ? masks.of(t.group, t.first) : Mask{}, output, t.rows, t.column, last);
      else
        by_rows(base, adapter, output, t.rows, t.column, last);
    }
  });
  return out;
}

Tensor outer(const Tensor& a_, const Tensor& b_, const Tensor& counts, const std::optional<Tensor>& seeds, int64_t threshold, int64_t first_column,
             int64_t full_width) {
  TORCH_CHECK(a_.dim() == 2 && b_.dim() == 2 && a_.size(0) == b_.size(0), "b: wanted the rows of a, ", a_.sizes(), ", got ", b_.sizes());
  check_rows("a", a_, a_.size(1));
  check_rows("b", b_, b_.size(1));
  const int64_t groups = counts.numel();
  const std::vector<int64_t> offsets = offsets_of(counts, a_.size(0), groups);
  const Masks masks(seeds, threshold, first_column, full_width, groups);
  const Tensor a = a_.contiguous(), b = b_.contiguous();
  Tensor out = at::empty({groups, a.size(1), b.size(1)}, a.options()), kept;  // kept: what the mask leaves of the rows of one group
  for (int64_t g = 0; g < groups; g++) {
    Tensor to = out.select(0, g);
    const int64_t count = offsets[g + 1] - offsets[g];
    if (count == 0) {
      to.zero_();
      continue;
    }
    Tensor rows = b.narrow(0, offsets[g], count);
    if (masks.threshold) {
      if (!kept.defined() || kept.size(0) < count) kept = at::empty({count, b.size(1)}, b.options());
      rows = masked(rows, masks.of(g, 0), kept.narrow(0, 0, count));
    }
    at::mm_out(to, a.narrow(0, offsets[g], count).t(), rows);
  }
  return out;
}

}  // namespace
}  // namespace mswift::grouped

TORCH_LIBRARY_IMPL(mswift, CPU, m) {
  m.impl("grouped_product", mswift::grouped::product);
  m.impl("grouped_outer", mswift::grouped::outer);
}
