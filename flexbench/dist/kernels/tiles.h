/* Around a tile of a product, for one type: how rows of x get into it, and its sums out of it.
 * Included for each TYPE, of which STEP inputs are multiplied at once. TILE_ROWS rows by PANEL
 * outputs are a tile. */

/* x, (rows, K), to (K / STEP, rows, STEP), as a tile reads it: rows far from each other, at powers of
 * two above all, would drive each other out of the cache. */
INLINE void OF_TYPE(pack_rows)(const TYPE *restrict x, TYPE *restrict to, int64_t rows, int64_t K) {
    for (int64_t k = 0; k < K; k += STEP)
        for (int64_t m = 0; m < rows; m++, to += STEP)
            memcpy(to, x + m * K + k, STEP * sizeof(TYPE));
}

/* The rows of a block are cut into tiles of nearly the same size; this is where number t begins. */
INLINE int64_t OF_TYPE(tile_start)(int64_t t, int64_t rows) {
    return t * rows / ((rows + TILE_ROWS - 1) / TILE_ROWS);
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
static __attribute__((noinline)) void OF_TYPE(finish)(const float *sums, const struct epilogue *then,
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
