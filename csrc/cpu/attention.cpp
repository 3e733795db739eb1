// Causal attention over rows of tokens, forward and backward, without a matrix of scores or of masks: tiles of 64 x 64 whose products are
// torch's brgemm (oneDNN: AMX, avx512_bf16 or fp32). Deterministic: whichever thread does a task, its sums are in one order.
#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/attention_tiles.h"
#include "cpu/tasks.h"

namespace mswift::attention {

using at::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Tokens [first, first + length) of every batch row see each other and nothing else.
struct Segment {
  int64_t first, length, tiles;
};

static int64_t heads_of(const Tensor& q) { return q.dim() == 5 ? q.size(2) * q.size(3) : q.size(2); }

// q [s, b, heads, d] or [s, b, groups, heads of each, d], k [s, b, groups, d], v [s, b, groups, dv]: the last dim is contiguous, the others have
// any stride.
struct Problem {
  int64_t tokens, batch, heads, groups, d, dv, window;
  float scale;
  std::vector<Segment> segments;

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bounds, double scale, int64_t window, int64_t chunk)
      : tokens(q.size(0)), batch(q.size(1)), heads(heads_of(q)), groups(k.size(2)), d(q.size(-1)), dv(v.size(3)),
        window(window > 0 ? window : std::numeric_limits<int32_t>::max()), scale(static_cast<float>(scale)) {
    const Tensor ends = bounds.to(at::kLong).contiguous();
    const int64_t* end = ends.const_data_ptr<int64_t>();
    TORCH_CHECK(end[0] == 0 && end[ends.numel() - 1] == tokens, "causal_attention: bounds must rise from 0 to the number of tokens, ", tokens, ", got ", end[0],
                " to ", end[ends.numel() - 1]);
    for (int64_t i = 0; i + 1 < ends.numel(); i++) {
      TORCH_CHECK(end[i] <= end[i + 1], "causal_attention: bounds must rise from 0 to the number of tokens, ", tokens);
      const int64_t step = chunk > 0 ? chunk : std::max<int64_t>(1, end[i + 1] - end[i]);
      for (int64_t first = end[i]; first < end[i + 1]; first += step) {
        const int64_t length = std::min(step, end[i + 1] - first);
        segments.push_back({first, length, (length + kTile - 1) / kTile});
      }
    }
  }
};

template <class T>
struct Rows {  // one head of one batch row: tokens x columns
  T* data;
  int64_t stride;
  T* at(int64_t token) const { return data + token * stride; }
};

template <class T>
Rows<T> head_of(const Tensor& x, int64_t row, int64_t head) {
  T* data = static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
  const int64_t at = x.dim() == 5 ? head / x.size(3) * x.stride(2) + head % x.size(3) * x.stride(3) : head * x.stride(2);
  return {data + row * x.stride(1) + at, x.stride(0)};
}

template <class T>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t stride_a, const T* b, int64_t stride_b, float* c, int64_t stride_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, stride_a, stride_b, stride_c, add, a, b, c, /*is_vnni=*/sizeof(T) == 2);
}

// What a left factor needs to be whole: the tile itself, or a copy with zeros behind the end of its row of tokens.
template <class T>
Rows<const T> whole_tile(Rows<const T> from, int64_t token, int rows, int64_t columns, std::vector<T>& spare) {
  if (rows == kTile) return {from.at(token), from.stride};
  spare.assign(kTile * columns, T(0.0f));
  for (int r = 0; r < rows; r++) std::copy_n(from.at(token + r), columns, spare.data() + r * columns);
  return {spare.data(), columns};
}

int rows_in(const Segment& segment, int64_t tile) { return static_cast<int>(std::min<int64_t>(kTile, segment.length - tile * kTile)); }

int cut(int64_t x, int limit) { return static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(x, limit))); }

// First tile of keys that some query of tile `q` sees.
int64_t first_tile(const Problem& p, int64_t q) { return std::max<int64_t>(0, q * kTile - p.window + 1) / kTile; }

// ---- forward ----

template <class T>
struct Forward {
  const Problem& p;
  const Tensor &q, &k, &v, &sinks;
  Tensor out, lse;
  Tensor packed_k, packed_v;  // [groups, tiles of all rows, tile]
  std::vector<int64_t> tile_base;  // of each (segment, batch row)

  int64_t total_tiles = 0;

