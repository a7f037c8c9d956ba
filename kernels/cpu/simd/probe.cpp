// The two ceilings a kernel can meet, measured with the level's own vectors: reading memory, and multiply-add.
#include "common.h"
#include "probe.h"

namespace XK_LEVEL {

float probe_read(const uint8_t *data, int64_t bytes) {
  f32x16 sum[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int j = 0; j < 4; j++) {
      __builtin_prefetch(data + i + j * 64 + kFetchAhead, 0, 2);  // as the kernels do: it reads faster than without
      sum[j] = max(load(data + i + j * 64), sum[j]);
    }
  return reduce_add(sum[0] + sum[1] + sum[2] + sum[3]);
}

float probe_fma(int64_t rounds, int64_t *operations) {
  constexpr int chains = kParts == 1 ? 12 : kParts == 2 ? 6 : 3;
  f32x16 acc[chains], factor = set1(0.999f), term = set1(0.001f);
  for (int j = 0; j < chains; j++) acc[j] = set1((float)j);
  for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < chains; j++) acc[j] = fma(acc[j], factor, term);
  }
  f32x16 sum = zero();
  for (int j = 0; j < chains; j++) sum = sum + acc[j];
  *operations = rounds * chains * 32;
  return reduce_add(sum);
}

}  // namespace XK_LEVEL
