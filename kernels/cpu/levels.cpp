// Which levels this CPU and its operating system support: cpuid for the instructions, xgetbv for the registers that are saved.
#include "levels.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
namespace xk_v2 { const xk::Level &level(); }
namespace xk_v3 { const xk::Level &level(); }
namespace xk_v4 { const xk::Level &level(); }
namespace xk_v4_bf16 { const xk::Level &level(); }
#if defined(XK_KNOWS_TILES)
namespace xk_v4_amx { const xk::Level &level(); }
#endif
#else
namespace xk_arm64 { const xk::Level &level(); }
#endif

namespace xk {
namespace {

// The matrix unit's registers are large: a process asks the system for them, once.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<const Level *> detect() {
#if defined(__x86_64__)
  unsigned a = 0, b1 = 0, c1 = 0, d1 = 0, b7 = 0, c7 = 0, d7 = 0, cx = 0, dx = 0;
  __get_cpuid(1, &a, &b1, &c1, &d1);
  __get_cpuid_count(7, 0, &a, &b7, &c7, &d7);
  unsigned b = 0, a71 = 0;
  __get_cpuid_count(7, 1, &a71, &b, &a, &d1);
  __get_cpuid(0x80000001u, &a, &b, &cx, &dx);
  const auto bits = [](unsigned value, unsigned mask) { return (value & mask) == mask; };
  unsigned saved = 0, high = 0;
  if (c1 & bit_OSXSAVE) asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const bool v2 = bits(c1, bit_SSE3 | bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT);
  const bool v3 = v2 && bits(saved, 0x6) && bits(c1, bit_AVX | bit_FMA | bit_F16C | bit_MOVBE) &&
                  bits(b7, bit_AVX2 | bit_BMI | bit_BMI2) && bits(cx, 1u << 5 /* lzcnt */);
  const bool v4 = v3 && bits(saved, 0xe6) && bits(b7, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL) &&
                  bits(c7, bit_AVX512VNNI);  // the first CPUs with AVX-512 lack it and slow down for wide vectors: v3 serves them
  const bool bf16 = v4 && bits(a71, 1u << 5);
  const bool amx = bf16 && bits(saved, 0x600e6) && bits(d7, 1u << 24 /* tiles */ | 1u << 25 /* int8 */ | 1u << 22 /* bf16 */);
  std::vector<const Level *> found;
  if (v2) found.push_back(&xk_v2::level());
  if (v3) found.push_back(&xk_v3::level());
  if (v4) found.push_back(&xk_v4::level());
  if (bf16) found.push_back(&xk_v4_bf16::level());
#if defined(XK_KNOWS_TILES)
  if (amx && may_use_tiles()) found.push_back(&xk_v4_amx::level());
#else
  (void)amx, (void)may_use_tiles;
#endif
  return found;
#else
  return {&xk_arm64::level()};
#endif
}

// Zen 5 does, Zen 4 does not, which lacks AVX-VNNI. Others that have it are taken to be alike: none was there to be measured.
bool detect_asks_ahead() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
#else
  return false;
#endif
}

}  // namespace

const bool asks_ahead = detect_asks_ahead();

const std::vector<const Level *> &levels() {
  static const std::vector<const Level *> found = detect();
  return found;
}

const Level *find_level(const char *name) {
  for (const Level *level : levels())
    if (strcmp(level->name, name) == 0) return level;
  return nullptr;
}

}  // namespace xk