  void pack() {
    for (const Segment& s : p.segments)
      for (int64_t row = 0; row < p.batch; row++) {
        tile_base.push_back(total_tiles);
        total_tiles += s.tiles;
      }
    packed_k = at::empty({p.groups, total_tiles, p.d * kTile}, k.options());
    packed_v = at::empty({p.groups, total_tiles, p.dv * kTile}, v.options());
    const int64_t pieces = static_cast<int64_t>(tile_base.size());
    at::parallel_for(0, pieces * p.groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t piece = i / p.groups, group = i % p.groups, row = piece % p.batch;
        const Segment& s = p.segments[piece / p.batch];
        const auto keys = head_of<const T>(k, row, group), values = head_of<const T>(v, row, group);
        for (int64_t tile = 0; tile < s.tiles; tile++) {
          const int64_t token = s.first + tile * kTile, at = group * total_tiles + tile_base[piece] + tile;
          pack_right_transposed(keys.at(token), keys.stride, rows_in(s, tile), p.d, packed_k.mutable_data_ptr<T>() + at * p.d * kTile);
          pack_right(values.at(token), values.stride, rows_in(s, tile), p.dv, packed_v.mutable_data_ptr<T>() + at * p.dv * kTile);
        }
      }
    });
  }

  struct Scratch {
    std::vector<float> scores, output;
    std::vector<T> weights, query;
    explicit Scratch(int64_t dv) : scores(kTile * kWide), output(kTile * dv), weights(kTile * kWide) {}
  };

  void query_tile(int64_t piece, int64_t head, int64_t tile, Scratch& scratch) {
    const int64_t row = piece % p.batch, group = head / (p.heads / p.groups);
    const Segment& s = p.segments[piece / p.batch];
    const int64_t token = s.first + tile * kTile;
    const int rows = rows_in(s, tile);
    const auto query = whole_tile(head_of<const T>(q, row, head), token, rows, p.d, scratch.query);
    const T* keys = packed_k.const_data_ptr<T>() + (group * total_tiles + tile_base[piece]) * p.d * kTile;
    const T* values = packed_v.const_data_ptr<T>() + (group * total_tiles + tile_base[piece]) * p.dv * kTile;
    Running running;
    const float sink = sinks.defined() ? sinks.const_data_ptr<float>()[head] : -kInfinity;
    for (int r = 0; r < kTile; r++) running.peak[r] = sink, running.sum[r] = sinks.defined() ? 1.0f : 0.0f;
    Seen seen[kTile];
    bool started = false;
    for (int64_t from = first_tile(p, tile); from <= tile; from += kWide / kTile) {
      const int64_t until = std::min<int64_t>(tile + 1, from + kWide / kTile);
      const int columns = static_cast<int>(until - from) * kTile;
      for (int64_t t = from; t < until; t++)
        product(kTile, kTile, p.d, query.data, query.stride, keys + t * p.d * kTile, kTile, scratch.scores.data() + (t - from) * kTile, kWide, false);
      for (int r = 0; r < kTile; r++) {
        const int64_t at = tile * kTile + r;  // place of the query in its row of tokens
        seen[r] = {cut(at - p.window + 1 - from * kTile, columns), cut(std::min(at + 1, s.length) - from * kTile, columns)};
      }
      weights_tile(scratch.scores.data(), columns, p.scale, seen, running, scratch.weights.data());
      if (started) rescale_rows(scratch.output.data(), running.rescale, p.dv);
      product(kTile, p.dv, columns, scratch.weights.data(), kWide, values + from * p.dv * kTile, p.dv, scratch.output.data(), p.dv, started);
      started = true;
    }
    const auto result = head_of<T>(out, row, head);
    float* log_sums = lse.mutable_data_ptr<float>() + (row * p.heads + head) * p.tokens + token;
    for (int r = 0; r < rows; r++) {
      finish_row(scratch.output.data() + r * p.dv, 1.0f / running.sum[r], p.dv, result.at(token + r));
      log_sums[r] = running.peak[r] + std::log(running.sum[r]);
    }
  }

  void run() {
    pack();
    struct Task {
      int64_t piece, head, tile;
    };
    std::vector<Task> tasks;
    for (int64_t piece = 0; piece < static_cast<int64_t>(tile_base.size()); piece++)
      for (int64_t head = 0; head < p.heads; head++)
        for (int64_t tile = p.segments[piece / p.batch].tiles - 1; tile >= 0; tile--) tasks.push_back({piece, head, tile});
    run_tasks(static_cast<int64_t>(tasks.size()), [&](const auto& next) {
      Scratch scratch(p.dv);
      for (int64_t i; (i = next()) >= 0;) query_tile(tasks[i].piece, tasks[i].head, tasks[i].tile, scratch);
      at::native::cpublas::brgemm_release(sizeof(T) == 2);
    });
  }
};

