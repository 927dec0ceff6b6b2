// Kernels of one instruction set, collected in a table.
//
// Not here: choice among the sets (dispatch.cc).
//
// CMakeLists.txt compiles this file once for each instruction set, with the compiler flags of the
// set, and with SLIPWAY_ISA defined as its name. That name is also a namespace.

#include "attention.h"
#include "embed.h"
#include "experts.h"
#include "linear.h"
#include "norm.h"
#include "quantized.h"
#include "route.h"
#include "sample.h"
#include "tiled_linear.h"

namespace slipway {
namespace SLIPWAY_ISA {

extern const Kernels table;
#define SLIPWAY_TEXT(x) #x
#define SLIPWAY_NAME(x) SLIPWAY_TEXT(x)
const Kernels table = {
    SLIPWAY_NAME(SLIPWAY_ISA),
    linear,
    quantized_linear,
    route,
    experts,
    embed,
    norm,
    rotate,
    write_kv,
    attention,
    sample,
    log_normalizer,
};

}  // namespace SLIPWAY_ISA
}  // namespace slipway
