/* The halves of decoder layers for one new position of each prompt, as many as follow each other in
 * one call.
 *
 * There is little to compute for a few prompts: asking for norm, products and attention one by one,
 * with memory for each result, took as long as a quarter of it, and asking for halves one by one a
 * tenth. It is compiled where it runs, by native.py.
 *
 * Letters: B prompts, h hidden size, H heads, D head size, L positions until now with the new one.
 * Hidden states are (B, h); keys and values are (L, B H, D).
 */
#include <math.h>
#include <stdlib.h>
#include <time.h>

#include "kernels.h"

#define ALIGNMENT 64

/* A matrix (N, K) in panels, of the model's type or, with a group size, of 4 bits. */
struct matrix {
    const void *panels, *bias;
    int64_t num_outputs, num_inputs, group_size;
};

struct norm {
    const void *weight, *bias;
    float epsilon;
    int32_t is_first; /* before all else, or else after the residual is added */
};

struct attention {
    struct norm norm;
    struct matrix qkv, out;
    int64_t num_heads;
};

struct mlp {
    struct norm norm;
    struct matrix fc1, fc2;
};

/* One of both, and for attention the cache: keys and values, (L, B H, D), with room for the new ones. */
struct half {
    const struct attention *attention;
    const struct mlp *mlp;
    void *keys, *values;
};

/* Seconds, from some moment on. */
static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Memory for what lies between, taken piece by piece. */
struct room {
    char *next;
};

INLINE int64_t rounded(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

INLINE void *take(struct room *room, int64_t bytes) {
    void *taken = room->next;
    room->next += rounded(bytes);
    return taken;
}

/* What `product` takes at most, of all types. */
static int64_t product_bytes(const struct matrix *w, int64_t M, int32_t num_threads) {
    int64_t K = w->num_inputs;
    if (w->group_size)
        return rounded(M * K * (int64_t)sizeof(bfloat16)) + rounded(M * K * (int64_t)sizeof(float)) +
               rounded(M * (K / w->group_size) * (int64_t)sizeof(float));
    return rounded(product_memory(M, w->num_outputs, K, num_threads) * (int64_t)sizeof(float));
}

#define TYPE float
#include "decode_layer.h"
#undef TYPE

#if MULTIPLIES_BFLOAT16
#define TYPE bfloat16
#include "decode_layer.h"
#endif
