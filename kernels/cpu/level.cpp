// Gathers the kernel tables of one level. A new kernel file adds its table here and in common.h.
#include "common.h"
#include "probe.h"

#define XK_TEXT_(x) #x
#define XK_TEXT(x) XK_TEXT_(x)

namespace XK_LEVEL {
namespace {

const Kernel *const kTables[] = {gather_kernels, linear_kernels,      norm_kernels,
                                 rope_kernels,   attention_kernels, elementwise_kernels};
constexpr int kMaxKernels = 64;

}  // namespace

const xk::Level &level() {
  static Kernel all[kMaxKernels];
  static xk::Level result = {nullptr, nullptr, 0, nullptr, nullptr};
  if (!result.name) {
    int count = 0;
    for (const Kernel *table : kTables)
      for (; table->name && count < kMaxKernels; table++) all[count++] = *table;
    result = {XK_TEXT(XK_LEVEL_NAME), all, count, probe_read, probe_fma};
  }
  return result;
}

}  // namespace XK_LEVEL
