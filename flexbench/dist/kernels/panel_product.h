/* The product of one type: included by panel_product.c for each TYPE, of which STEP inputs are
 * multiplied at once. */
#include "tiles.h"

/* W, (N, K) with `stride` elements from row to row, to panels (N / PANEL, K / STEP, PANEL, STEP).
 * It is a piece of a larger matrix, of which it has the rows from `first` on. Those of the last
 * panel that no piece has are 0. */
void OF_TYPE(pack)(const TYPE *w, TYPE *panels, int64_t first, int64_t N, int64_t K, int64_t stride,
                   int32_t num_threads) {
    int64_t end = (first + N + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t panel = first / PANEL; panel < end; panel++) {
        TYPE *to = panels + panel * PANEL * K;
        int64_t start = panel * PANEL - first;
        for (int64_t k = 0; k < K; k += STEP)
            for (int64_t row = start; row < start + PANEL; row++, to += STEP) {
                if (row >= N)
                    memset(to, 0, STEP * sizeof(TYPE));
                else if (row >= 0)
                    memcpy(to, w + row * stride + k, STEP * sizeof(TYPE));
            }
    }
}

/* Asks for what is added to a tile's sums, and for where they go: it comes while they are computed.
 * Where nothing is added, asking gained nothing. */
INLINE void OF_TYPE(ask_for_residual)(const struct epilogue *then, TYPE *out, int64_t m, int64_t n,
                                      int64_t N, int64_t rows) {
    if (!then->residual)
        return;
    for (int64_t at = m * N + n; rows > 0; rows--, at += N)
        for (int64_t i = 0; i < PANEL; i += LINE / (int64_t)sizeof(TYPE)) {
            __builtin_prefetch((const TYPE *)then->residual + at + i, 0, 3);
            __builtin_prefetch(out + at + i, 1, 3);
        }
}

/* One panel of outputs, n from panel * PANEL on, of `rows` packed rows, m from `first` on: what the
 * inputs from `k` to `end` add to `sums`, (rows, PANEL). */
static void OF_TYPE(panel)(const OF_TYPE(inputs) *x, const TYPE *panels,
                           const struct epilogue *then, TYPE *out, float *sums, int64_t N,
                           int64_t K, int64_t panel, int64_t first, int64_t rows, int64_t k,
                           int64_t end) {
    const TYPE *w = panels + (panel * K + k) * PANEL;
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t lines = PANEL * (end - k) * (int64_t)sizeof(TYPE) / LINE;
    if (tiles == 1 || (panel + 1) * PANEL >= N)
        lines = 0;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t m = OF_TYPE(tile_start)(t, rows), count = OF_TYPE(tile_start)(t + 1, rows) - m;
        int64_t from = t * lines / tiles, to = (t + 1) * lines / tiles;
        float *own = sums + m * PANEL;
        if (end == K)
            OF_TYPE(ask_for_residual)(then, out, first + m, panel * PANEL, N, count);
        OF_TYPE(some_rows)(x + m * K + k * count, w, own, end - k,
                           (const char *)(w + PANEL * K) + from * LINE, to - from, k > 0, (int)count);
        if (end == K)
            OF_TYPE(finish)(own, then, out, first + m, panel * PANEL, N, count);
    }
}

/* The panels from `begin` to `end`, one part of the inputs after the other. `memory` has room for the
 * sums of all panels, if there are several parts. */
static void OF_TYPE(some_panels)(const OF_TYPE(inputs) *x, const TYPE *panels,
                                 const struct epilogue *then, TYPE *out, float *memory, int64_t N,
                                 int64_t K, int64_t begin, int64_t end, int64_t first,
                                 int64_t rows) {
    int64_t parts = num_parts(rows, K * (int64_t)sizeof *x), steps = K / STEP;
    float of_one[ROWS_AT_ONCE * PANEL];
    for (int64_t part = 0; part < parts; part++) {
        int64_t from = part * steps / parts * STEP, to = (part + 1) * steps / parts * STEP;
        for (int64_t panel = begin; panel < end; panel++) {
            float *sums = parts > 1 ? memory + panel * rows * PANEL : of_one;
            OF_TYPE(panel)(x, panels, then, out, sums, N, K, panel, first, rows, from, to);
        }
    }
}

/* All contiguous; K is a multiple of STEP. `memory` has room for `product_memory` numbers.
 * Threads share a block of rows and take panels, unless there are blocks enough for all. */
void OF_TYPE(multiply)(const TYPE *x, const TYPE *panels, const TYPE *bias, const TYPE *residual,
                       TYPE *out, float *memory, int64_t M, int64_t N, int64_t K, int32_t is_relu,
                       int32_t num_threads) {
    struct epilogue then = {bias, residual, is_relu};
    OF_TYPE(inputs) *scratch = (OF_TYPE(inputs) *)memory;
    float *sums = memory + most_rows(M, num_threads) * K;
    int64_t num_panels = panels_of(N), blocks = (M + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    if (M <= TILE_ROWS) { /* no thread need wait for others to pack */
        int is_packed = M == 1 && sizeof *x == sizeof *scratch;
        if (!is_packed)
            OF_TYPE(pack_rows)(x, scratch, M, K);
        const OF_TYPE(inputs) *rows = is_packed ? (const OF_TYPE(inputs) *)x : scratch;
#pragma omp parallel num_threads(num_threads)
        {
            int64_t thread = omp_get_thread_num();
            OF_TYPE(some_panels)(rows, panels, &then, out, sums, N, K, share_start(thread, num_panels),
                                 share_start(thread + 1, num_panels), 0, M);
        }
        return;
    }
    if (blocks > 2 * num_threads) {
        blocks = (blocks + num_threads - 1) / num_threads * num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * M / blocks, rows = (block + 1) * M / blocks - first;
            int64_t thread = omp_get_thread_num();
            OF_TYPE(inputs) *own = scratch + thread * ROWS_AT_ONCE * K;
            for (int64_t m = 0, t = 0; m < rows; m = OF_TYPE(tile_start)(++t, rows))
                OF_TYPE(pack_rows)(x + (first + m) * K, own + m * K,
                                   OF_TYPE(tile_start)(t + 1, rows) - m, K);
            OF_TYPE(some_panels)(own, panels, &then, out,
                                 sums + thread * ROWS_AT_ONCE * num_panels * PANEL, N, K, 0,
                                 num_panels, first, rows);
        }
        return;
    }
#pragma omp parallel num_threads(num_threads)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * M / blocks, rows = (block + 1) * M / blocks - first;
        int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, thread = omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) {
            int64_t m = OF_TYPE(tile_start)(t, rows);
            OF_TYPE(pack_rows)(x + (first + m) * K, scratch + m * K,
                               OF_TYPE(tile_start)(t + 1, rows) - m, K);
        }
        OF_TYPE(some_panels)(scratch, panels, &then, out, sums, N, K, share_start(thread, num_panels),
                             share_start(thread + 1, num_panels), first, rows);
#pragma omp barrier
    }
}
