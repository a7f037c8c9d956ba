// Rotary positions and the KV writes, alone (rope, kv_write, latent_write) and fused with the query/key norms
// (qk_norm_rope_write). cos and sin hold one row of rotary_dim per token: halves repeated (c0..cn c0..cn) for the split form,
// neighbours repeated (c0 c0 c1 c1 ..) for the interleaved one, as transformers hands them to its rotate functions. Dims from
// rotary_dim on pass through.
#include "common.h"
#include "kv.h"
#include "norm.h"

namespace XK_LEVEL {
namespace {

void rotate(const float *x, const float *cos, const float *sin, float *out, int64_t dim, int64_t rotary, bool interleaved) {
  const int64_t half = rotary / 2;
  if (interleaved) {
    for (int64_t i = 0; i < rotary; i += 2) {
      const float a = x[i], b = x[i + 1];
      out[i] = a * cos[i] - b * sin[i];
      out[i + 1] = b * cos[i + 1] + a * sin[i + 1];
    }
  } else {
    for (int64_t i = 0; i < half; i += 16) {
      const int64_t n = half - i;
      const f32x16 a = load_some(x + i, n), b = load_some(x + half + i, n);
      const f32x16 low = a * load_some(cos + i, n) - b * load_some(sin + i, n);
      store_some(out + half + i, b * load_some(cos + half + i, n) + a * load_some(sin + half + i, n), n);
      store_some(out + i, low, n);
    }
  }
  if (out != x)
    for (int64_t i = rotary; i < dim; i++) out[i] = x[i];
}

const char *check_rotary(int64_t head_dim, int64_t rotary) {
  return rotary < 0 || rotary > head_dim || rotary % 2 ? "rotary_dim must be even and at most head_dim" : nullptr;
}

// --- rope: x, cos, sin, out; heads head_dim rotary_dim interleaved ---

const char *check_rope(const Call &c) {
  if (c.ints[0] < 1 || c.ints[1] < 1) return "heads and head_dim must be positive";
  return check_rotary(c.ints[1], c.ints[2]);
}
int64_t rope_units(const Call &c, const Step &s) { return row_units(c.rows(s), c.ints[0] * c.ints[1]); }

void run_rope(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t heads = c.ints[0], dim = c.ints[1], rotary = c.ints[2], width = heads * dim;
  const Rows rows = rows_of(unit, c.rows(s), width);
  for (int64_t r = rows.begin; r < rows.end; r++)
    for (int64_t h = 0; h < heads; h++)
      rotate(c.arg<const float>(0, s) + r * width + h * dim, c.arg<const float>(1, s) + r * rotary,
             c.arg<const float>(2, s) + r * rotary, c.arg<float>(3, s) + r * width + h * dim, dim, rotary, c.ints[3] != 0);
}

// --- kv_write: k, v; latent_write: latent, rope, one after the other the key of one head; layer_offset group_bytes ... ---

KvPlace write_place(const Call &c) { return {c.ints[0], c.ints[1], c.ints[2], c.ints[3], c.ints[4]}; }
KvPlace latent_place(const Call &c) { return {c.ints[0], c.ints[1], 1, c.ints[2] + c.ints[3], 0}; }

template <class Kv>
const char *check_write(const Call &c) {
  if (!c.every_token()) return "writes every token of the step: rows must be T";
  if (c.ints[4] < 1) return "value_dim must be positive";
  return check_kv<Kv>(write_place(c));
}

template <class Kv>
const char *check_latent(const Call &c) {
  if (!c.every_token()) return "writes every token of the step: rows must be T";
  if (c.ints[2] < 1 || c.ints[3] < 1) return "latent_dim and rope_dim must be positive";
  return check_kv<Kv>(latent_place(c));
}

int64_t tile_units(const Call &, const Step &s) { return s.tiles; }

template <class Kv>
void run_write(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const KvPlace place = write_place(c);
  uint8_t *span = s.batch.seq_kv[s.tile_seq[unit]];
  for (int64_t r = s.tile_row[unit]; r < s.tile_row[unit] + s.tile_rows[unit]; r++)
    for (int64_t h = 0; h < place.kv_heads; h++) {
      const int64_t position = s.batch.positions[r], at = r * place.kv_heads + h;
      kv_put<Kv>(kv_group<Kv>(span, place, h, position), place, position, c.arg<const float>(0, s) + at * place.key_dim,
                 c.arg<const float>(1, s) + at * place.value_dim);
    }
}

template <class Kv>
void run_latent(const Call &c, const Step &s, int64_t unit, uint8_t *) {
  const int64_t latent = c.ints[2], rope = c.ints[3];
  uint8_t *span = s.batch.seq_kv[s.tile_seq[unit]];
  for (int64_t r = s.tile_row[unit]; r < s.tile_row[unit] + s.tile_rows[unit]; r++) {
    const int64_t position = s.batch.positions[r];
    typename Kv::Element *group = kv_group<Kv>(span, latent_place(c), 0, position);
    kv_put_key<Kv>(group, position, c.arg<const float>(0, s) + r * latent, 0, latent, 0);
    kv_put_key<Kv>(group, position, c.arg<const float>(1, s) + r * rope, latent, rope, 1);
  }
}

// --- qk_norm_rope_write ---

enum { kQkv, kQNorm, kKNorm, kCos, kSin, kQOut };
enum { kLayerOffset, kGroupBytes, kQHeads, kKvHeads, kHeadDim, kRotaryDim, kInterleaved };

KvPlace fused_place(const Call &c) {
  return {c.ints[kLayerOffset], c.ints[kGroupBytes], c.ints[kKvHeads], c.ints[kHeadDim], c.ints[kHeadDim]};
}

template <class Kv>
const char *check_fused(const Call &c) {
  if (!c.every_token()) return "writes every token of the step: rows must be T";
  if (c.ints[kQHeads] < 1) return "q_heads must be positive";
  const bool has_cos = c.args[kCos].kind != XK_NONE, has_sin = c.args[kSin].kind != XK_NONE;
  if (has_cos != has_sin) return "cos and sin come together or not at all";
  if (has_cos ? check_rotary(c.ints[kHeadDim], c.ints[kRotaryDim]) != nullptr : c.ints[kRotaryDim] != 0)
    return has_cos ? check_rotary(c.ints[kHeadDim], c.ints[kRotaryDim]) : "rotary_dim must be 0 without cos and sin";
  return check_kv<Kv>(fused_place(c));
}

int64_t fused_scratch(const Call &c) { return c.ints[kHeadDim] * (int64_t)sizeof(float); }

template <class Kv>
void run_fused(const Call &c, const Step &s, int64_t unit, uint8_t *scratch) {
  const int64_t q_heads = c.ints[kQHeads], kv_heads = c.ints[kKvHeads], dim = c.ints[kHeadDim], rotary = c.ints[kRotaryDim];
  const float *q_norm = c.arg<const float>(kQNorm, s), *k_norm = c.arg<const float>(kKNorm, s);
  const float *cos = c.arg<const float>(kCos, s), *sin = c.arg<const float>(kSin, s);
  uint8_t *span = s.batch.seq_kv[s.tile_seq[unit]];
  float *key = (float *)scratch;
  const KvPlace place = fused_place(c);
  for (int64_t r = s.tile_row[unit]; r < s.tile_row[unit] + s.tile_rows[unit]; r++) {
    const float *row = c.arg<const float>(kQkv, s) + r * (q_heads + 2 * kv_heads) * dim;
    const auto transform = [&](const float *x, const float *norm, float *out) {
      const float *from = x;
      if (norm) {
        scale_row(x, norm, inverse_rms(x, dim, c.floats[0]), out, dim);
        from = out;
      }
      rotate(from, cos + r * rotary, sin + r * rotary, out, dim, rotary, c.ints[kInterleaved] != 0);
    };
    for (int64_t h = 0; h < q_heads; h++) transform(row + h * dim, q_norm, c.arg<float>(kQOut, s) + (r * q_heads + h) * dim);
    const int64_t position = s.batch.positions[r];
    for (int64_t h = 0; h < kv_heads; h++) {
      transform(row + (q_heads + h) * dim, k_norm, key);
      kv_put<Kv>(kv_group<Kv>(span, place, h, position), place, position, key, row + (q_heads + kv_heads + h) * dim);
    }
  }
}

constexpr const char *kWriteInts = "layer_offset group_bytes kv_heads key_dim value_dim";
constexpr const char *kLatentInts = "layer_offset group_bytes latent_dim rope_dim";
constexpr const char *kFusedArgs = "qkv q_norm? k_norm? cos? sin? q_out";
constexpr const char *kFusedInts = "layer_offset group_bytes q_heads kv_heads head_dim rotary_dim interleaved";

}  // namespace

const Kernel rope_kernels[] = {
    {"rope.f32", "x cos sin out", "heads head_dim rotary_dim interleaved", "", check_rope, no_scratch, rope_units, run_rope},
    {"kv_write.f32", "k v", kWriteInts, "", check_write<KvF32>, no_scratch, tile_units, run_write<KvF32>},
    {"kv_write.bf16", "k v", kWriteInts, "", check_write<KvBf16>, no_scratch, tile_units, run_write<KvBf16>},
    {"kv_write.i8", "k v", kWriteInts, "", check_write<KvInt8>, no_scratch, tile_units, run_write<KvInt8>},
    {"latent_write.f32", "latent rope", kLatentInts, "", check_latent<KvF32>, no_scratch, tile_units, run_latent<KvF32>},
    {"latent_write.bf16", "latent rope", kLatentInts, "", check_latent<KvBf16>, no_scratch, tile_units, run_latent<KvBf16>},
    {"latent_write.i8", "latent rope", kLatentInts, "", check_latent<KvInt8>, no_scratch, tile_units, run_latent<KvInt8>},
    {"qk_norm_rope_write.f32", kFusedArgs, kFusedInts, "eps", check_fused<KvF32>, fused_scratch, tile_units, run_fused<KvF32>},
    {"qk_norm_rope_write.bf16", kFusedArgs, kFusedInts, "eps", check_fused<KvBf16>, fused_scratch, tile_units, run_fused<KvBf16>},
    {"qk_norm_rope_write.i8", kFusedArgs, kFusedInts, "eps", check_fused<KvInt8>, fused_scratch, tile_units, run_fused<KvInt8>},
    {},
};

}  // namespace XK_LEVEL
