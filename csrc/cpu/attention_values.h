// The part of attention_tiles.cpp that depends on the type of values, MSWIFT_VALUE; included there for each of them.

void weights_tile(const float* scores, int columns, float scale, const Seen* seen, Running& running, MSWIFT_VALUE* p) {
  for (int r = 0; r < kTile; r++) {
    const float* row = scores + r * kWide;
    MSWIFT_VALUE* to = p + r * kWide;
    const int first = seen[r].first, last = seen[r].last;
    const int begin = first & ~15, end = (last + 15) & ~15;
    if (first >= last) {
      running.rescale[r] = 1.0f;
      for (int c = 0; c < columns; c += 16) store(to + c, _mm512_setzero_ps());
      continue;
    }
    const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
    __m512 best = nothing;
    for (int c = begin; c < end; c += 16) best = _mm512_mask_max_ps(best, lanes(first - c, last - c), best, _mm512_loadu_ps(row + c));
    const float before = running.peak[r];
    const float here = _mm512_reduce_max_ps(best) * scale, peak = here > before ? here : before;
    const float rescale = before == peak ? 1.0f : __builtin_expf(before - peak);
    const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(-peak);
    __m512 sum = _mm512_setzero_ps();
    for (int c = 0; c < begin; c += 16) store(to + c, _mm512_setzero_ps());
    for (int c = begin; c < end; c += 16) {
      const __m512 e = _mm512_maskz_mov_ps(lanes(first - c, last - c), exp512(_mm512_fmadd_ps(_mm512_loadu_ps(row + c), factor, shift)));
      sum = _mm512_add_ps(sum, e);
      store(to + c, e);
    }
    for (int c = end; c < columns; c += 16) store(to + c, _mm512_setzero_ps());
    running.peak[r] = peak;
    running.rescale[r] = rescale;
    running.sum[r] = running.sum[r] * rescale + _mm512_reduce_add_ps(sum);
  }
}

void finish_row(const float* output, float factor, int columns, MSWIFT_VALUE* to) {
  for (int c = 0; c < columns; c += 16) store(to + c, _mm512_mul_ps(_mm512_loadu_ps(output + c), _mm512_set1_ps(factor)));
}

void backward_tile(
    const float* scores, const float* d_weights, float scale, const float* lse, const float* delta, const Seen* seen, MSWIFT_VALUE* p,
    MSWIFT_VALUE* ds, MSWIFT_VALUE* ds_right) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int r = 0; r < kTile; r += 2)
    for (int c = 0; c < kTile; c += 16) {
      const __m512 log_sum = _mm512_loadu_ps(lse + c), mean = _mm512_loadu_ps(delta + c);
      __m512 slopes[2];
      for (int i = 0; i < 2; i++) {
        const int at = (r + i) * kTile + c;
        const __mmask16 live = lanes(seen[r + i].first - c, seen[r + i].last - c);
        const __m512 weight = _mm512_maskz_mov_ps(live, exp512(_mm512_fmsub_ps(_mm512_loadu_ps(scores + at), factor, log_sum)));
        slopes[i] = _mm512_mul_ps(_mm512_mul_ps(weight, factor), _mm512_sub_ps(_mm512_loadu_ps(d_weights + at), mean));
        store(p + at, weight);
        store(ds + at, slopes[i]);
      }
      store_right(ds_right, r, c, slopes[0], slopes[1]);
    }
}

float dot(const MSWIFT_VALUE* a, const MSWIFT_VALUE* b, int columns) {
  __m512 sum = _mm512_setzero_ps();
  for (int c = 0; c < columns; c += 16) sum = _mm512_fmadd_ps(load(a + c), load(b + c), sum);
  return _mm512_reduce_add_ps(sum);
}

void finish_transposed(const float* from, int rows, int columns, int64_t stride, MSWIFT_VALUE* to) {
  for (int c = 0; c < columns; c += 16)
    for (int r = 0; r < rows; r += 16) {
      __m512i v[16];
      for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(from + (c + i) * kTile + r);
      transpose16(v);
      for (int i = 0; i < 16 && r + i < rows; i++) store(to + (r + i) * stride + c, _mm512_castsi512_ps(v[i]));
    }
}
