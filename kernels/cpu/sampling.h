// C ABI of the sampler: per-slot state (parameters, history, position), and a draw for the rows of a step: the last
// part of an xk_run, or a call of its own. Calls on different slots may run at the same time; calls on the same slot,
// and two draws, must be ordered by the caller.
#pragma once
#include "xk.h"

typedef struct xk_sampler xk_sampler;

typedef struct {  // copied by xk_sampler_attach; ranges are checked by the Python binding
  uint64_t seed;
  double top_p;                                    // >= 1: off
  float temperature;                               // 0: greedy
  float min_p;                                     // 0: off
  float presence, frequency, repetition;           // 0, 0, 1: off
  int32_t top_k;                                   // <= 0: off
  int32_t sample_index, min_tokens;
  int32_t logprobs;                                // -1: off, else chosen + this many best
  int32_t processed;                               // their distribution: 0 the row's, 1 the one that is drawn from
  int32_t bias_count, suppress_count, prompt_count, generated_count;
  int32_t allowed_count, bad_count;                // 0: off
  const int32_t *bias_ids;                         // [bias_count] distinct
  const float *bias;                               // [bias_count]
  const int32_t *suppress_ids;                     // [suppress_count] never drawn before min_tokens tokens exist
  const int32_t *prompt_ids, *generated_ids;
  const int32_t *allowed_ids;                      // [allowed_count] all others are never drawn
  const int32_t *bad_ids, *bad_ends;               // bad_count sequences, one after the other, and where each ends: its
                                                   // last token is not drawn where those before it were just generated
  const uint32_t *mask;                            // not copied, [ceil(vocab / 32)], bit t % 32 of word t / 32: may
                                                   // token t be drawn now; read by every sample; NULL: all may
} xk_sampling_params;

enum { XK_SAMPLED = 0, XK_BAD_SLOT = 1, XK_DETACHED_SLOT = 2, XK_SLOT_TWICE = 3 };

// `workers` is the size of the pool that sample() will be given. NULL, and 1 from attach, mean that memory is short.
XK_API xk_sampler *xk_sampler_new(int32_t vocab, int32_t max_slots, int32_t workers);
XK_API void xk_sampler_free(xk_sampler *sampler);
XK_API int32_t xk_sampler_attach(xk_sampler *sampler, int32_t slot, const xk_sampling_params *params);
XK_API void xk_sampler_detach(xk_sampler *sampler, int32_t slot);

struct xk_draw {
  xk_sampler *sampler;
  float *logits;             // [rows, vocab], edited while the call runs and restored before it returns
  int32_t rows, top_width;
  const int32_t *slots;      // [rows]
  int32_t *tokens;           // [rows]; -1 of a row with a NaN, with +inf, or with nothing above -inf; -3 of one with
                             // nothing left by masks, allowed ids and bad words; both leave their slot as it was
  float *logprobs;           // [rows]; NaN of a row that asked for none
  int32_t *top_ids;          // [rows, top_width]; unused cells are -1 and -inf
  float *top_logprobs;       // [rows, top_width]
  double seconds;            // what it took, once it is drawn
};

// pool: from xk_runner_pool. One of XK_*; anything but XK_SAMPLED means that nothing was sampled.
XK_API int32_t xk_sampler_sample(void *pool, xk_draw *draw);

// Nothing is drawn from these rows: the logprobs of given tokens [rows], as raw ones, their ranks (1: no token is more
// likely), and the best ones. NaN and rank 0 for a row that nothing could be drawn from. No slot is read or changed.
XK_API void xk_sampler_score(xk_sampler *sampler, void *pool, float *logits, int32_t rows, const int32_t *tokens,
                             float *logprobs, int32_t *ranks, int32_t top_width, int32_t *top_ids,
                             float *top_logprobs);
