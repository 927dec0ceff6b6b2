// Choice among the compiled instruction sets.
//
// Not here: the kernels of a set (isa.cc).

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(SLIPWAY_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace slipway {

#if defined(SLIPWAY_AMX)
namespace amx { extern const Kernels table; }
#endif
#if defined(__x86_64__)
namespace avx512bf16 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
#endif
namespace portable { extern const Kernels table; }

namespace {

#if defined(SLIPWAY_AMX)
// Return whether the processor has AMX tiles of bfloat16 and the system lets this process use them.
// A process has to request them, because the system keeps 8 kB of tile data for each thread.
bool has_tiles() {
  constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTileBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

// Call visit(set) for each set that this processor supports, the best first, until it returns true.
template <class Visit>
void for_each_set(Visit visit) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(SLIPWAY_AMX)
  if (bf16 && has_tiles() && visit(amx::table)) return;
#endif
  if (bf16 && visit(avx512bf16::table)) return;
  if (avx512 && visit(avx512::table)) return;
  if (avx2 && visit(avx2::table)) return;
#endif
  visit(portable::table);
}

// Return the set that SLIPWAY_ISA names, or the best one if the variable is unset or empty; null if
// this processor does not support a set of that name.
const Kernels* choose() {
  const char* asked = std::getenv("SLIPWAY_ISA");
  const bool any = !asked || !*asked;
  const Kernels* chosen = nullptr;
  for_each_set([&](const Kernels& set) {
    if (any || !std::strcmp(asked, set.name)) chosen = &set;
    return chosen != nullptr;
  });
  return chosen;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace slipway

// Return the name of the set in use; null if SLIPWAY_ISA names no supported set.
extern "C" const char* slipway_isa() {
  const slipway::Kernels* chosen = slipway::kernels();
  return chosen ? chosen->name : nullptr;
}

// Return the names of all supported sets, the best first, separated by spaces.
extern "C" const char* slipway_isa_choices() {
  static const std::string names = [] {
    std::string all;
    slipway::for_each_set([&all](const slipway::Kernels& set) {
      all += (all.empty() ? "" : " ") + std::string(set.name);
      return false;
    });
    return all;
  }();
  return names.c_str();
}
