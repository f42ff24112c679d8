/* Attention of prompts of one type: included by prefill_attention.c for each TYPE, of which STEP
 * inputs are multiplied at once. */
#include "tiles.h"

/* Keys or values of one prompt and head, (S, D) with `stride` elements from row to row, as what is
 * multiplied with queries or weights: panels (S / PANEL, D / STEP, PANEL, STEP) of keys, and
 * (D / PANEL, S / STEP, PANEL, STEP) of values. Filled up with 0. */
static void OF_TYPE(pack_keys)(const TYPE *restrict k, TYPE *restrict to, int64_t S, int64_t D,
                               int64_t stride) {
    for (int64_t panel = 0; panel < S; panel += PANEL)
        for (int64_t d = 0; d < D; d += STEP)
            for (int64_t s = panel; s < panel + PANEL; s++, to += STEP) {
                if (s < S)
                    memcpy(to, k + s * stride + d, STEP * sizeof(TYPE));
                else
                    memset(to, 0, STEP * sizeof(TYPE));
            }
}

static void OF_TYPE(pack_values)(const TYPE *restrict v, TYPE *restrict to, int64_t S, int64_t D,
                                 int64_t filled, int64_t stride) {
    for (int64_t panel = 0; panel < D; panel += PANEL) {
        int64_t count = D - panel < PANEL ? D - panel : PANEL;
        for (int64_t s = 0; s < filled; s += STEP, to += PANEL * STEP)
            for (int64_t step = 0; step < STEP; step++) {
                const TYPE *from = v + (s + step) * stride + panel;
                int64_t num = s + step < S ? count : 0;
                for (int64_t d = 0; d < num; d++)
                    to[d * STEP + step] = from[d];
                for (int64_t d = num; d < PANEL; d++)
                    to[d * STEP + step] = 0;
            }
    }
}

/* Scores of one query, in pieces of PANEL that are `apart`, to weights at `to`, one for STEP inputs
 * after `rows` of them. The first `seen` positions are looked at, the others up to `filled` get 0.
 * Returns the sum of the weights. */
static float OF_TYPE(weigh)(const float *scores, int64_t apart, OF_TYPE(inputs) *to, int64_t rows,
                            int64_t seen, int64_t filled, float scale) {
    floats highest = (floats){0} + MASKED, sums = {0};
    for (int64_t s = 0; s < filled; s += 16) {
        floats score = load(scores + s / PANEL * apart + s % PANEL);
        highest = choose((score > highest) & is_below(seen - s), score, highest);
    }
    float most = largest(highest), sum = 0.0f;
    for (int64_t s = 0; s < filled; s += 16) {
        floats score = load(scores + s / PANEL * apart + s % PANEL);
        floats weights = OF_TYPE(round)(exp_negative(scale * (score - most)));
        weights = choose(is_below(seen - s), weights, (floats){0});
        sums += weights;
        OF_TYPE(inputs) narrowed[16];
        OF_TYPE(store)(weights, narrowed);
        for (int i = 0; i < 16; i += STEP)
            memcpy(to + (s + i) * rows, narrowed + i, STEP * sizeof *narrowed);
    }
    for (int i = 0; i < 16; i++)
        sum += sums[i];
    return sum;
}

/* Asks for rows of one head, which lie far from each other: no processor foresees that. */
INLINE void OF_TYPE(ask_for_rows)(const TYPE *x, int64_t first, int64_t rows, int64_t D, int64_t stride) {
    for (int64_t row = first; row < first + rows; row++)
        for (int64_t d = 0; d < D; d += LINE / (int64_t)sizeof(TYPE))
            __builtin_prefetch(x + row * stride + d, 0, 2);
}

/* Queries first to first + rows of one prompt and head, of which keys and values are packed, with
 * `most` positions. `scores` has room for rows * most numbers, `packed` for that and for rows * D. */
