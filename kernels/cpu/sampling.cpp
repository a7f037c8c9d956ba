// The sampler: one row of logits and one slot's state in, one token out. Order: mask, penalties, repetition, bias,
// min_tokens, temperature, top-k, top-p, min-p, draw. What is masked is -inf and stays so, whatever follows. Penalties
// touch few values: they are written into the row and taken back; a masked row is a copy.
#include "sampling.h"

#include <new>

#include "sampling_row.h"
#include "threads.h"

namespace {

namespace xs = xk::sampling;
using xs::Row;

// Philox4x32-10 (Salmon et al., SC 2011), first 64 of its 128 bits.
uint64_t philox(uint64_t seed, uint32_t sample_index, uint32_t position) {
  uint32_t c[4] = {position, 0, sample_index, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::memcpy(c, next, sizeof c);
  }
  return static_cast<uint64_t>(c[1]) << 32 | c[0];
}

struct Seen {
  int32_t token;
  int32_t generated;  // 0: only in the prompt
};

struct Slot {
  bool attached = false;
  xk_sampling_params params{};
  std::vector<int32_t> bias_ids, suppress_ids;
  std::vector<float> bias;
  std::vector<Seen> seen;  // sorted by token; empty where no penalty reads it
  uint32_t position = 0;   // tokens generated so far

  bool counts() const { return params.presence != 0 || params.frequency != 0 || params.repetition != 1; }

  void remember(int32_t token) {
    if (!counts()) return;
    auto at = std::lower_bound(seen.begin(), seen.end(), token, [](const Seen &s, int32_t t) { return s.token < t; });
    if (at == seen.end() || at->token != token) at = seen.insert(at, Seen{token, 0});
    at->generated++;
  }
};

// The mask; then penalties, bias and min_tokens, in this order, on the few values that they touch. False: nothing is
// left to draw. Where the mask leaves nothing but what min_tokens suppresses, the mask has its way.
bool edit(Row &row, const Slot &slot) {
  const xk_sampling_params &p = slot.params;
  const bool suppress = slot.position < static_cast<uint32_t>(p.min_tokens) && !slot.suppress_ids.empty();
  if (p.mask && !row.mask(p.mask)) return false;
  if (slot.seen.empty() && slot.bias.empty() && !suppress) return true;
  for (const Seen &s : slot.seen) {
    float x = row[s.token];
    if (s.generated) x = x - p.frequency * static_cast<float>(s.generated) - p.presence;
    row.set(s.token, x > 0 ? x / p.repetition : x * p.repetition);
  }
  for (size_t i = 0; i < slot.bias.size(); i++) row.set(slot.bias_ids[i], row[slot.bias_ids[i]] + slot.bias[i]);
  const size_t kept = row.edits();
  if (suppress)
    for (const int32_t token : slot.suppress_ids) row.set(token, -xs::kInf);
  if (row.refresh()) return true;
  if (!suppress || !p.mask) return false;
  row.take_back(kept);
  return row.refresh();
}

// Temperature, top-k, top-p, min-p, draw.
int32_t choose(Row &row, const Slot &slot) {
  const xk_sampling_params &p = slot.params;
  if (p.temperature == 0) return row.argmax();
  const float scale = std::min(xs::kLog2E / p.temperature, std::numeric_limits<float>::max());
  const uint64_t random = philox(p.seed, static_cast<uint32_t>(p.sample_index), slot.position);
  const auto share = [&](uint64_t total) {
    const double need = std::ceil(p.top_p * static_cast<double>(total));
    return std::min(total, std::max<uint64_t>(1, static_cast<uint64_t>(need)));
  };
  if (p.top_k > 0 && p.top_k < row.vocab) {
    row.gather_top(p.top_k);
    const uint64_t total = row.exponentiate(scale);
    if (p.top_p < 1) row.keep_best(share(total), xs::fixed);
  } else if (p.top_p < 1) {
    const uint64_t total = row.sum(scale);
    row.gather_nucleus(scale, total, share(total));
    row.keep_best(share(total), xs::fixed);
  } else if (p.min_p > 0) {
    row.gather(row.peak, scale, std::log2(p.min_p) - xs::kMargin);
    row.exponentiate(scale);
  } else {
    return row.draw(scale, random);
  }
  if (p.min_p > 0) row.keep(xs::key_of(p.min_p, std::numeric_limits<int32_t>::max()));
  return row.draw_candidate(random);
}

// One row; logprobs are those of the row as it came.
int32_t sample(Row &row, float *logits, Slot &slot, float *logprob, int32_t width, int32_t *top_ids,
               float *top_logprobs) {
  const int wanted = slot.params.logprobs;
  *logprob = std::numeric_limits<float>::quiet_NaN();
  std::fill(top_ids, top_ids + width, -1);
  std::fill(top_logprobs, top_logprobs + width, -xs::kInf);
  if (!row.open(logits)) return -1;
  double base = 0;
  if (wanted >= 0) {
    base = row.peak + std::log(static_cast<double>(row.sum(xs::kLog2E)) / xs::kUnit);
    const int k = std::min({wanted, width, row.vocab});
    const uint64_t *top = k > 0 ? row.top(k) : nullptr;
    for (int i = 0; i < k; i++) {
      top_ids[i] = xs::id_of(top[i]);
      top_logprobs[i] = static_cast<float>(row[top_ids[i]] - base);
    }
  }
  const int32_t token = edit(row, slot) ? choose(row, slot) : -1;
  row.take_back(0);
  if (token < 0) return -1;
  if (wanted >= 0) *logprob = static_cast<float>(row[token] - base);
  slot.remember(token);
  slot.position++;
  return token;
}

}  // namespace

