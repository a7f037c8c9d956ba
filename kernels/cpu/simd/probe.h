#pragma once
#include <stdint.h>

namespace XK_LEVEL {
float probe_read(const uint8_t *data, int64_t bytes);
float probe_fma(int64_t rounds, int64_t *operations);  // adds to nothing: sets the number of float operations done
}  // namespace XK_LEVEL
