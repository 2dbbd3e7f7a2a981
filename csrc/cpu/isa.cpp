#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace ecar {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;  // every CPU with FMA3 has F16C
#endif
  return Isa::baseline;
}

Isa decide() {
  const Isa found = best();
  const char* wanted = std::getenv("ECAR_CPU_ISA");
  if (wanted == nullptr) return found;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa <= found && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  }
  return found;
}

}  // namespace

Isa isa() {
  static const Isa chosen = decide();
  return chosen;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool found = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace ecar
