// What the library says about itself.

#include <string>

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

namespace {

std::string cpu_instruction_set() { return ecar::isa_name(ecar::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ecar, library) {
  library.def("cpu_instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ecar, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
}
