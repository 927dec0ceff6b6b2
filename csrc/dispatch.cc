// Chooses among the instruction sets that were compiled: the first that this processor has, or the one asked for.

#include <cstdlib>
#include <cstring>

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
// Whether it has tiles of bf16, and the system lets this process use them: their 8 kB have to be kept for each thread.
bool has_tiles() {
  constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTileBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

const Kernels* choose() {
  const char* asked = std::getenv("SLIPWAY_ISA");
  auto fits = [asked](const Kernels& set, bool runs) { return runs && (!asked || !std::strcmp(asked, set.name)); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(SLIPWAY_AMX)
  if (fits(amx::table, bf16) && has_tiles()) return &amx::table;
#endif
  if (fits(avx512bf16::table, bf16)) return &avx512bf16::table;
  if (fits(avx512::table, avx512)) return &avx512::table;
  if (fits(avx2::table, avx2)) return &avx2::table;
#endif
  return fits(portable::table, true) ? &portable::table : nullptr;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace slipway

// The name of the set in use; null if none serves.
extern "C" const char* slipway_isa() {
  const slipway::Kernels* chosen = slipway::kernels();
  return chosen ? chosen->name : nullptr;
}
