// The checksum of a block: 64 lanes of 32 bits, each mixing its words in order. A round can be undone from either side, so one
// changed word always changes its lane; several that cancel out would have to agree on 32 bits in every lane they are in.
#include "checksum.h"

#include <string.h>

#include "common.h"

namespace XK_LEVEL {
namespace {

typedef uint32_t u32x16 __attribute__((vector_size(64)));
constexpr int64_t kRound = 4 * sizeof(u32x16);

inline void mix(u32x16 *lanes, const uint8_t *data) {
  for (int j = 0; j < 4; j++) {
    u32x16 words;
    memcpy(&words, data + j * sizeof words, sizeof words);
    const u32x16 sum = lanes[j] + words * 0x85ebca77u;
    lanes[j] = (sum << 13 | sum >> 19) * 0x9e3779b1u;
  }
}

}  // namespace

void checksum(const uint8_t *data, int64_t bytes, uint32_t *out) {
  u32x16 lanes[4] = {};
  int64_t at = 0;
  for (; at + kRound <= bytes; at += kRound) {
    for (int j = 0; j < 4; j++) __builtin_prefetch(data + at + j * 64 + kFetchAhead, 0, 2);
    mix(lanes, data + at);
  }
  if (at < bytes) {
    uint8_t rest[kRound] = {};
    memcpy(rest, data + at, static_cast<size_t>(bytes - at));
    mix(lanes, rest);
  }
  memcpy(out, lanes, sizeof lanes);
}

}  // namespace XK_LEVEL