struct xk_sampler {
  std::vector<Slot> slots;
  std::vector<Row> workers;
  std::vector<int64_t> used;  // [slots] the last call that sampled it
  int64_t call = 0;
};

xk_sampler *xk_sampler_new(int32_t vocab, int32_t max_slots, int32_t workers) try {
  return new xk_sampler{std::vector<Slot>(max_slots), std::vector<Row>(workers, Row(vocab)),
                        std::vector<int64_t>(max_slots)};
} catch (const std::bad_alloc &) {
  return nullptr;
}

void xk_sampler_free(xk_sampler *sampler) { delete sampler; }

int32_t xk_sampler_attach(xk_sampler *sampler, int32_t index, const xk_sampling_params *params) try {
  Slot slot;
  slot.params = *params;
  slot.bias_ids.assign(params->bias_ids, params->bias_ids + params->bias_count);
  slot.bias.assign(params->bias, params->bias + params->bias_count);
  slot.suppress_ids.assign(params->suppress_ids, params->suppress_ids + params->suppress_count);
  slot.position = static_cast<uint32_t>(params->generated_count);
  if (slot.counts()) {
    std::vector<int32_t> made(params->generated_ids, params->generated_ids + params->generated_count), all = made;
    if (params->repetition != 1) all.insert(all.end(), params->prompt_ids, params->prompt_ids + params->prompt_count);
    std::sort(made.begin(), made.end());
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    for (const int32_t token : all) {
      const auto range = std::equal_range(made.begin(), made.end(), token);
      slot.seen.push_back({token, static_cast<int32_t>(range.second - range.first)});
    }
  }
  slot.attached = true;
  sampler->slots[index] = std::move(slot);
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}

void xk_sampler_detach(xk_sampler *sampler, int32_t slot) { sampler->slots[slot] = Slot{}; }

int32_t xk_sampler_sample(xk_sampler *sampler, void *pool, float *logits, int32_t rows, const int32_t *slots,
                          int32_t *tokens, float *logprobs, int32_t top_width, int32_t *top_ids, float *top_logprobs) {
  sampler->call++;
  for (int32_t j = 0; j < rows; j++) {
    if (slots[j] < 0 || slots[j] >= static_cast<int32_t>(sampler->slots.size())) return XK_BAD_SLOT;
    if (!sampler->slots[slots[j]].attached) return XK_DETACHED_SLOT;
    if (sampler->used[slots[j]] == sampler->call) return XK_SLOT_TWICE;
    sampler->used[slots[j]] = sampler->call;
  }
  auto body = [&](int64_t j, int thread) {
    Row &row = sampler->workers[thread];
    tokens[j] = sample(row, logits + j * row.vocab, sampler->slots[slots[j]], logprobs + j, top_width,
                       top_ids + j * top_width, top_logprobs + j * top_width);
  };
  static_cast<xk::Pool *>(pool)->run(
      rows, [](void *b, int64_t j, int thread) { (*static_cast<decltype(body) *>(b))(j, thread); }, &body);
  return XK_SAMPLED;
}
