// Layers that carry a state of fixed size: causal_conv and gated_delta. A sequence's state lies `back` bytes before its first group
// of tokens, that of a call `offset` floats further on. A unit is a part of one sequence that no other unit needs (channels, or
// columns of one head) and takes its tokens one after the other, so that a token's bits depend on its own sequence alone, however
// a prompt was cut. At position 0 the state is zero, whatever the memory holds.
#include <math.h>

#include "activation.h"
#include "common.h"

namespace XK_LEVEL {
namespace {


const char *check_state(const Call &c, int64_t back, int64_t offset, int64_t floats) {
  if (!c.every_token()) return "works on every token of the step: rows must be T";
  if (back < 0 || back % 4 || offset < 0) return "back must be whole floats, and neither it nor offset negative";
  if (floats < 0 || 4 * (offset + floats) > back) return "the state does not fit: offset and what is kept exceed back";
  return nullptr;
}

float *state_of(const Step &s, int64_t sequence, int64_t back, int64_t offset) {
  return (float *)(s.batch.seq_kv[sequence] - back) + offset;
}

// --- causal_conv: x [T, C], weight [C, K], bias [C], out [T, C]; keeps the last K - 1 rows of x, [K - 1, C] ---

namespace conv {

enum { kX, kWeight, kBias, kOut };
enum { kBack, kOffset, kChannels, kTaps };

constexpr int64_t kBlock = 256;  // channels of a unit

struct Same {
  XK_INLINE f32x16 of(f32x16 x) { return x; }
};

const char *check(const Call &c) {
  if (c.ints[kChannels] < 1 || c.ints[kTaps] < 1) return "channels and taps must be positive";
  return check_state(c, c.ints[kBack], c.ints[kOffset], c.ints[kChannels] * (c.ints[kTaps] - 1));
}

int64_t scratch(const Call &c) { return 2 * c.ints[kTaps] * kBlock * (int64_t)sizeof(float); }
int64_t blocks(const Call &c) { return (c.ints[kChannels] + kBlock - 1) / kBlock; }
int64_t units(const Call &c, const Step &s) { return s.batch.N * blocks(c); }

template <class F>
void run(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t channels = c.ints[kChannels], taps = c.ints[kTaps], kept = taps - 1;
  const int64_t sequence = unit / blocks(c), channel = unit % blocks(c) * kBlock, width = min(kBlock, channels - channel);
  const int64_t first = s.batch.seq_start[sequence], rows = s.batch.seq_start[sequence + 1] - first;
  if (rows < 1) return;
  float *weight = (float *)memory, *past = weight + taps * kBlock;  // [taps][kBlock] each
  float *state = state_of(s, sequence, c.ints[kBack], c.ints[kOffset]) + channel;
  const float *taken = c.arg<const float>(kWeight, s) + channel * taps;
  memset(memory, 0, (size_t)scratch(c));
  for (int64_t i = 0; i < width; i++)
    for (int64_t j = 0; j < taps; j++) weight[j * kBlock + i] = taken[i * taps + j];
  if (s.batch.positions[first] > 0)
    for (int64_t r = 0; r < kept; r++) memcpy(past + r * kBlock, state + r * channels, (size_t)width * sizeof(float));
  const float *x = c.arg<const float>(kX, s) + first * channels + channel, *bias = c.arg<const float>(kBias, s);
  float *out = c.arg<float>(kOut, s) + first * channels + channel;
  const auto input = [&](int64_t token) { return token < 0 ? past + (kept + token) * kBlock : x + token * channels; };
  for (int64_t t = 0; t < rows; t++)
    for (int64_t i = 0; i < width; i += 16) {
      f32x16 sum = zero();
      for (int64_t j = 0; j < taps; j++)
        sum = fma(load(weight + j * kBlock + i), load_some(input(t - kept + j) + i, width - i), sum);
      if (bias) sum = sum + load_some(bias + channel + i, width - i);
      store_some(out + t * channels + i, F::of(sum), width - i);
    }
  for (int64_t r = 0; r < kept; r++) memcpy(state + r * channels, input(rows - kept + r), (size_t)width * sizeof(float));
}

constexpr const char *kArgs = "x weight bias? out", *kInts = "back offset channels taps";

}  // namespace conv

// --- gated_delta: q and k [T, Hk, D], v [T, Hv, Dv], each inside rows of its stride; decay and beta [T, Hv]; out [T, Hv, Dv]. Keeps
// [Hv, D, Dv]. With a_log and dt_bias [Hv], decay and beta are raw: the decay is -exp(a_log) softplus(decay + dt_bias), beta is
// beta_scale sigmoid(beta). ---

namespace delta {

enum { kQ, kK, kV, kDecay, kBeta, kALog, kDtBias, kOut };
enum { kBack, kOffset, kKeyHeads, kHeads, kKeyDim, kValueDim, kQStart, kQStride, kKStart, kKStride, kVStart, kVStride };
enum { kScale, kEps, kBetaScale };

constexpr int64_t kSlice = 32;  // columns of the state in a unit: they stay in L1 while the tokens pass

const char *check(const Call &c) {
  const int64_t *n = c.ints, keys = n[kKeyHeads] * n[kKeyDim];
  if (n[kKeyHeads] < 1 || n[kKeyDim] < 1 || n[kValueDim] < 1) return "k_heads, key_dim and value_dim must be positive";
  if (n[kHeads] < 1 || n[kHeads] % n[kKeyHeads]) return "v_heads must be a positive multiple of k_heads";
  if (n[kQStart] < 0 || n[kKStart] < 0 || n[kVStart] < 0) return "starts must not be negative";
  if ((c.args[kALog].kind == XK_NONE) != (c.args[kDtBias].kind == XK_NONE)) return "a_log and dt_bias come together";
  if (n[kQStart] + keys > n[kQStride] || n[kKStart] + keys > n[kKStride] || n[kVStart] + n[kHeads] * n[kValueDim] > n[kVStride])
    return "queries, keys and values must fit in their strides";
  return check_state(c, n[kBack], n[kOffset], n[kHeads] * n[kKeyDim] * n[kValueDim]);
}

// Scratch of a thread: the slice of the state, a query and a key, and the factors of sixteen tokens.
int64_t scratch(const Call &c) { return (int64_t)sizeof(float) * (c.ints[kKeyDim] * kSlice + 2 * padded(c.ints[kKeyDim]) + 32); }
int64_t slices(const Call &c) { return (c.ints[kValueDim] + kSlice - 1) / kSlice; }
int64_t units(const Call &c, const Step &s) { return s.batch.N * c.ints[kHeads] * slices(c); }

// log(1 + e^x) as max(x, 0) + 2 atanh(u / (2 + u)), u = e^-|x|.
XK_INLINE f32x16 softplus(f32x16 x) {
  const f32x16 u = exp(zero() - abs(x)), y = u / (set1(2.0f) + u), s = y * y;
  f32x16 p = set1(2.0f / 15);
  p = fma(p, s, set1(2.0f / 13));
  p = fma(p, s, set1(2.0f / 11));
  p = fma(p, s, set1(2.0f / 9));
  p = fma(p, s, set1(2.0f / 7));
  p = fma(p, s, set1(2.0f / 5));
  p = fma(p, s, set1(2.0f / 3));
  return max(x, zero()) + fma(p * s, y, y + y);
}

// exp(decay) and beta of the next (at most sixteen) tokens of a head.
void factors(const Call &c, const Step &s, int64_t row, int64_t rows, int64_t head, float *decay, float *beta) {
  const int64_t heads = c.ints[kHeads];
  const float *g = c.arg<const float>(kDecay, s) + row * heads + head, *b = c.arg<const float>(kBeta, s) + row * heads + head;
  memset(decay, 0, 16 * sizeof(float));
  memset(beta, 0, 16 * sizeof(float));
  for (int64_t t = 0; t < rows; t++) decay[t] = g[t * heads], beta[t] = b[t * heads];
  f32x16 log_decay = load(decay);
  if (const float *a_log = c.arg<const float>(kALog, s)) {
    log_decay = softplus(log_decay + set1(c.arg<const float>(kDtBias, s)[head])) * (zero() - set1(exp(a_log[head])));
    store(beta, set1(c.floats[kBetaScale]) / (set1(1.0f) + exp(zero() - load(beta))));
  }
  store(decay, exp(log_decay));
}

// A query or key as it is used: divided by its length where eps asks for it, times scale.
void prepare(const float *x, int64_t dim, float eps, float scale, float *out) {
  f32x16 squares = zero();
  for (int64_t i = 0; i < dim; i += 16) {
    const f32x16 a = load_some(x + i, dim - i);
    squares = fma(a, a, squares);
  }
  const f32x16 factor = set1(eps > 0 ? scale / sqrtf(reduce_add(squares) + eps) : scale);
  for (int64_t i = 0; i < dim; i += 16) store(out + i, load_some(x + i, dim - i) * factor);
}

// One token: what the state answers to key and query, then the state with the token in it. The answer to the query after the
// update is the one before it plus (q k) times the update.
void token(float *state, const float *q, const float *k, int64_t dim, float decay, float beta, const float *v, float *out,
           int64_t width) {
  f32x16 held[2] = {zero(), zero()}, asked[2] = {zero(), zero()}, products = zero(), update[2];
  for (int64_t i = 0; i < dim; i++) {
    const f32x16 a = set1(k[i]), b = set1(q[i]);
    for (int j = 0; j < 2; j++) {
      const f32x16 column = load(state + i * kSlice + j * 16);
      held[j] = fma(a, column, held[j]);
      asked[j] = fma(b, column, asked[j]);
    }
  }
  for (int64_t i = 0; i < dim; i += 16) products = fma(load(q + i), load(k + i), products);
  const f32x16 shrink = set1(decay), along = set1(reduce_add(products));
  for (int j = 0; j < 2 && j * 16 < width; j++) {
    update[j] = (load_some(v + j * 16, width - j * 16) - shrink * held[j]) * set1(beta);
    store_some(out + j * 16, fma(along, update[j], shrink * asked[j]), width - j * 16);
  }
  if (width <= 16) update[1] = zero();
  for (int64_t i = 0; i < dim; i++) {
    const f32x16 a = set1(k[i]);
    for (int j = 0; j < 2; j++) {
      float *column = state + i * kSlice + j * 16;
      store(column, fma(a, update[j], shrink * load(column)));
    }
  }
}

void run(const Call &c, const Step &s, int64_t unit, uint8_t *memory) {
  const int64_t *n = c.ints, dim = n[kKeyDim], value_dim = n[kValueDim], heads = n[kHeads];
  const int64_t slice = unit % slices(c), head = unit / slices(c) % heads, sequence = unit / slices(c) / heads;
  const int64_t first = s.batch.seq_start[sequence], end = s.batch.seq_start[sequence + 1];
  const int64_t column = slice * kSlice, width = min(kSlice, value_dim - column), key = head / (heads / n[kKeyHeads]) * dim;
  if (end <= first) return;
  float *state = (float *)memory, *q = state + dim * kSlice, *k = q + padded(dim), *decay = k + padded(dim), *beta = decay + 16;
  float *kept = state_of(s, sequence, n[kBack], n[kOffset]) + head * dim * value_dim + column;
  memset(state, 0, (size_t)(dim * kSlice) * sizeof(float));
  if (s.batch.positions[first] > 0)
    for (int64_t i = 0; i < dim; i++) memcpy(state + i * kSlice, kept + i * value_dim, (size_t)width * sizeof(float));
  for (int64_t row = first; row < end; row++) {
    const int64_t lane = (row - first) % 16;
    if (lane == 0) factors(c, s, row, min(16, end - row), head, decay, beta);
    prepare(c.arg<const float>(kQ, s) + row * n[kQStride] + n[kQStart] + key, dim, c.floats[kEps], c.floats[kScale], q);
    prepare(c.arg<const float>(kK, s) + row * n[kKStride] + n[kKStart] + key, dim, c.floats[kEps], 1.0f, k);
    const float *v = c.arg<const float>(kV, s) + row * n[kVStride] + n[kVStart] + head * value_dim + column;
    float *out = c.arg<float>(kOut, s) + (row * heads + head) * value_dim + column;
    token(state, q, k, dim, decay[lane], beta[lane], v, out, width);
  }
  for (int64_t i = 0; i < dim; i++) memcpy(kept + i * value_dim, state + i * kSlice, (size_t)width * sizeof(float));
}

constexpr const char *kInts =
    "back offset k_heads v_heads key_dim value_dim q_start q_stride k_start k_stride v_start v_stride";

}  // namespace delta

}  // namespace

const Kernel recurrent_kernels[] = {
    {"causal_conv.f32", conv::kArgs, conv::kInts, "", conv::check, conv::scratch, conv::units, conv::run<conv::Same>},
    {"causal_conv_silu.f32", conv::kArgs, conv::kInts, "", conv::check, conv::scratch, conv::units, conv::run<Silu>},
    {"causal_conv_gelu.f32", conv::kArgs, conv::kInts, "", conv::check, conv::scratch, conv::units, conv::run<Gelu>},
    {"causal_conv_gelu_tanh.f32", conv::kArgs, conv::kInts, "", conv::check, conv::scratch, conv::units,
     conv::run<GeluTanh>},
    {"gated_delta.f32", "q k v decay beta a_log? dt_bias? out", delta::kInts, "scale eps beta_scale", delta::check,
     delta::scratch, delta::units, delta::run},
    {},
};

}  // namespace XK_LEVEL
