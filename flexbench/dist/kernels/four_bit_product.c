/* out = relu(x W^T + bias) + residual, with a matrix W of 4 bits an element, which is read as it is.
 *
 * Of each group of a row, w = (level - 8) * scale + zero, with levels of 0 to 15. Levels are exact as
 * they are multiplied, and so are products with inputs of bfloat16; sums are float. It is compiled
 * where it runs, by native.py.
 *
 * Letters: M rows of x, N outputs, K inputs, S inputs of a group, G groups of a row. x is (M, K),
 * bfloat16, W is (N, K), out and residual are (M, N), bias is (N,).
 *
 * W lies in panels of PANEL outputs, (N / PANEL, G) records. A record has a line of 64 bytes for each
 * LINE_INPUTS inputs, as four_bit_levels.h has it, and then the outputs' scales and zeros, bfloat16.
 */
#include <omp.h>

#include "four_bit_levels.h"
#include "kernels.h"

int64_t four_bit_line_inputs(void) { return LINE_INPUTS; }

#define TYPE float
#define STEP 1
#include "tiles.h"
#undef TYPE
#undef STEP
#define TYPE bfloat16
#define STEP 2
#include "tiles.h"

struct matrix {
    const uint8_t *panels;
    int64_t N, K, S;
};

INLINE int64_t record_bytes(const struct matrix *w) { return w->S / LINE_INPUTS * LINE + 2 * PANEL * 2; }
INLINE int64_t panel_bytes(const struct matrix *w) { return w->K / w->S * record_bytes(w); }

/* Sums (rows, PANEL) of some packed rows and a panel. `x_sums`, (rows, G), are the sums of x over
 * each group. Lines are asked for as in panel_product.h. */
INLINE void four_bit_tile(const inputs_bfloat16 *restrict x, const float *restrict x_sums,
                          const struct matrix *w, const uint8_t *restrict panel,
                          float *restrict out, table levels, const char *next, int64_t lines,
                          const int rows) {
    const int64_t groups = w->K / w->S;
    memset(out, 0, sizeof(float) * PANEL * rows);
    for (int64_t group = 0; group < groups; group++) {
        sums_of_tile sets[MOST_SETS];
        for (int set = 0; set < num_sets(rows); set++)
            for (int m = 0; m < rows; m++)
                sets[set][m][0] = sets[set][m][1] = (lanes){0};
        for (int64_t k = 0; k < w->S; k += LINE_INPUTS, panel += LINE, x += LINE_INPUTS * rows) {
            if (lines == 0) {
                __builtin_prefetch(panel + AHEAD, 0, 2);
            } else if (lines > 0) {
                __builtin_prefetch(next, 0, 2);
                next += LINE;
                lines = lines == 1 ? -1 : lines - 1;
            }
            step_line(sets, x, panel, levels, rows);
        }
        for (int half = 0; half < 2; half++) {
            lanes scale = widened(panel + half * PANEL), zero = widened(panel + (2 + half) * PANEL);
            if (LEVEL_BIAS < 8)
                zero -= (8 - LEVEL_BIAS) * scale;
            for (int m = 0; m < rows; m++) {
                float *to = out + m * PANEL + half * PANEL / 2;
                lanes sum, own = sets[0][m][half];
                for (int set = 1; set < num_sets(rows); set++)
                    own += sets[set][m][half];
                memcpy(&sum, to, sizeof sum);
                sum += own * scale;
                sum = add_product(sum, zero, x_sums[m * groups + group]);
                memcpy(to, &sum, sizeof sum);
            }
        }
        panel += 2 * PANEL * 2;
    }
}

static void some_rows(const inputs_bfloat16 *x, const float *x_sums, const struct matrix *w,
                      const uint8_t *panel, float *out, table levels, const char *next,
                      int64_t lines, int rows) {
#define CASE(count)                                                                                \
    case count:                                                                                    \
        four_bit_tile(x, x_sums, w, panel, out, levels, next, lines, count);                       \
        break;
    switch (rows) { /* what is known beforehand stays in registers */
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS == 12
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

/* Packs the rows of a tile, and sums them over each group. */
static void prepare(const bfloat16 *x, inputs_bfloat16 *packed, float *x_sums, const struct matrix *w,
                    int64_t rows) {
    pack_rows_bfloat16(x, packed, rows, w->K);
    fit_inputs(packed, rows, w->K);
    for (int64_t at = 0; at < rows * w->K; at += w->S) {
        float sum = 0.0f;
        for (int64_t k = at; k < at + w->S; k++)
            sum += widen_bfloat16(x[k]);
        *x_sums++ = sum;
    }
}

/* All contiguous; K is a multiple of S, S of 8. `memory` has room for M * K inputs, `x_sums` for M * G. out,
 * bias and residual are float, or else bfloat16. */
void multiply_four_bits(const bfloat16 *x, const uint8_t *panels, const void *bias,
                        const void *residual, void *out, float *memory, float *x_sums, int64_t M,
                        int64_t N, int64_t K, int64_t S, int32_t is_relu, int32_t is_float,
                        int32_t num_threads) {
    struct epilogue then = {bias, residual, is_relu};
    struct matrix w = {panels, N, K, S};
    inputs_bfloat16 *packed = (inputs_bfloat16 *)memory;
    int64_t blocks = (M + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, num_panels = (N + PANEL - 1) / PANEL;
    int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS, groups = K / S;
#pragma omp parallel num_threads(num_threads)
    {
        table levels = level_table();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) {
            int64_t m = tile_start_bfloat16(t, M), rows = tile_start_bfloat16(t + 1, M) - m;
            prepare(x + m * K, packed + m * K, x_sums + m * groups, &w, rows);
        }
#pragma omp for schedule(static) collapse(2)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t panel = 0; panel < num_panels; panel++) {
                int64_t first = block * tiles / blocks, end = (block + 1) * tiles / blocks;
                int64_t lines = (end - first == 1 || panel + 1 == num_panels) ? 0
                                                                              : panel_bytes(&w) / LINE;
                const uint8_t *own = panels + panel * panel_bytes(&w);
                for (int64_t t = first; t < end; t++) {
                    int64_t m = tile_start_bfloat16(t, M), rows = tile_start_bfloat16(t + 1, M) - m;
                    int64_t from = (t - first) * lines / (end - first);
                    int64_t to = (t - first + 1) * lines / (end - first);
                    float sums[TILE_ROWS * PANEL];
                    some_rows(packed + m * K, x_sums + m * groups, &w, own, sums, levels,
                              (const char *)own + panel_bytes(&w) + from * LINE, to - from, (int)rows);
                    if (is_float)
                        finish_float(sums, &then, out, m, panel * PANEL, N, rows);
                    else
                        finish_bfloat16(sums, &then, out, m, panel * PANEL, N, rows);
                }
            }
    }
}