// ---- backward ----

template <class T>
struct Backward {
  const Problem& p;
  const Tensor &grad, &q, &k, &v, &out, &lse;
  Tensor dq, dk, dv;
  Tensor dk_of_head, dv_of_head;  // fp32 parts of each query head, where heads of a group are tasks of their own

  struct Scratch {
    std::vector<T> q_right, q_right_t, grad_right, grad_right_t;  // of each tile of queries of a head
    std::vector<float> dq_t, lse, delta;
    std::vector<T> keys, values, keys_t, weights, slopes, slopes_right;
    std::vector<float> scores, d_weights, d_keys, d_values;

    Scratch(const Problem& p)
        : keys_t(kTile * p.d), weights(kTile * kTile), slopes(kTile * kTile), slopes_right(kTile * kTile), scores(kTile * kTile),
          d_weights(kTile * kTile), d_keys(kTile * p.d), d_values(kTile * p.dv) {}

    void reserve(const Problem& p, int64_t tiles) {
      for (auto* part : {&q_right, &q_right_t}) part->resize(tiles * kTile * p.d);
      for (auto* part : {&grad_right, &grad_right_t}) part->resize(tiles * kTile * p.dv);
      dq_t.assign(tiles * kTile * p.d, 0.0f);
      lse.assign(tiles * kTile, kInfinity);
      delta.assign(tiles * kTile, 0.0f);
    }
  };

  // Heads [first, last) of one group over one row of tokens.
  void heads_of_row(int64_t piece, int64_t first, int64_t last, Scratch& x) {
    const Segment& s = p.segments[piece / p.batch];
    const int64_t row = piece % p.batch, count = last - first;
    x.reserve(p, s.tiles * count);
    for (int64_t i = 0; i < count; i++) pack_queries(s, row, first + i, i * s.tiles, x);
    for (int64_t tile = 0; tile < s.tiles; tile++) key_tile(s, row, first, count, tile, x);
    for (int64_t i = 0; i < count; i++) {
      const auto target = head_of<T>(dq, row, first + i);
      for (int64_t tile = 0; tile < s.tiles; tile++)
        finish_transposed(
            x.dq_t.data() + (i * s.tiles + tile) * kTile * p.d, rows_in(s, tile), p.d, target.stride, target.at(s.first + tile * kTile));
    }
  }

  void pack_queries(const Segment& s, int64_t row, int64_t head, int64_t base, Scratch& x) {
    const auto query = head_of<const T>(q, row, head), output = head_of<const T>(out, row, head), d_out = head_of<const T>(grad, row, head);
    const float* log_sums = lse.const_data_ptr<float>() + (row * p.heads + head) * p.tokens + s.first;
    for (int64_t tile = 0; tile < s.tiles; tile++) {
      const int64_t token = s.first + tile * kTile, at = (base + tile) * kTile;
      const int rows = rows_in(s, tile);
      pack_right(query.at(token), query.stride, rows, p.d, x.q_right.data() + at * p.d);
      pack_right_transposed(query.at(token), query.stride, rows, p.d, x.q_right_t.data() + at * p.d);
      pack_right(d_out.at(token), d_out.stride, rows, p.dv, x.grad_right.data() + at * p.dv);
      pack_right_transposed(d_out.at(token), d_out.stride, rows, p.dv, x.grad_right_t.data() + at * p.dv);
      for (int r = 0; r < rows; r++) {
        x.lse[at + r] = log_sums[tile * kTile + r];
        x.delta[at + r] = dot(d_out.at(token + r), output.at(token + r), p.dv);
      }
    }
  }

