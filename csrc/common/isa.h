// Which instructions a kernel may use. Sources are compiled for plain x86-64; code for more lies between MSWIFT_TARGET_x and MSWIFT_TARGET_END
// and is called only after `isa()` has said so. Inside such a region: plain functions on pointers, no templates of the standard library or of
// torch, whose instances would be shared with code that runs on every processor.
#pragma once

namespace mswift {

enum class Isa { none, avx2, avx512, avx512_bf16, amx };

/// The best instruction set of this processor; MSWIFT_ISA in the environment lowers it (none, avx2, avx512, avx512_bf16, amx).
Isa isa();
const char* name_of(Isa isa);
inline bool at_least(Isa wanted) { return isa() >= wanted; }

}  // namespace mswift

#define MSWIFT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MSWIFT_TARGET(features) MSWIFT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MSWIFT_TARGET_END MSWIFT_PRAGMA(clang attribute pop)
#else
#define MSWIFT_TARGET(features) MSWIFT_PRAGMA(GCC push_options) MSWIFT_PRAGMA(GCC target(features))
#define MSWIFT_TARGET_END MSWIFT_PRAGMA(GCC pop_options)
#endif
#define MSWIFT_TARGET_AVX2 MSWIFT_TARGET("avx2,fma,f16c,bmi,bmi2,popcnt")
#define MSWIFT_TARGET_AVX512 MSWIFT_TARGET("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl")
#define MSWIFT_TARGET_AVX512_BF16 MSWIFT_TARGET("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
