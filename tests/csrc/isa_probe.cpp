// What wrong compiler flags break, for test_build.py: a function for each instruction set where
// ECAR_ISA is defined, and the choice among them where it is not.

#ifdef ECAR_ISA

#include <cmath>

namespace ecar::ECAR_ISA {
// in: NaN, infinity, the smallest subnormal, 1e8, 1, -0, 3 and numbers.
void probe(const float* in, float* out) {
  out[0] = in[0] != in[0];
  out[1] = std::isnan(in[0]) && std::isinf(in[1]) && !std::isfinite(in[1]);
  out[2] = in[2] * in[4];
  out[3] = (in[3] + in[4]) - in[3];
  out[4] = in[5] + 0.0f;
  out[5] = in[7] * in[8] + in[9];
  for (int i = 6; i < 32; ++i) out[i] = in[i] / in[6];
}
}  // namespace ecar::ECAR_ISA

#else

#define DECLARE(isa) \
  namespace ecar::isa { \
  void probe(const float* in, float* out); \
  }
DECLARE(baseline)
DECLARE(avx2)
DECLARE(avx512)

// Of instruction set 0, 1 or 2; 0 where this CPU has not got it.
extern "C" __attribute__((visibility("default"))) int probe(int isa, const float* in, float* out) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return ecar::avx2::probe(in, out), 1;
  }
  if (isa == 2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    return ecar::avx512::probe(in, out), 1;
  }
#endif
  if (isa == 0) return ecar::baseline::probe(in, out), 1;
  return 0;
}

#endif
