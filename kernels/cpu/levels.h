// The instruction set levels compiled into this library and runnable on this CPU.
#pragma once
#include <vector>

#include "kernels.h"

namespace xk {

const std::vector<const Level *> &levels();  // best last
const Level *find_level(const char *name);   // null when not compiled in or not runnable here

}  // namespace xk
