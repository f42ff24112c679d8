/* Tiles of products of one type: how rows of x get into one, its sums, and how they get out.
 * Included for each TYPE, of which STEP inputs are multiplied at once. TILE_ROWS rows by PANEL
 * outputs are a tile. */

/* x, (rows, K), to (K / STEP, rows, STEP), as a tile reads it: rows far from each other, at powers of
 * two above all, would drive each other out of the cache. */
INLINE void OF_TYPE(pack_rows)(const TYPE *restrict x, OF_TYPE(inputs) *restrict to, int64_t rows,
                               int64_t K) {
    for (int64_t k = 0; k < K; k += STEP)
        for (int64_t m = 0; m < rows; m++, to += STEP)
            OF_TYPE(put)(x + m * K + k, to);
}

/* The rows of a block are cut into tiles of nearly the same size; this is where number t begins. */
INLINE int64_t OF_TYPE(tile_start)(int64_t t, int64_t rows) {
    return t * rows / ((rows + TILE_ROWS - 1) / TILE_ROWS);
}

/* Asks for lines. Where there are `lines`, one after `next` in each step: while a panel's later rows are
 * computed, the next panel is on its way. Else the panel itself is read from memory, and what is AHEAD
 * is asked for: the processor does so by itself within a page only. */
INLINE void OF_TYPE(ask)(const TYPE *weights, const char *next, int64_t lines, int64_t step,
                         const int steps) {
    const int bytes = steps * STEP * PANEL * (int)sizeof(TYPE);
    if (lines == 0) {
#pragma GCC unroll 8
        for (int at = 0; at < bytes; at += LINE)
            __builtin_prefetch((const char *)weights + AHEAD + at, 0, 2);
    } else if (step < lines) {
#pragma GCC unroll 8
        for (int i = 0; i < steps; i++)
            __builtin_prefetch(next + (step + i) * LINE, 0, 2);
    }
}

/* Sums (rows, PANEL) of some packed rows and a panel, added to what is there if `is_more`. `next` and
 * `lines` are as for `ask`. */
INLINE void OF_TYPE(tile)(const OF_TYPE(inputs) *restrict x, const TYPE *restrict w,
                          float *restrict out, int64_t K, const char *next, int64_t lines,
                          int32_t is_more, const int rows) {
    /* Steps of two inputs are long enough, and several of them have too few registers. */
    const int at_once = STEP == 1 ? STEPS_AT_ONCE : 1;
    lanes sums[TILE_ROWS][2];
    if (is_more)
        memcpy(sums, out, sizeof(lanes) * 2 * rows);
    else
        for (int m = 0; m < rows; m++)
            sums[m][0] = sums[m][1] = (lanes){0};
    int64_t step = 0, steps = K / STEP;
    for (; step + at_once <= steps; step += at_once) {
        OF_TYPE(ask)(w + step * STEP * PANEL, next, lines, step, at_once);
#pragma GCC unroll 8
        for (int64_t i = step; i < step + at_once; i++)
            OF_TYPE(step)(sums, x + i * STEP * rows, w + i * STEP * PANEL, rows);
    }
    for (; step < steps; step++)
        OF_TYPE(step)(sums, x + step * STEP * rows, w + step * STEP * PANEL, rows);
    memcpy(out, sums, sizeof(lanes) * 2 * rows);
}

static __attribute__((unused)) void OF_TYPE(some_rows)(const OF_TYPE(inputs) *x, const TYPE *w,
                                                       float *out, int64_t K, const char *next,
                                                       int64_t lines, int32_t is_more, int rows) {
#define CASE(count)                                                                                \
    case count:                                                                                    \
        OF_TYPE(tile)(x, w, out, K, next, lines, is_more, count);                                  \
        break;
    switch (rows) { /* what is known beforehand stays in registers */
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS == 12
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

INLINE void OF_TYPE(finish_row)(const float *restrict sums, const TYPE *bias, const TYPE *residual,
                                TYPE *out, int32_t is_relu, const int64_t count) {
    for (int64_t n = 0; n < count; n++) {
        float y = sums[n];
        if (bias)
            y += OF_TYPE(widen)(bias[n]);
        if (is_relu)
            y = y < 0.0f ? 0.0f : y; /* NaN stays NaN */
        if (residual)
            y += OF_TYPE(widen)(residual[n]);
        out[n] = OF_TYPE(narrow)(y);
    }
}

/* A tile's sums to `out`, from row `m` and output `n` on. */
static __attribute__((noinline, unused)) void OF_TYPE(finish)(const float *sums, const struct epilogue *then,
                                                      TYPE *out, int64_t m, int64_t n, int64_t N,
                                                      int64_t rows) {
    const TYPE *bias = then->bias ? (const TYPE *)then->bias + n : 0;
    for (int64_t end = m + rows; m < end; m++, sums += PANEL) {
        int64_t at = m * N + n;
        const TYPE *residual = then->residual ? (const TYPE *)then->residual + at : 0;
        if (N - n >= PANEL) /* what is known beforehand is vectorized without a remainder */
            OF_TYPE(finish_row)(sums, bias, residual, out + at, then->is_relu, PANEL);
        else
            OF_TYPE(finish_row)(sums, bias, residual, out + at, then->is_relu, N - n);
    }
}
