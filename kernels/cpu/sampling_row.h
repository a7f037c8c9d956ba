// One row of logits: which values matter, and a draw among them.
//
// A row is walked in blocks of 128 whose maxima are kept, so that every later question (which values lie above t,
// which k are the largest) opens few blocks. Softmax numerators are float32, e^((x - max) / T); they are summed in 16
// lanes inside a block and from there on as 2^-44 fixed-point integers, whose sums are exact in any order. No FMA,
// lanes fixed: a draw depends on the row, the parameters and the random number only, not on batch, thread or vector
// width.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

namespace xk::sampling {

constexpr int kBlock = 128, kLanes = 16;
constexpr int kWidth = 4;          // of the loops that wait for memory anyway
constexpr int kBucketShift = 49;   // buckets of keep_best: sign, exponent and 6 bits of the mantissa
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;
constexpr float kMargin = 0.01f;  // of thresholds on z, which only choose candidates
constexpr float kUnit = 17592186044416.0f;  // 2^44: sums of 2^19 values of at most 1 fit 64 bits

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
constexpr int kParts = kLanes / kWidth;

inline Floats load(const float *p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline uint64_t fixed(float x) { return static_cast<uint64_t>(static_cast<int64_t>(x * kUnit)); }

inline uint32_t bits_of(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}

// Orders (value descending, id ascending) as descending integers. + 0 makes -0 equal to +0.
inline uint64_t key_of(float x, int32_t id) {
  const uint32_t b = bits_of(x + 0.0f);
  const uint32_t ordered = b ^ ((0u - (b >> 31)) | 0x80000000u);
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

inline float value_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  const uint32_t b = ordered ^ (((ordered >> 31) - 1) | 0x80000000u);
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

inline int32_t id_of(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }

// out = 2^((x - shift) * scale) for one block of values that are at most shift; x may be out. Within 1e-7 of 2^z for
// the rounded z, exactly 1 at x = shift, exactly 0 below 2^-125 (no subnormals). The polynomial is a minimax fit of
// (2^r - 1) / r over [-0.5, 0.5]; adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. The sum adds
// each lane's values in order, then folds 16 lanes in halves.
template <int Width>
__attribute__((always_inline)) inline float exp_block_body(const float *x, float shift, float scale, float *out) {
  typedef float Floats __attribute__((vector_size(Width * 4)));
  typedef uint32_t Bits __attribute__((vector_size(Width * 4)));
  Floats sum[kLanes / Width] = {};
  for (int i = 0; i < kBlock; i += kLanes)
    for (int part = 0; part < kLanes / Width; part++) {
      Floats z;
      std::memcpy(&z, x + i + part * Width, sizeof z);
      z = (z - shift) * scale;
      const Floats shifted = z + 12582912.0f;
      const Floats r = z - (shifted - 12582912.0f);
      Floats p = r * 0.00015353361959569156f + 0.0013398873852565885f;
      p = p * r + 0.00961843691766262f;
      p = p * r + 0.055503323674201965f;
      p = p * r + 0.24022647738456726f;
      p = p * r + 0.6931471824645996f;
      p = p * r + 1.0f;
      const Floats e = (Floats)(((Bits)p + ((Bits)shifted << 23)) & (Bits)(z >= -125.0f));
      std::memcpy(out + i + part * Width, &e, sizeof e);
      sum[part] += e;
    }
  float lanes[kLanes];
  std::memcpy(lanes, sum, sizeof lanes);
  for (int half = kLanes / 2; half; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

using ExpBlock = float (*)(const float *x, float shift, float scale, float *out);

inline float exp_block_4(const float *x, float shift, float scale, float *out) {
  return exp_block_body<4>(x, shift, scale, out);
}

#if defined(__x86_64__)
// The one loop here that is bound by arithmetic: wide vectors halve its time and change no bit.
__attribute__((target("avx2"))) inline float exp_block_8(const float *x, float shift, float scale, float *out) {
  return exp_block_body<8>(x, shift, scale, out);
}
inline ExpBlock best_exp_block() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") ? exp_block_8 : exp_block_4;
}
#else
inline ExpBlock best_exp_block() { return exp_block_4; }
#endif
const ExpBlock exp_block = best_exp_block();

inline float block_max(const float *x, Ints *nan) {
  Floats best[kParts];
  Ints bad = {};
  for (int p = 0; p < kParts; p++) best[p] = load(x + p * kWidth), bad |= (Ints)(best[p] != best[p]);
  for (int i = kLanes; i < kBlock; i += kLanes)
    for (int p = 0; p < kParts; p++) {
      const Floats v = load(x + i + p * kWidth);
      best[p] = v > best[p] ? v : best[p];
      bad |= (Ints)(v != v);
    }
  *nan |= bad;
  for (int half = kParts / 2; half; half /= 2)
    for (int p = 0; p < half; p++) best[p] = best[p + half] > best[p] ? best[p + half] : best[p];
  float top = best[0][0];
  for (int l = 1; l < kWidth; l++) top = best[0][l] > top ? best[0][l] : top;
  return top;
}

inline uint64_t below(uint64_t random, uint64_t total) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(random) * total >> 64);
}

// The row at hand and all the memory that work on it needs: one per thread, made once, so that sampling allocates
// nothing.
class Row {
 public:
  explicit Row(int v)
      : vocab(v), blocks((v + kBlock - 1) / kBlock), maxima(blocks), order(blocks), sums(blocks), dirty(blocks),
        value(v + kBlock), id(v + kBlock), keys(v + kBlock), histogram(1 << (64 - kBucketShift)), masked(v) {}

  // False for a row that nothing can be drawn from: a NaN, +inf, or nothing above -inf.
  bool open(float *logits) {
    x = logits;
    Ints nan = {};
    for (int b = 0; b < blocks; b++) maxima[b] = block_max(block(b), &nan);
    return find_peak(nan);
  }

  // The row becomes a copy in which every token whose bit is not set in both (NULL: in one) is -inf; as open().
  bool mask(const uint32_t *words, const uint32_t *others) {
    Ints nan = {};
    for (int begin = 0; begin < vocab; begin += 32) {
      const int end = std::min(vocab, begin + 32);
      const uint32_t word = (words ? words[begin / 32] : ~0u) & (others ? others[begin / 32] : ~0u);
      if (word == 0)
        std::fill(masked.begin() + begin, masked.begin() + end, -kInf);
      else if (word == 0xffffffffu)
        std::copy(x + begin, x + end, masked.begin() + begin);
      else
        for (int i = begin; i < end; i++) masked[i] = word >> (i - begin) & 1 ? x[i] : -kInf;
    }
    x = masked.data();
    for (int b = 0; b < blocks; b++) maxima[b] = block_max(block(b), &nan);
    return find_peak(nan);
  }

  float operator[](int32_t token) const { return x[token]; }

  void set(int32_t token, float value_now) {
    undo.emplace_back(token, x[token]);
    x[token] = value_now;
  }

  // After the last set() or take_back(): as open().
  bool refresh() {
    for (const auto &was : undo) dirty[was.first / kBlock] = 1;
    Ints nan = {};
    for (int b = 0; b < blocks; b++)
      if (dirty[b]) maxima[b] = block_max(block(b), &nan), dirty[b] = 0;
    return find_peak(nan);
  }

  size_t edits() const { return undo.size(); }

  // Undoes every set() but the first `kept`; the blocks keep their maxima until they are refreshed.
  void take_back(size_t kept) {
    for (; undo.size() > kept; undo.pop_back()) {
      x[undo.back().first] = undo.back().second;
      dirty[undo.back().first / kBlock] = 1;
    }
  }

  int32_t argmax() const {
    const auto b = std::find(maxima.begin(), maxima.end(), peak) - maxima.begin();
    return static_cast<int32_t>(std::find(x + b * kBlock, x + vocab, peak) - x);
  }

  // Softmax numerators of the row, 2^((x - peak) * scale), block by block.
  uint64_t sum(float scale) {
    float e[kBlock];
    uint64_t total = 0;
    for (int b = 0; b < blocks; b++) total += sums[b] = fixed(exp_block(block(b), peak, scale, e));
    return total;
  }

  // Candidates, in id order = values with (x - shift) * scale >= threshold.
  void gather(float shift, float scale, float threshold) {
    const float *from = x;
    float *values = value.data();
    int32_t *ids = id.data();
    int found = 0;  // local names: a store through `values` may not force anything to be read again
    for (int b = 0; b < blocks; b++) {
      if ((maxima[b] - shift) * scale < threshold) continue;
      const int end = std::min(vocab, (b + 1) * kBlock);
      for (int i = b * kBlock; i < end; i++) {
        values[found] = from[i];
        ids[found] = i;
        found += (from[i] - shift) * scale >= threshold;
      }
    }
    count = found;
  }

  // Keeps the candidates at or before `last` in the order of keys.
  void keep(uint64_t last) {
    int kept = 0;
    for (int i = 0; i < count; i++) {
      const float v = value[i];
      const int32_t token = id[i];
      value[kept] = v;
      id[kept] = token;
      kept += key_of(v, token) >= last;
    }
    count = kept;
  }

  // Keeps the shortest run of candidates, best first, that weighs `need`. Linear: a histogram names the bucket in
  // which the run ends, halving by nth_element finds the place in it.
  template <class Weigh>
  void keep_best(uint64_t need, Weigh weigh) {
    const bool many = count > 4096;
    uint64_t held = 0, bucket = 0;
    if (many) {
      std::fill(histogram.begin(), histogram.end(), 0);
      for (int i = 0; i < count; i++) histogram[key_of(value[i], 0) >> kBucketShift] += weigh(value[i]);
      bucket = histogram.size() - 1;
      for (; bucket && held + histogram[bucket] < need; bucket--) held += histogram[bucket];
    }
    int size = 0;
    for (int i = 0; i < count; i++) {
      keys[size] = key_of(value[i], id[i]);
      size += !many || keys[size] >> kBucketShift == bucket;
    }
    if (!size) return;
    uint64_t *low = keys.data(), *high = low + size;
    while (high - low > 32) {
      uint64_t *middle = low + (high - low) / 2;
      std::nth_element(low, middle, high, std::greater<uint64_t>());
      uint64_t upper = 0;
      for (uint64_t *k = low; k <= middle; k++) upper += weigh(value_of(*k));
      if (held + upper >= need) {
        high = middle + 1;
      } else {
        held += upper;
        low = middle + 1;
      }
    }
    std::sort(low, high, std::greater<uint64_t>());
    while (low + 1 < high && (held += weigh(value_of(*low))) < need) low++;
    keep(*low);
  }

  // The k largest, best first, as keys.
  const uint64_t *top(int k) {
    gather_top(k);
    return best_candidates(k);
  }

  int candidates() const { return count; }

  // The k largest of the candidates by their logits, best first, as keys.
  const uint64_t *best_candidates(int k) {
    for (int i = 0; i < count; i++) keys[i] = key_of(x[id[i]], id[i]);
    std::partial_sort(keys.begin(), keys.begin() + k, keys.begin() + count, std::greater<uint64_t>());
    return keys.data();
  }

  // Candidates = the k largest. The k-th largest block maximum has at least k values at or above it, so it opens few
  // blocks.
  void gather_top(int k) {
    float threshold = -kInf;
    if (k <= blocks) {
      order = maxima;
      std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
      threshold = order[k - 1];
    }
    gather(0, 1, threshold);
    if (count > k) keep_best(static_cast<uint64_t>(k), [](float) { return uint64_t{1}; });
  }

  // Candidates' logits become softmax numerators. Returns their sum.
  uint64_t exponentiate(float scale) {
    std::fill(value.begin() + count, value.begin() + (count + kBlock - 1) / kBlock * kBlock, -kInf);
    for (int i = 0; i < count; i += kBlock) exp_block(&value[i], peak, scale, &value[i]);
    return mass();
  }

  // top_p alone: numerators under a falling threshold until they hold `need`; the last one leaves out at most the
  // rest.
  void gather_nucleus(float scale, uint64_t total, uint64_t need) {
    const double rest = static_cast<double>(total - need) / kUnit / vocab;
    const float last = rest > 0 ? static_cast<float>(std::log2(rest)) - kMargin : -kInf;
    for (const float threshold : {-6.0f, -14.0f, -26.0f, last}) {
      gather(peak, scale, std::max(threshold, last));
      if (exponentiate(scale) >= need || threshold <= last) return;
    }
  }

  // Of the candidates.
  uint64_t mass() const {
    uint64_t total = 0;
    for (int i = 0; i < count; i++) total += fixed(value[i]);
    return total;
  }

  int32_t draw_candidate(uint64_t random) const {
    uint64_t left = below(random, mass());
    for (int i = 0; i < count; i++) {
      const uint64_t m = fixed(value[i]);
      if (left < m) return id[i];
      left -= m;
    }
    return id[count - 1];
  }

  int32_t draw(float scale, uint64_t random) {
    uint64_t left = below(random, sum(scale));
    int b = 0;
    for (; left >= sums[b]; b++) left -= sums[b];
    float e[kBlock];
    exp_block(block(b), peak, scale, e);
    int last = 0;  // a block's sum was rounded once more than its values: it may end a little after them
    for (int i = 0; i < kBlock; i++) {
      if (left < fixed(e[i])) return b * kBlock + i;
      left -= fixed(e[i]);
      if (e[i] > 0) last = i;
    }
    return b * kBlock + last;
  }

  const int vocab, blocks;
  float peak = 0;  // largest value of the row as it stands

 private:
  bool find_peak(Ints nan) {
    for (int l = 0; l < kWidth; l++)
      if (nan[l]) return false;
    peak = *std::max_element(maxima.begin(), maxima.end());
    return std::isfinite(peak);
  }

  // The last block is padded with -inf.
  const float *block(int b) {
    if (vocab - b * kBlock >= kBlock) return x + b * kBlock;
    std::fill(tail, tail + kBlock, -kInf);
    std::copy(x + b * kBlock, x + vocab, tail);
    return tail;
  }

  float *x = nullptr;
  std::vector<float> maxima, order;             // [blocks]
  std::vector<uint64_t> sums;                   // [blocks]
  std::vector<char> dirty;                      // [blocks]
  std::vector<std::pair<int32_t, float>> undo;  // what set() replaced
  int count = 0;                                // candidates, in id order
  std::vector<float> value;                     // [vocab + kBlock] their logits, later their softmax numerators
  std::vector<int32_t> id;                      // [vocab + kBlock]
  std::vector<uint64_t> keys, histogram;        // of keep_best
  std::vector<float> masked;                    // [vocab] the row as its mask leaves it
  float tail[kBlock] = {};
};

}  // namespace xk::sampling
