// Gathers the kernel tables of one level.
#include "checksum.h"
#include "common.h"
#include "probe.h"

#define XK_TEXT_(x) #x
#define XK_TEXT(x) XK_TEXT_(x)

namespace XK_LEVEL {
namespace {

#define XK_TABLE(file) file##_kernels,
const Kernel *const kTables[] = {XK_KERNEL_FILES(XK_TABLE)};
constexpr int kMaxKernels = 256;

}  // namespace

const xk::Level &level() {
  static Kernel all[kMaxKernels];
  static xk::Level result = {nullptr, nullptr, 0, nullptr, nullptr, nullptr};
  if (!result.name) {
    int count = 0;
    for (const Kernel *table : kTables)
      for (; table->name; table++) {
        if (count == kMaxKernels) __builtin_trap();  // raise kMaxKernels
        all[count++] = *table;
      }
    result = {XK_TEXT(XK_LEVEL_NAME), all, count, probe_read, probe_fma, checksum};
  }
  return result;
}

}  // namespace XK_LEVEL
