#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace mswift {

static const char* const kNames[] = {"none", "avx2", "avx512", "avx512_bf16", "amx"};

const char* name_of(Isa isa) { return kNames[static_cast<int>(isa)]; }

static Isa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::none;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-tile") ? Isa::amx : Isa::avx512_bf16;
}

Isa isa() {
  static const Isa found = [] {
    const Isa best = detect();
    const char* wanted = std::getenv("MSWIFT_ISA");
    for (int i = 0; wanted && i < static_cast<int>(best); i++)
      if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<Isa>(i);
    return best;
  }();
  return found;
}

}  // namespace mswift
