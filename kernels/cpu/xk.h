// The C interface of the library: everything Python (or any other host) may call. Plain data, no exceptions cross it.
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define XK_API extern "C" __attribute__((visibility("default")))
#else
#define XK_API extern "C"
#endif

typedef struct {               // one step
  int32_t T, S, N;             // tokens, logit rows, sequences
  const int32_t *ids;          // [T]; -1-r means "row r of prev_tokens"
  const int32_t *positions;    // [T] absolute, consecutive inside a sequence
  const int32_t *last;         // [S] row indices into T
  const int32_t *seq_start;    // [N+1] prefix sums
  uint8_t *const *seq_kv;      // [N] base of each sequence's contiguous KV span
  const int32_t *prev_tokens;  // sampled vector of the previous step, or NULL
} xk_batch;

enum { XK_NONE = 0, XK_ADDRESS = 1, XK_IDS = 2, XK_POSITIONS = 3, XK_LAST = 4 };
enum { XK_MAX_ARGS = 18, XK_MAX_INTS = 20, XK_MAX_FLOATS = 8 };

typedef struct {
  int32_t kind;  // XK_NONE .. XK_LAST
  void *address;
} xk_arg;

typedef struct {       // one call of a plan; args, ints and floats in the order of the kernel's own table
  const char *kernel;  // e.g. "linear.bf16"
  xk_arg args[XK_MAX_ARGS];
  int64_t ints[XK_MAX_INTS];
  float floats[XK_MAX_FLOATS];
  int64_t rows[3];  // rows[0] * T + rows[1] * S + rows[2] rows
} xk_call;

typedef struct xk_runner xk_runner;
typedef struct xk_draw xk_draw;  // sampling.h

XK_API const char *xk_error(void);     // what the last failed call of this thread said
XK_API const char *xk_levels(void);    // runnable levels, best last, separated by spaces
XK_API const char *xk_describe(void);  // one line per kernel: name|args|ints|floats; "?" marks an argument that may be none
XK_API xk_runner *xk_runner_new(int32_t threads, const char *level);
XK_API void xk_runner_free(xk_runner *runner);
XK_API void *xk_runner_pool(xk_runner *runner);  // its xk::Pool, for other parts of this library
XK_API int32_t xk_plan_add(xk_runner *runner, int32_t calls, const xk_call *call);  // index of the plan, or -1
// 0, -1, or how a draw was refused. seconds: [end - begin], set to the time each call took from the end of the one
// before; NULL costs nothing. draw: what is drawn from the rows once these calls have run; NULL: nothing.
XK_API int32_t xk_run(xk_runner *runner, int32_t plan, const xk_batch *batch, int32_t begin, int32_t end,
                      double *seconds, xk_draw *draw);
XK_API double xk_measure_read(xk_runner *runner, int64_t bytes, int32_t repeats);    // bytes per second, best of repeats
XK_API double xk_measure_fma(xk_runner *runner, int64_t rounds, int32_t repeats);    // float operations per second, best
// Checksums of the blocks of 1 MiB of some bytes, on so many threads: out [ceil(bytes / 2^20)][64]. 0 or -1.
XK_API int32_t xk_checksum(const void *data, int64_t bytes, int32_t threads, uint32_t *out);
XK_API void xk_pack_panels(const void *weight, int64_t row_stride_bytes, int32_t source_bf16, int64_t n, int64_t k,
                           int32_t target_bf16, void *out);
// Rows of a weight to int8 (bits 8) or int4 (bits 4) panels with a scale for every `group` inputs, or one for all (0); rounds to the
// nearest step, int4 at the scale with the least square error of a few. steps and scales, when given: [n, k] and
// [n, groups], the integers and scales to take as they are. Returns how many scales float16 cannot hold (0 when all is well).
XK_API int64_t xk_pack_quantised(const void *weight, int64_t row_stride_bytes, int32_t source_bf16, int64_t n, int64_t k, int32_t bits,
                                 int64_t group, const int8_t *steps, const float *scales, uint8_t *out);
