// Element-wise work on one row, for the type of values MSWIFT_VALUE (float, or uint16_t for the bits of bf16): included by elementwise.cpp once for
// each type and instruction set, and left to the compiler to vectorise. All arithmetic is fp32, rounded once where it is stored.

static void rms_norm_row(const MSWIFT_VALUE* __restrict x, const float* __restrict weight, int64_t n, float eps, MSWIFT_VALUE* __restrict y, float* rstd) {
  float squares[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int i = 0; i < kLanes; i++) squares[i] += wide(x[c + i]) * wide(x[c + i]);
  float sum = sum_of_lanes(squares);
  for (; c < n; c++) sum += wide(x[c]) * wide(x[c]);
  const float r = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
  *rstd = r;
  for (c = 0; c < n; c++) put(y + c, wide(x[c]) * r * weight[c]);
}

static void rms_norm_backward_row(
    const MSWIFT_VALUE* __restrict grad, const MSWIFT_VALUE* __restrict x, const float* __restrict weight, int64_t n, float rstd,
    MSWIFT_VALUE* __restrict dx) {
  float products[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int i = 0; i < kLanes; i++) products[i] += wide(grad[c + i]) * weight[c + i] * wide(x[c + i]);
  float sum = sum_of_lanes(products);
  for (; c < n; c++) sum += wide(grad[c]) * weight[c] * wide(x[c]);
  const float pull = sum * rstd * rstd * rstd / static_cast<float>(n);
  for (c = 0; c < n; c++) put(dx + c, wide(grad[c]) * weight[c] * rstd - wide(x[c]) * pull);
}

static void gate_row(const MSWIFT_VALUE* __restrict gate, const MSWIFT_VALUE* __restrict up, int64_t n, Gate g, MSWIFT_VALUE* __restrict y) {
  for (int64_t c = 0; c < n; c++) {
    const float a = least(wide(gate[c]), g.limit), b = least(most(wide(up[c]), -g.limit), g.limit);
    put(y + c, a * sigmoid(a * g.slope * (1.0f + g.cubic * a * a)) * (b + g.offset));
  }
}

static void gate_backward_row(
    const MSWIFT_VALUE* __restrict grad, const MSWIFT_VALUE* __restrict gate, const MSWIFT_VALUE* __restrict up, int64_t n, Gate g,
    MSWIFT_VALUE* __restrict d_gate, MSWIFT_VALUE* __restrict d_up) {
  for (int64_t c = 0; c < n; c++) {
    const float raw_a = wide(gate[c]), raw_b = wide(up[c]), pull = wide(grad[c]);
    const float a = least(raw_a, g.limit), b = least(most(raw_b, -g.limit), g.limit);
    const float s = sigmoid(a * g.slope * (1.0f + g.cubic * a * a));
    const float slope = s + a * s * (1.0f - s) * g.slope * (1.0f + 3.0f * g.cubic * a * a);
    put(d_gate + c, raw_a <= g.limit ? pull * (b + g.offset) * slope : 0.0f);
    put(d_up + c, raw_b >= -g.limit && raw_b <= g.limit ? pull * a * s : 0.0f);
  }
}

// Columns [0, 2 * half) of one head are turned, those from there to `n` copied; `sign` -1 turns back.
static void rotate_row(
    const MSWIFT_VALUE* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t half, int64_t n, bool interleaved, float sign,
    MSWIFT_VALUE* __restrict y) {
  if (interleaved) {
    for (int64_t c = 0; c < half; c++) {
      const float a = wide(x[2 * c]), b = wide(x[2 * c + 1]), turn = sign * sin[c];
      put(y + 2 * c, a * cos[c] - b * turn);
      put(y + 2 * c + 1, b * cos[c] + a * turn);
    }
  } else {
    for (int64_t c = 0; c < half; c++) {
      const float a = wide(x[c]), b = wide(x[half + c]), turn = sign * sin[c];
      put(y + c, a * cos[c] - b * turn);
      put(y + half + c, b * cos[c] + a * turn);
    }
  }
  for (int64_t c = 2 * half; c < n; c++) y[c] = x[c];
}
