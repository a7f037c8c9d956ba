// The sampler: one row of logits and one slot's state in, one token out. Order: masks (a grammar's, allowed ids),
// penalties, repetition, bias, bad words, min_tokens, temperature, top-k, top-p, min-p, draw. What is masked is -inf and
// stays so, whatever follows: so masks may come first. Penalties touch few values: they are written into the row and
// taken back; a masked row is a copy.
#include "sampling.h"

#include <chrono>
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
  std::vector<int32_t> bias_ids, suppress_ids, bad_ids, bad_ends;
  std::vector<int32_t> recent;    // the last generated tokens, as many as a bad word has before its last one
  std::vector<uint32_t> allowed;  // [ceil(vocab / 32)] or empty
  std::vector<float> bias;
  std::vector<Seen> seen;  // sorted by token; empty where no penalty reads it
  uint32_t position = 0;   // tokens generated so far

  size_t context() const {
    int32_t longest = 1, begin = 0;
    for (const int32_t end : bad_ends) longest = std::max(longest, end - begin), begin = end;
    return static_cast<size_t>(longest - 1);
  }

  bool counts() const { return params.presence != 0 || params.frequency != 0 || params.repetition != 1; }

  void remember(int32_t token) {
    if (!recent.empty()) {
      std::rotate(recent.begin(), recent.begin() + 1, recent.end());
      recent.back() = token;
    }
    if (!counts()) return;
    auto at = std::lower_bound(seen.begin(), seen.end(), token, [](const Seen &s, int32_t t) { return s.token < t; });
    if (at == seen.end() || at->token != token) at = seen.insert(at, Seen{token, 0});
    at->generated++;
  }
};

// The masks; then penalties, bias, bad words and min_tokens, in this order, on the few values that they touch. False:
// nothing is left to draw. Where the masks leave nothing but what min_tokens suppresses, they have their way.
bool edit(Row &row, const Slot &slot) {
  const xk_sampling_params &p = slot.params;
  const bool masked = p.mask || !slot.allowed.empty();
  const bool suppress = slot.position < static_cast<uint32_t>(p.min_tokens) && !slot.suppress_ids.empty();
  if (masked && !row.mask(p.mask, slot.allowed.empty() ? nullptr : slot.allowed.data())) return false;
  if (slot.seen.empty() && slot.bias.empty() && slot.bad_ends.empty() && !suppress) return true;
  for (const Seen &s : slot.seen) {
    float x = row[s.token];
    if (s.generated) x = x - p.frequency * static_cast<float>(s.generated) - p.presence;
    row.set(s.token, x > 0 ? x / p.repetition : x * p.repetition);
  }
  for (size_t i = 0; i < slot.bias.size(); i++) row.set(slot.bias_ids[i], row[slot.bias_ids[i]] + slot.bias[i]);
  int32_t begin = 0;
  for (const int32_t end : slot.bad_ends) {
    const int32_t *word = slot.bad_ids.data() + begin, before = end - begin - 1;
    if (std::equal(word, word + before, slot.recent.end() - before)) row.set(word[before], -xs::kInf);
    begin = end;
  }
  const size_t kept = row.edits();
  if (suppress)
    for (const int32_t token : slot.suppress_ids) row.set(token, -xs::kInf);
  if (row.refresh()) return true;
  if (!suppress || !masked) return false;
  row.take_back(kept);
  return row.refresh();
}

// A token, and the distribution that it was drawn from: numerators e^((x - peak) / temperature) of total mass `total`,
// of the row's candidates, or of the whole row.
struct Drawn {
  int32_t token;
  double temperature;
  bool candidates;
  uint64_t total;  // 0: not known yet
};

float scale_of(float temperature) { return std::min(xs::kLog2E / temperature, std::numeric_limits<float>::max()); }

// Temperature, top-k, top-p, min-p, draw. A greedy row counts as one of temperature 1.
Drawn choose(Row &row, const Slot &slot) {
  const xk_sampling_params &p = slot.params;
  if (p.temperature == 0) return {row.argmax(), 1, false, 0};
  const float scale = scale_of(p.temperature);
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
    return {row.draw(scale, random), p.temperature, false, 0};
  }
  if (p.min_p > 0) row.keep(xs::key_of(p.min_p, std::numeric_limits<int32_t>::max()));
  return {row.draw_candidate(random), p.temperature, true, row.mass()};
}

// Where logprobs go: of the chosen token, and of the best ones.
struct Listed {
  float *chosen;
  int32_t width, *ids;
  float *logprobs;

  void clear() {
    *chosen = std::numeric_limits<float>::quiet_NaN();
    std::fill(ids, ids + width, -1);
    std::fill(logprobs, logprobs + width, -xs::kInf);
  }

  static float of(double x, double peak, double temperature, double base) {
    return static_cast<float>((x - peak) / temperature - base);
  }

  // The `k` best, given as keys, and their logprobs in a distribution of the row.
  void list(const Row &row, const uint64_t *best, int k, double temperature, double base) {
    for (int i = 0; i < k && xs::value_of(best[i]) > -xs::kInf; i++) {
      ids[i] = xs::id_of(best[i]);
      logprobs[i] = of(row[ids[i]], row.peak, temperature, base);
    }
  }
};

double log_mass(uint64_t total) { return std::log(static_cast<double>(total) / xs::kUnit); }

