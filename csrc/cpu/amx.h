#pragma once

// AMX's tiles by Intel's names, where the compiler has them (CMakeLists.txt asks it): ECAR_AMX is
// defined then. A build with ECAR_AMX_STAND_IN, for tests, takes functions of amx_stand_in.h for
// the instructions.

#if defined(ECAR_HAS_AMX) && defined(__linux__)
#define ECAR_AMX __attribute__((target("amx-tile,amx-bf16")))
#endif

#include <cstdint>

namespace ecar {

// What ldtilecfg reads. Tiles that it leaves out cannot be used.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "as the instruction has it");

}  // namespace ecar