static void OF_TYPE(some_queries)(const TYPE *q, const TYPE *keys, const TYPE *values, TYPE *out,
                                  float *scores, OF_TYPE(inputs) *packed, int64_t first, int rows,
                                  int64_t most, int64_t D, int64_t q_stride, int64_t out_stride,
                                  float scale) {
    int64_t filled = (first + rows + PANEL - 1) / PANEL * PANEL, apart = rows * PANEL;
    float sums[TILE_ROWS], found[TILE_ROWS * PANEL];
    for (int64_t d = 0; d < D; d += STEP)
        for (int m = 0; m < rows; m++)
            OF_TYPE(put)(q + (first + m) * q_stride + d, packed + d * rows + m * STEP);
    for (int64_t s = 0; s < filled; s += PANEL)
        OF_TYPE(some_rows)(packed, keys + s * D, scores + s * rows, D, 0, -1, 0, rows);
    for (int m = 0; m < rows; m++)
        sums[m] = OF_TYPE(weigh)(scores + m * PANEL, apart, packed + m * STEP, rows, first + m + 1,
                                 filled, scale);
    for (int64_t d = 0; d < D; d += PANEL) {
        int64_t count = D - d < PANEL ? D - d : PANEL;
        OF_TYPE(some_rows)(packed, values + d * most, found, filled, 0, -1, 0, rows);
        for (int m = 0; m < rows; m++)
            for (int64_t n = 0; n < count; n++)
                out[(first + m) * out_stride + d + n] =
                    OF_TYPE(narrow)(found[m * PANEL + n] / sums[m]);
    }
}

/* q, k, v: (B, S, H, D), with the elements of a head contiguous and `prompt`, `position` and `head`
 * elements from one to the next in all three; out: (B, S, H, D), contiguous. Of each prompt the
 * first positions are padding, as many as `padding` says, if it is given: nobody looks at them, and
 * their results are 0. D is a multiple of STEP. Each thread has `scratch_size` of scratch and
 * `scores_size` of scores: with S and D filled up to whole panels, F and E, that is F (D + E), and
 * TILE_ROWS (F + max(F, D)). */
void OF_TYPE(attend_prompts)(const TYPE *q, const TYPE *k, const TYPE *v, const int64_t *padding,
                             TYPE *out, TYPE *scratch, float *scores, int64_t scratch_size,
                             int64_t scores_size, int64_t B, int64_t S, int64_t H, int64_t D,
                             int64_t prompt, int64_t position, int64_t head, float scale,
                             int32_t num_threads) {
#pragma omp parallel for schedule(static) collapse(2) num_threads(num_threads)
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++) {
            int64_t start = padding ? padding[b] : 0, seen = S - start;
            int64_t filled = (seen + PANEL - 1) / PANEL * PANEL;
            int64_t at = b * prompt + start * position + h * head;
            TYPE *own_out = out + (b * S * H + h) * D;
            TYPE *keys = scratch + omp_get_thread_num() * scratch_size;
            TYPE *values = keys + filled * D;
            float *own = scores + omp_get_thread_num() * scores_size;
            OF_TYPE(inputs) *packed = (OF_TYPE(inputs) *)(own + TILE_ROWS * filled);
            OF_TYPE(pack_keys)(k + at, keys, seen, D, position);
            OF_TYPE(pack_values)(v + at, values, seen, D, filled, position);
            for (int64_t s = 0; s < start; s++)
                memset(own_out + s * H * D, 0, D * sizeof(TYPE));
            int64_t tiles = (seen + TILE_ROWS - 1) / TILE_ROWS;
            int64_t next = b + 1 < B ? (b + 1) * prompt + (padding ? padding[b + 1] : 0) * position : at;
            int64_t after = h + 1 < H ? at + head : next;
            for (int64_t t = 0; t < tiles; t++) {
                int64_t first = OF_TYPE(tile_start)(t, seen);
                int64_t rows = OF_TYPE(tile_start)(t + 1, seen) - first;
                OF_TYPE(ask_for_rows)(q + after, first, rows, D, position);
                OF_TYPE(ask_for_rows)(k + after, first, rows, D, position);
                OF_TYPE(ask_for_rows)(v + after, first, rows, D, position);
                OF_TYPE(some_queries)(q + at, keys, values, own_out + start * H * D, own, packed, first,
                                      (int)rows, filled, D, position, H * D, scale);
            }
        }
}