  void key_tile(const Segment& s, int64_t row, int64_t first, int64_t count, int64_t tile, Scratch& x) {
    const int64_t group = first / (p.heads / p.groups), token = s.first + tile * kTile;
    const int rows = rows_in(s, tile);
    const auto all_keys = head_of<const T>(k, row, group);
    const auto keys = whole_tile(all_keys, token, rows, p.d, x.keys);
    const auto values = whole_tile(head_of<const T>(v, row, group), token, rows, p.dv, x.values);
    pack_left_transposed(all_keys.at(token), all_keys.stride, rows, p.d, x.keys_t.data());
    bool started = false;
    const int64_t reach = tile * kTile + rows - 1 + p.window;  // the first query that sees no key of this tile any more
    Seen seen[kTile];
    for (int64_t i = 0; i < count; i++)
      for (int64_t t = tile; t < s.tiles && t * kTile < reach; t++) {
        const int64_t at = (i * s.tiles + t) * kTile;
        for (int r = 0; r < kTile; r++) {
          const int64_t own = (tile - t) * kTile + r;  // the query at the key's own place, in this tile's columns
          seen[r] = {cut(own, kTile), cut(own + p.window, kTile)};
        }
        product(kTile, kTile, p.d, keys.data, keys.stride, x.q_right_t.data() + at * p.d, kTile, x.scores.data(), kTile, false);
        product(kTile, kTile, p.dv, values.data, values.stride, x.grad_right_t.data() + at * p.dv, kTile, x.d_weights.data(), kTile, false);
        backward_tile(
            x.scores.data(), x.d_weights.data(), p.scale, x.lse.data() + at, x.delta.data() + at, seen, x.weights.data(), x.slopes.data(),
            x.slopes_right.data());
        const T* right = sizeof(T) == 2 ? x.slopes_right.data() : x.slopes.data();
        product(kTile, p.dv, kTile, x.weights.data(), kTile, x.grad_right.data() + at * p.dv, p.dv, x.d_values.data(), p.dv, started);
        product(kTile, p.d, kTile, x.slopes.data(), kTile, x.q_right.data() + at * p.d, p.d, x.d_keys.data(), p.d, started);
        product(p.d, kTile, kTile, x.keys_t.data(), kTile, right, kTile, x.dq_t.data() + at * p.d, kTile, true);
        started = true;
      }
    write_keys(row, first, group, token, rows, x);
  }

  void write_keys(int64_t row, int64_t head, int64_t group, int64_t token, int rows, const Scratch& x) {
    for (int r = 0; r < rows; r++) {
      const float *d_key = x.d_keys.data() + r * p.d, *d_value = x.d_values.data() + r * p.dv;
      if (dk_of_head.defined()) {
        finish_row(d_key, 1.0f, p.d, head_of<float>(dk_of_head, row, head).at(token + r));
        finish_row(d_value, 1.0f, p.dv, head_of<float>(dv_of_head, row, head).at(token + r));
      } else {
        finish_row(d_key, 1.0f, p.d, head_of<T>(dk, row, group).at(token + r));
        finish_row(d_value, 1.0f, p.dv, head_of<T>(dv, row, group).at(token + r));
      }
    }
  }

  void run() {
    const int64_t pieces = static_cast<int64_t>(p.segments.size()) * p.batch, per_group = p.heads / p.groups;
    // too few groups to keep the threads busy: every head by itself, if its parts of the keys' gradients are not too large
    const bool split = per_group > 1 && pieces * p.groups < 4 * at::get_num_threads() && pieces * p.groups % at::get_num_threads() != 0 &&
                       p.tokens * p.batch * p.heads * (p.d + p.dv) < (int64_t{1} << 26);
    if (split) {
      dk_of_head = at::empty({p.tokens, p.batch, p.heads, p.d}, q.options().dtype(at::kFloat));
      dv_of_head = at::empty({p.tokens, p.batch, p.heads, p.dv}, q.options().dtype(at::kFloat));
    }
    const int64_t count = split ? 1 : per_group, units = p.heads / count;
    run_tasks(pieces * units, [&](const auto& next) {
      Scratch scratch(p);
      for (int64_t i; (i = next()) >= 0;) heads_of_row(i / units, i % units * count, (i % units + 1) * count, scratch);
      at::native::cpublas::brgemm_release(sizeof(T) == 2);
    });
    if (split) {
      dk.copy_(dk_of_head.view({p.tokens, p.batch, p.groups, per_group, p.d}).sum(3));
      dv.copy_(dv_of_head.view({p.tokens, p.batch, p.groups, per_group, p.dv}).sum(3));
    }
  }
};

