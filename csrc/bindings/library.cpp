// What the library says about itself.

#include <string>

#include "bindings/tensors.h"
#include "cpu/isa.h"

namespace {

std::string cpu_instruction_set() { return ecar::isa_name(ecar::isa()); }

bool cpu_multiplies_bfloat16() { return ecar::multiplies_bfloat16(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ECAR_OPS, library) {
  library.def("cpu_instruction_set() -> str");
  library.def("cpu_multiplies_bfloat16() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(ECAR_OPS, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  library.impl("cpu_multiplies_bfloat16", TORCH_BOX(&cpu_multiplies_bfloat16));
}
