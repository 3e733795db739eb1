/* The C interface of libmswift_cuda.so. Pointers are to device memory, sizes in elements, `stream` is a cudaStream_t.
 * Every function returns 0 or the cudaError_t of its launches (a kernel's own faults show at the next synchronisation, as always in CUDA),
 * or MSWIFT_UNSUPPORTED for sizes that it does not do. dtype: 0 fp32, 1 bf16. Nothing is allocated and nothing is synchronised. */
#ifndef MSWIFT_CUDA_H
#define MSWIFT_CUDA_H
#include <stdint.h>

#define MSWIFT_UNSUPPORTED (-1)
#define MSWIFT_NORM_BLOCKS 256 /* rows of the fp32 workspaces `partial` below, times `cols` */
#define MSWIFT_HEAD_WORKSPACE 66816 /* bytes of workspace for each block of a head's groups */

#ifdef __cplusplus
extern "C" {
#endif

const char* mswift_cuda_error(int code); /* what a returned code means */

/* y = (x + residual) rstd (weight, or 1 + weight); residual and sum may be NULL. rstd: fp32 [rows]. */
int mswift_rms_norm_forward(int dtype, const void* x, const void* residual, const void* weight, void* y, void* sum, float* rstd, int64_t rows, int64_t cols,
                            float eps, int zero_centred, void* stream);
/* dx of the norm plus dsum (may be NULL); dweight fp32 [cols], or NULL. partial: fp32 [MSWIFT_NORM_BLOCKS, cols], needed for dweight. */
int mswift_rms_norm_backward(int dtype, const void* dy, const void* dsum, const void* x, const void* weight, const float* rstd, void* dx, float* partial,
                             float* dweight, int64_t rows, int64_t cols, int zero_centred, void* stream);

/* y = act(a) (b + offset), a = min(gate, limit), b = up within +-limit; act(a) = a sigmoid(slope a (1 + cubic a^2)), which is silu, gelu by tanh
 * and gpt-oss's gate. Rows of gate and up are `stride` apart, those of y are dense. */
int mswift_gated_forward(int dtype, const void* gate, const void* up, void* y, int64_t rows, int64_t cols, int64_t stride, float slope, float cubic,
                         float limit, float offset, void* stream);
int mswift_gated_backward(int dtype, const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t rows, int64_t cols, int64_t stride,
                          float slope, float cubic, float limit, float offset, void* stream);

/* Rotation of the first `rotary` of `dim` elements of every head; x and out may be one (then only those are touched). sign: 1 forward, -1 backward.
 * cos, sin: fp32 [tokens / repeat, rotary / 2]; `repeat` tokens one after another share a row of them (the sequences of a batch). Within a head,
 * elements are dense. */
int mswift_rope(int dtype, const void* x, void* out, const float* cosine, const float* sine, int64_t tokens, int heads, int dim, int rotary, int repeat,
                int64_t token_stride, int64_t head_stride, int64_t out_token_stride, int64_t out_head_stride, int interleaved, int sign, void* stream);

/* out[i] = x[index[i]], zeros where index is negative. */
int mswift_gather_rows(int dtype, const void* x, const int64_t* index, void* out, int64_t rows, int64_t cols, void* stream);
/* y[t] = sum_k weights[t, k] x[index[t, k]] in fp32; weights may be NULL (ones); negative index: nothing. */
int mswift_combine_rows(int dtype, const void* x, const int64_t* index, const float* weights, void* y, int64_t tokens, int k, int64_t cols, void* stream);
/* dx[index[t, k]] = weights[t, k] dy[t]; dweights[t, k] = <dy[t], x[index[t, k]]>. */
int mswift_combine_rows_backward(int dtype, const void* dy, const void* x, const int64_t* index, const float* weights, void* dx, float* dweights, int64_t tokens,
                                 int k, int64_t cols, void* stream);

/* out = x where the mask of csrc/common/dropout.h keeps it, times 256 / (256 - threshold) unless `unscaled`; 0 elsewhere. x, out: dense [rows, cols]. */
typedef struct {
  uint64_t seed;
  int64_t first_row;
  uint32_t first_column, full_width, threshold, unscaled;
} mswift_dropout;
int mswift_drop(int dtype, const void* x, void* out, int64_t rows, int64_t cols, const mswift_dropout* mask, void* stream);

/* out[c] = sum_r a[r, c] b[r, c] (b may be NULL: ones), fp32; rows are `stride` apart; partial as above. */
int mswift_column_sum(int dtype, const void* a, const void* b, float* partial, float* out, int64_t rows, int64_t cols, int64_t stride, void* stream);

/* --- products, bf16 with fp32 sums ---
 * A dropout mask: threshold 0 means none. Row i, column j here are first_row + i, first_column + j of the whole
 * activation; columns at or beyond full_width are zeros. */

/* out[i, n] = alpha column_scale[n] (base + mask adapter)[i, n] + bias[n]
 *   base = x weight^T, or x weight if `columns`;  adapter = low up^T, or low up if `columns` (low: [rows, rank]);  mask = 1 without dropout.
 *   weight [n, k] ([k, n] if columns); up [n, rank] ([rank, n] if columns). weight, low, bias, column_scale may be NULL.
 * Rows are those of `groups` groups one after another: offsets int64 [groups + 1] on the device, NULL for one group; the weight of group g
 * starts g * weight_stride elements behind the first, up and bias likewise (a stride of 0 shares it). Those that lie apart in memory:
 * weight_table, up_table, bias_table [groups] on the device, where each group's starts (bf16 only), in the place of the pointer.
 * weight_kind 0: bf16. 1: int8 with weight_scales fp32, one a row. 2: nf4, two codes a byte, weight_scales one for weight_block elements;
 *   quantised weights are [n, k] ([k, n] if columns) with k (n) a multiple of 8, and group strides count elements too.
 * group_seeds: int64 [groups], a dropout seed for each group, whose mask then counts rows from the group's first; NULL: the masks' own seeds.
 * bias_dtype: 0 fp32, 1 bf16.
 * inner (NULL: not wanted), bf16: alpha (base + mask adapter), without column_scale and bias. out: bf16.
 * x_dropout, x_column_scale [k]: done to x while it is read.   thin: the tile for n of at most 64. */
typedef struct {
  const void *x, *weight, *low, *up, *bias;
  const float *weight_scales, *column_scale, *x_column_scale;
  const int64_t *offsets, *group_seeds;
  const uint64_t *weight_table, *up_table, *bias_table;
  void *out, *inner;
  int64_t rows, n, k, rank, x_stride, weight_stride, up_stride, bias_stride, groups;
  mswift_dropout x_dropout, adapter_dropout;
  float alpha;
  int weight_kind, weight_block, bias_dtype, columns, thin;
} mswift_linear_args;
int mswift_linear(const mswift_linear_args* args, void* stream);

/* out[g] = alpha a_g^T b_g over the rows of group g: a [rows, m], b [rows, n] -> [groups, m, n]; the gradient of a weight.
 * splits > 1: that many parts of each group's rows, summed in order from partial, fp32 [splits, groups, m, n].
 * out_dtype 0 fp32, 1 bf16; accumulate (fp32 only): out += ... */
typedef struct {
  const void *a, *b;
  const int64_t *offsets, *group_seeds;
  void* out;
  float* partial;
  int64_t rows, m, n, a_stride, b_stride, groups;
  mswift_dropout b_dropout;
  const float* a_column_scale;
  float alpha;
  int splits, out_dtype, accumulate;
} mswift_outer_args;
int mswift_outer(const mswift_outer_args* args, void* stream);

/* --- a vocabulary's head: logits z = softcap tanh(scale (x weight^T + bias) / softcap), never stored as a whole ---
 * Rows `first`, `first` + 1, ... of the vocabulary are here; rows from `size` on are padding. labels are rows of the whole vocabulary; one
 * that is not here is another rank's. softcap 0: none. bf16; bias fp32, may be NULL. without_label: sums and gradients leave the label's logit out
 * (it is still told), so that nothing has to be subtracted from a sum that it dominates; of_label is then not used. */
typedef struct {
  const void *x, *weight, *bias;
  const int64_t* labels;
  int64_t tokens, hidden, vocab, first, size;
  float scale, softcap;
  int without_label;
} mswift_head;

/* Statistics of the logits that are here: fp32 [5, tokens]: maximum m, sum of exp(z - m), logit of the label (0 if not here),
 * sum of exp(z - m) (z - m), sum of z. partial: fp32 [splits, 5, tokens]; splits: how many blocks share the vocabulary. */
int mswift_head_statistics(const mswift_head* head, float* stats, float* partial, int splits, void* stream);
/* The statistics of several parts (ranks of a group, gathered: fp32 [parts, 5, tokens]) as those of all. */
int mswift_head_merge(const float* parts, float* stats, int64_t count, int64_t tokens, void* stream);
/* Statistics, and sum_v exp(z - maximum) dz/dproduct weight[v] in acc fp32 [tokens, hidden], in one sweep over the vocabulary by groups of blocks that
 * run at once; splits > 1: as many groups share the vocabulary for the same tokens. Workspaces: partial fp32 [splits * mswift_head_group, 5, tokens],
 * acc_parts fp32 [splits, tokens, hidden] if splits > 1, workspace of groups * mswift_head_group * MSWIFT_HEAD_WORKSPACE bytes.
 * groups: 1 to mswift_head_groups. */
int mswift_head_sweep(const mswift_head* head, float* stats, float* acc, float* partial, float* acc_parts, int splits, void* workspace, int groups,
                      void* stream);
/* With dz = (of_label [label] + p (of_prob + of_entropy (z - lse)) + of_uniform) dz/dproduct, p = exp(z - lse), coefficients fp32 [4, tokens]
 * in this order: dx_acc fp32 [tokens, hidden] (may be NULL; splits and acc_parts as above) = dz weight; dweight [vocab, hidden] (may be NULL),
 * fp32 or bf16, = dz^T x; with it dbias fp32 [vocab] (may be NULL). */
int mswift_head_gradient(const mswift_head* head, const float* lse, const float* coefficients, float* dx_acc, float* acc_parts, int splits,
                         void* dweight, int dweight_dtype, int accumulate, float* dbias, void* workspace, int groups, void* stream);
/* How many blocks are a group for this hidden size on the current device, and how many groups it holds at once (0: none). */
int mswift_head_group(int64_t hidden);
int mswift_head_groups(int64_t hidden);

/* The same by single blocks that keep a whole row's gradient, where the current device has room for it: whether it has (1 or 0). */
int mswift_head_on_chip(int64_t hidden);
/* Statistics, and sum_v exp(z - maximum) dz/dproduct weight[v] in acc fp32 [tokens, hidden]. With splits > 1 as many blocks share the vocabulary
 * for the same tokens, and need partial fp32 [splits, 5, tokens] and acc_parts fp32 [splits, tokens, hidden]. */
int mswift_head_sweep_on_chip(const mswift_head* head, float* stats, float* acc, float* partial, float* acc_parts, int splits, void* stream);
/* As mswift_head_gradient: dx_acc (may be NULL; splits and acc_parts as above), dweight (may be NULL) and with it dbias (may be NULL). */
int mswift_head_gradient_on_chip(const mswift_head* head, const float* lse, const float* coefficients, float* dx_acc, float* acc_parts, int splits,
                                 void* dweight, int dweight_dtype, int accumulate, float* dbias, void* stream);

#ifdef __cplusplus
}
#endif
#endif