static Tensor with_plain_rows(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

static void check(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bounds, const std::optional<Tensor>& sinks, double scale, int64_t window, int64_t chunk) {
  TORCH_CHECK((q.dim() == 4 || q.dim() == 5) && k.dim() == 4 && v.dim() == 4, "causal_attention: q, k and v must be [s, b, heads or groups, columns]");
  TORCH_CHECK(q.dim() == 4 || q.size(2) == k.size(2), "causal_attention: q of five dimensions must be [s, b, groups, heads of each, columns]");
  TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16, "causal_attention: q must be float32 or bfloat16, got ", q.scalar_type());
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "causal_attention: k and v must have the dtype of q");
  TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == q.size(1) && v.size(1) == q.size(1), "causal_attention: k and v must have the tokens of q");
  TORCH_CHECK(k.size(2) == v.size(2) && k.size(2) > 0 && heads_of(q) % k.size(2) == 0, "causal_attention: heads must be a multiple of groups");
  TORCH_CHECK(k.size(3) == q.size(-1) && q.size(-1) % 16 == 0 && v.size(3) % 16 == 0, "causal_attention: the width of a head must be a multiple of 16");
  TORCH_CHECK(bounds.dim() == 1 && bounds.numel() >= 1, "causal_attention: bounds must be [rows + 1]");
  TORCH_CHECK(scale > 0, "causal_attention: scale must be above 0, got ", scale);
  TORCH_CHECK(window >= 0 && chunk >= 0, "causal_attention: window and chunk must be above 0, or 0 for none, got ", window, " and ", chunk);
  TORCH_CHECK(!sinks || (sinks->numel() == heads_of(q) && sinks->scalar_type() == at::kFloat), "causal_attention: sinks must be float32 [heads]");
}

static std::tuple<Tensor, Tensor> forward(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& bounds, const std::optional<Tensor>& sinks_, double scale, int64_t window,
    int64_t chunk) {
  check(q_, k_, v_, bounds, sinks_, scale, window, chunk);
  const Tensor q = with_plain_rows(q_), k = with_plain_rows(k_), v = with_plain_rows(v_), sinks = sinks_ ? sinks_->contiguous() : Tensor();
  const Problem p(q, k, v, bounds, scale, window, chunk);
  Tensor out = at::empty({p.tokens, p.batch, p.heads, p.dv}, q.options()), lse = at::empty({p.batch, p.heads, p.tokens}, q.options().dtype(at::kFloat));
  if (q.scalar_type() == at::kFloat)
    Forward<float>{p, q, k, v, sinks, out, lse, {}, {}, {}}.run();
  else
    Forward<at::BFloat16>{p, q, k, v, sinks, out, lse, {}, {}, {}}.run();
  return {out, lse};
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& out_, const Tensor& lse_, const Tensor& bounds, double scale,
    int64_t window, int64_t chunk) {
  check(q_, k_, v_, bounds, std::nullopt, scale, window, chunk);
  const std::vector<int64_t> shape{q_.size(0), q_.size(1), heads_of(q_), v_.size(3)}, by_head{q_.size(1), heads_of(q_), q_.size(0)};
  TORCH_CHECK(out_.sizes() == shape && out_.scalar_type() == q_.scalar_type(), "causal_attention_backward: out must be ", at::IntArrayRef(shape), " in the dtype of q, got ", out_.sizes());
  TORCH_CHECK(grad_.sizes() == shape && grad_.scalar_type() == q_.scalar_type(), "causal_attention_backward: grad must be as out, ", at::IntArrayRef(shape), ", got ", grad_.sizes());
  TORCH_CHECK(lse_.sizes() == by_head && lse_.scalar_type() == at::kFloat, "causal_attention_backward: lse must be float32 ", at::IntArrayRef(by_head), ", got ", lse_.sizes());
  const Tensor grad = with_plain_rows(grad_), out = with_plain_rows(out_), lse = lse_.contiguous(), q = with_plain_rows(q_), k = with_plain_rows(k_), v = with_plain_rows(v_);
  const Problem p(q, k, v, bounds, scale, window, chunk);
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  if (q.scalar_type() == at::kFloat)
    Backward<float>{p, grad, q, k, v, out, lse, dq, dk, dv, {}, {}}.run();
  else
    Backward<at::BFloat16>{p, grad, q, k, v, out, lse, dq, dk, dv, {}, {}}.run();
  return {dq, dk, dv};
}

}  // namespace mswift::attention

TORCH_LIBRARY_IMPL(mswift, CPU, m) {
  m.impl("causal_attention", mswift::attention::forward);
  m.impl("causal_attention_backward", mswift::attention::backward);
}