// One row; logprobs are those of the row as it came, or of what is drawn from.
int32_t sample(Row &row, float *logits, Slot &slot, Listed listed) {
  const int wanted = slot.params.logprobs;
  const bool raw = wanted >= 0 && !slot.params.processed;
  listed.clear();
  if (!row.open(logits)) return -1;
  const float peak = row.peak;
  double base = 0;
  if (raw) {
    base = log_mass(row.sum(xs::kLog2E));
    const int k = std::min({wanted, listed.width, row.vocab});
    if (k > 0) listed.list(row, row.top(k), k, 1, base);
  }
  Drawn drawn{-3, 1, false, 0};
  if (edit(row, slot)) drawn = choose(row, slot);
  if (drawn.token >= 0 && wanted >= 0 && !raw) {
    if (!drawn.candidates) drawn.total = row.sum(scale_of(static_cast<float>(drawn.temperature)));
    base = log_mass(drawn.total);
    *listed.chosen = Listed::of(row[drawn.token], row.peak, drawn.temperature, base);
    const int k = std::min({wanted, listed.width, drawn.candidates ? row.candidates() : row.vocab});
    if (k > 0) listed.list(row, drawn.candidates ? row.best_candidates(k) : row.top(k), k, drawn.temperature, base);
  }
  row.take_back(0);
  if (drawn.token < 0) return drawn.token;
  if (raw) *listed.chosen = Listed::of(logits[drawn.token], peak, 1, base);
  slot.remember(drawn.token);
  slot.position++;
  return drawn.token;
}

// One row that a token was given for.
int32_t score(Row &row, float *logits, int32_t token, Listed listed) {
  listed.clear();
  if (!row.open(logits)) return 0;
  const double base = log_mass(row.sum(xs::kLog2E));
  const int k = std::min(listed.width, row.vocab);
  if (k > 0) listed.list(row, row.top(k), k, 1, base);
  *listed.chosen = Listed::of(logits[token], row.peak, 1, base);
  int32_t rank = 1;
  for (int32_t i = 0; i < row.vocab; i++) rank += logits[i] > logits[token];
  return rank;
}

}  // namespace

struct xk_sampler {
  int32_t vocab;
  std::vector<Slot> slots;
  std::vector<Row> workers;
  std::vector<int64_t> used;  // [slots] the last call that sampled it
  int64_t call = 0;
};

xk_sampler *xk_sampler_new(int32_t vocab, int32_t max_slots, int32_t workers) try {
  return new xk_sampler{vocab, std::vector<Slot>(max_slots), std::vector<Row>(workers, Row(vocab)),
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
  if (params->allowed_count) slot.allowed.resize((sampler->vocab + 31) / 32);
  for (int32_t i = 0; i < params->allowed_count; i++)
    slot.allowed[params->allowed_ids[i] / 32] |= 1u << params->allowed_ids[i] % 32;
  slot.bad_ends.assign(params->bad_ends, params->bad_ends + params->bad_count);
  if (params->bad_count) slot.bad_ids.assign(params->bad_ids, params->bad_ids + slot.bad_ends.back());
  const size_t context = slot.context(), made = static_cast<size_t>(params->generated_count);
  slot.recent.assign(context, -1);  // of a token before the first one: no word has it
  std::copy(params->generated_ids + (made - std::min(context, made)), params->generated_ids + made,
            slot.recent.end() - static_cast<ptrdiff_t>(std::min(context, made)));
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

int32_t xk_sampler_sample(void *pool, xk_draw *draw) {
  const auto began = std::chrono::steady_clock::now();
  xk_sampler *sampler = draw->sampler;
  sampler->call++;
  for (int32_t j = 0; j < draw->rows; j++) {
    const int32_t slot = draw->slots[j];
    if (slot < 0 || slot >= static_cast<int32_t>(sampler->slots.size())) return XK_BAD_SLOT;
    if (!sampler->slots[slot].attached) return XK_DETACHED_SLOT;
    if (sampler->used[slot] == sampler->call) return XK_SLOT_TWICE;
    sampler->used[slot] = sampler->call;
  }
  const auto body = [](void *context, int64_t j, int thread) {
    const xk_draw &d = *static_cast<xk_draw *>(context);
    Row &row = d.sampler->workers[thread];
    const int64_t top = j * d.top_width;
    const Listed listed{d.logprobs + j, d.top_width, d.top_ids + top, d.top_logprobs + top};
    d.tokens[j] = sample(row, d.logits + j * row.vocab, d.sampler->slots[d.slots[j]], listed);
  };
  static_cast<xk::Pool *>(pool)->run(draw->rows, body, draw);
  draw->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  return XK_SAMPLED;
}

void xk_sampler_score(xk_sampler *sampler, void *pool, float *logits, int32_t rows, const int32_t *tokens,
                      float *logprobs, int32_t *ranks, int32_t top_width, int32_t *top_ids, float *top_logprobs) {
  const auto body = [=](int64_t j, int thread) {
    Row &row = sampler->workers[thread];
    const Listed listed{logprobs + j, top_width, top_ids + j * top_width, top_logprobs + j * top_width};
    ranks[j] = score(row, logits + j * row.vocab, tokens[j], listed);
  };
  static_cast<xk::Pool *>(pool)->run(
      rows, [](void *b, int64_t j, int thread) { (*static_cast<decltype(body) *>(b))(j, thread); },
      const_cast<void *>(static_cast<const void *>(&body)));
}
