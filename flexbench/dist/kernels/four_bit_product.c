/* out = relu(x W^T + bias) + residual, with a matrix W of 4 bits an element, which is read as it is.
 *
 * Of each group of a row, w = (level - 8) * scale + zero, with levels of 0 to 15. Levels less 8 are
 * exact in bfloat16, and so are products with them; sums are float. It is compiled where it runs, by
 * native.py, for CPUs with AVX-512.
 *
 * Letters: M rows of x, N outputs, K inputs, S inputs of a group, G groups of a row. x is (M, K),
 * bfloat16, W is (N, K), out and residual are (M, N), bias is (N,).
 *
 * W lies in panels of PANEL outputs, (N / PANEL, G) records. A record has 64 bytes for each four
 * inputs, and then the outputs' scales and zeros, bfloat16. The 64 bytes are 32 numbers of 16 bits:
 * number 2 n + i has the levels of output n for inputs i and 2 + i in its first and third 4 bits, and
 * those of output n + 16 in its second and fourth.
 */
#include <omp.h>

#include "kernels.h"
#include "tile_sizes.h"

int32_t has_four_bit_product(void) { return MULTIPLIES_FOUR_BITS; }

#if MULTIPLIES_FOUR_BITS

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

INLINE int64_t record_bytes(const struct matrix *w) { return w->S / 4 * LINE + 2 * PANEL * 2; }
INLINE int64_t panel_bytes(const struct matrix *w) { return w->K / w->S * record_bytes(w); }

INLINE __m512 widened(const uint8_t *from) { /* 16 of bfloat16 */
    __m256i bits = _mm256_loadu_si256((const __m256i *)from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* Of the four inputs that `four` has levels for, two: those of pair 0 or 1. */

#if HAS_BFLOAT16
typedef __m512i table; /* levels to themselves less 8 */

/* Only 5 bits of a number are looked at, of which the last is not ours: so each level is there twice. */
static table level_table(void) {
    bfloat16 values[32];
    for (int i = 0; i < 32; i++)
        values[i] = narrow_bfloat16((float)(i % 16 - 8));
    return _mm512_loadu_si512(values);
}

INLINE void step_four_bits(__m512 sums[][2], const inputs_bfloat16 *restrict x, __m512i four, int pair,
                           table levels, const int rows) {
    __m512bh low = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(four, 8 * pair), levels);
    __m512bh high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(four, 8 * pair + 4), levels);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        int32_t inputs;
        memcpy(&inputs, x + 2 * m, sizeof inputs);
        __m512bh both = (__m512bh)_mm512_set1_epi32(inputs);
        sums[m][0] = _mm512_dpbf16_ps(sums[m][0], low, both);
        sums[m][1] = _mm512_dpbf16_ps(sums[m][1], high, both);
    }
}
#else
typedef __m512 table; /* levels to themselves less 8 */

static table level_table(void) {
    float values[16];
    for (int i = 0; i < 16; i++)
        values[i] = (float)(i - 8);
    return _mm512_loadu_ps(values);
}

INLINE void step_four_bits(__m512 sums[][2], const inputs_bfloat16 *restrict x, __m512i four, int pair,
                           table levels, const int rows) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) { /* only the last 4 bits of a number are looked at */
        int place = 8 * pair + 16 * i;
        __m512 low = _mm512_permutexvar_ps(_mm512_srli_epi32(four, place), levels);
        __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(four, place + 4), levels);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            __m512 input = _mm512_set1_ps(x[2 * m + i]);
            sums[m][0] = _mm512_fmadd_ps(low, input, sums[m][0]);
            sums[m][1] = _mm512_fmadd_ps(high, input, sums[m][1]);
        }
    }
}
#endif

/* Sums (rows, PANEL) of some packed rows and a panel. `x_sums`, (rows, G), are the sums of x over
 * each group. Lines are asked for as in panel_product.h. */
INLINE void four_bit_tile(const inputs_bfloat16 *restrict x, const float *restrict x_sums,
                          const struct matrix *w, const uint8_t *restrict panel,
                          float *restrict out, table levels, const char *next, int64_t lines,
                          const int rows) {
    const int64_t groups = w->K / w->S;
    memset(out, 0, sizeof(float) * PANEL * rows);
    for (int64_t group = 0; group < groups; group++) {
        __m512 sums[TILE_ROWS][2];
        for (int m = 0; m < rows; m++)
            sums[m][0] = sums[m][1] = _mm512_setzero_ps();
        for (int64_t k = 0; k < w->S; k += 4, panel += LINE) {
            if (lines == 0) {
                __builtin_prefetch(panel + AHEAD, 0, 2);
            } else if (lines > 0) {
                __builtin_prefetch(next, 0, 2);
                next += LINE;
                lines = lines == 1 ? -1 : lines - 1;
            }
            __m512i four = _mm512_loadu_si512(panel);
#pragma GCC unroll 2
            for (int pair = 0; pair < 2; pair++, x += 2 * rows)
                step_four_bits(sums, x, four, pair, levels, rows);
        }
        for (int half = 0; half < 2; half++) {
            __m512 scale = widened(panel + half * PANEL), zero = widened(panel + (2 + half) * PANEL);
            for (int m = 0; m < rows; m++) {
                float *to = out + m * PANEL + half * PANEL / 2;
                __m512 sum = _mm512_fmadd_ps(sums[m][half], scale, _mm512_loadu_ps(to));
                __m512 x_sum = _mm512_set1_ps(x_sums[m * groups + group]);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(zero, x_sum, sum));
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
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

/* Packs the rows of a tile, and sums them over each group. */
static void prepare(const bfloat16 *x, inputs_bfloat16 *packed, float *x_sums, const struct matrix *w,
                    int64_t rows) {
    pack_rows_bfloat16(x, packed, rows, w->K);
    for (int64_t at = 0; at < rows * w->K; at += w->S) {
        float sum = 0.0f;
        for (int64_t k = at; k < at + w->S; k++)
            sum += widen_bfloat16(x[k]);
        *x_sums++ = sum;
    }
}

/* All contiguous; K is a multiple of S, S of 4. `memory` has room for M * K inputs, `x_sums` for M * G. out,
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
#endif
