#pragma once

// Which instruction set the kernels use on this machine.
//
// Files named *_isa.cpp are compiled once for each set, into namespace ecar::<set>. What they
// define must have internal linkage or live in that namespace: an inline function that other
// files share could be linked in its AVX-512 form and then run on a CPU without it.

namespace ecar {

// amx is avx512 with AVX512_BF16, and with AMX's tiles where bfloat16 is multiplied.
enum class Isa { baseline, avx2, avx512, amx };

// The best set that this CPU runs, or the lesser one that $ECAR_CPU_ISA names; decided once. Linux
// is asked for the permission to use tiles before amx is chosen.
Isa isa();

const char* isa_name(Isa isa);

// Whether that set multiplies bfloat16, by AVX512_BF16's instruction at twice the rate of floats or
// by AMX's. Elsewhere it is widened.
bool multiplies_bfloat16();

}  // namespace ecar

// The `name` of the set in use, for a name declared in every set's namespace.
#if defined(__x86_64__)
#define ECAR_FOR_EACH_ISA(DECLARE) DECLARE(baseline) DECLARE(avx2) DECLARE(avx512)
#define ECAR_CHOOSE(name)                                                      \
  (::ecar::isa() >= ::ecar::Isa::avx512 ? ::ecar::avx512::name                \
   : ::ecar::isa() == ::ecar::Isa::avx2 ? ::ecar::avx2::name                 \
                                         : ::ecar::baseline::name)
#else
#define ECAR_FOR_EACH_ISA(DECLARE) DECLARE(baseline)
#define ECAR_CHOOSE(name) ::ecar::baseline::name
#endif
