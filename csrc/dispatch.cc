// Chooses among the instruction sets that were compiled: the first that this processor has, or the one asked for.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace slipway {

#if defined(__x86_64__)
namespace avx512bf16 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
#endif
namespace portable { extern const Kernels table; }

namespace {

const Kernels* choose() {
  const char* asked = std::getenv("SLIPWAY_ISA");
  auto fits = [asked](const Kernels& set, bool runs) { return runs && (!asked || !std::strcmp(asked, set.name)); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (fits(avx512bf16::table, avx512 && __builtin_cpu_supports("avx512bf16"))) return &avx512bf16::table;
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
