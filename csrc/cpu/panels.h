// Products on packed operands: oneDNN's, through torch's brgemm, on panels of 64 columns. bf16 is passed as uint16_t.
//
// A panel of an operand [depth][64] is [depth / pair][64][pair]: rows in pairs for bf16, as its instructions take them, and plain for fp32.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <cstdint>

namespace mswift {

constexpr int64_t kPanel = 64;  // 64 KB for 512 rows of bf16, little of an L2

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// c [m][n] (+)= a [m][k] b [k][n], b packed.
template <class T>
struct Product;
template <>
struct Product<float> {
  static constexpr int64_t pair = 1;  // rows of an operand that are packed together
  static void run(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a, const float* b, float* c) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
  }
  static void release() {}
};
template <>
struct Product<uint16_t> {
  static constexpr int64_t pair = 2;
  static void run(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a, const uint16_t* b, float* c) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a), reinterpret_cast<const at::BFloat16*>(b), c,
                                true);
  }
  static void release() { at::native::cpublas::brgemm_release(true); }
};

/// Parallel over tasks, each of which may call brgemm.
template <class T, class F>
void each(int64_t count, const F& task) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(i);
    Product<T>::release();
  });
}

}  // namespace mswift
