#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cpu/amx.h"
#if defined(ECAR_AMX) && !defined(ECAR_AMX_STAND_IN)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

bool has_avx512_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// The tiles of a thread are 8 KiB of its state, which Linux does not keep for a process that has
// not asked: it would end at its first tile.
bool may_use_tiles() {
#if !defined(ECAR_AMX)
  return false;
#elif defined(ECAR_AMX_STAND_IN)
  return true;
#else
  unsigned a, b, c, d;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx_bf16) == 0 || (d & amx_tile) == 0) {
    return false;
  }
  constexpr long request_permission = 0x1023, tile_data = 18;  // of asm/prctl.h and XCR0
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#endif
}

Isa decide() {
  const Isa found = best();
  const char* wanted = std::getenv("ECAR_CPU_ISA");
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (wanted != nullptr && isa <= found && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  }
  return found == Isa::avx512 && has_avx512_bf16() && may_use_tiles() ? Isa::amx : found;
}

}  // namespace

Isa isa() {
  static const Isa chosen = decide();
  return chosen;
}

bool multiplies_bfloat16() {
  static const bool found = isa() >= Isa::avx512 && has_avx512_bf16();
  return found;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace ecar
