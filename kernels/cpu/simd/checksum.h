#pragma once
#include <stdint.h>

namespace XK_LEVEL {
void checksum(const uint8_t *data, int64_t bytes, uint32_t *out);  // [64] of a block; the same at every level
}  // namespace XK_LEVEL
