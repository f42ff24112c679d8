/* How levels of 4 bits lie in a line of 64 bytes, and their products with inputs, on this CPU.
 *
 * A line has PANEL outputs of LINE_INPUTS inputs. Levels are multiplied as they are, or less
 * LEVEL_BIAS; what that changes, the zero of their group takes back. */
#ifndef FLEXBENCH_FOUR_BIT_LEVELS_H
#define FLEXBENCH_FOUR_BIT_LEVELS_H

#include "tile_sizes.h"

/* A sum waits for the one before: there may be several sets of them, which take turns. */
typedef lanes sums_of_tile[TILE_ROWS][2];

#if defined(__AVX512F__)
/* A line is 32 numbers of 16 bits: number 2 n + i has the levels of output n for inputs i and 2 + i in
 * its first and third 4 bits, and those of output n + 16 in its second and fourth. Numbers are looked
 * up in a table. */
#define LINE_INPUTS 4
#define LEVEL_BIAS 8
#define MOST_SETS 1
INLINE int num_sets(const int rows) { return (void)rows, MOST_SETS; } /* more were slower */

INLINE lanes widened(const uint8_t *from) { /* 16 of bfloat16 */
    __m256i bits = _mm256_loadu_si256((const __m256i *)from);
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

INLINE void fit_inputs(inputs_bfloat16 *x, int64_t rows, int64_t K) { (void)x, (void)rows, (void)K; }

/* Of the inputs of a line, two: those of pair 0 or 1. */

#if HAS_BFLOAT16
typedef __m512i table; /* levels to themselves less 8 */

/* Only 5 bits of a number are looked at, of which the last is not ours: so each level is there twice. */
static table level_table(void) {
    bfloat16 values[32];
    for (int i = 0; i < 32; i++)
        values[i] = narrow_bfloat16((float)(i % 16 - LEVEL_BIAS));
    return _mm512_loadu_si512(values);
}

INLINE void step_pair(lanes sums[][2], const inputs_bfloat16 *restrict x, __m512i line, int pair,
                      table levels, const int rows) {
    __m512bh low = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8 * pair), levels);
    __m512bh high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8 * pair + 4), levels);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        int32_t inputs;
        memcpy(&inputs, x + 2 * m, sizeof inputs);
        __m512bh both = (__m512bh)_mm512_set1_epi32(inputs);
        sums[m][0] = (lanes)_mm512_dpbf16_ps((__m512)sums[m][0], low, both);
        sums[m][1] = (lanes)_mm512_dpbf16_ps((__m512)sums[m][1], high, both);
    }
}
#else
typedef __m512 table; /* levels to themselves less 8 */

static table level_table(void) {
    float values[16];
    for (int i = 0; i < 16; i++)
        values[i] = (float)(i - LEVEL_BIAS);
    return _mm512_loadu_ps(values);
}

INLINE void step_pair(lanes sums[][2], const inputs_bfloat16 *restrict x, __m512i line, int pair,
                      table levels, const int rows) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) { /* only the last 4 bits of a number are looked at */
        int place = 8 * pair + 16 * i;
        lanes low = (lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(line, place), levels);
        lanes high = (lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(line, place + 4), levels);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            sums[m][0] = add_product(sums[m][0], low, x[2 * m + i]);
            sums[m][1] = add_product(sums[m][1], high, x[2 * m + i]);
        }
    }
}
#endif

INLINE void step_line(sums_of_tile *sets, const inputs_bfloat16 *restrict x, const uint8_t *restrict line,
                      table levels, const int rows) {
    __m512i four = _mm512_loadu_si512(line);
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; pair++)
        step_pair(*sets, x + pair * 2 * rows, four, pair, levels, rows);
}
#else
/* A line is 16 numbers of 32 bits, little-endian: number n has the levels of output n, the first
 * input's in its lowest bits. They become floats at the place where they are, and inputs are divided
 * by as much beforehand: to move them would take as long as to multiply. */
#define LINE_INPUTS 8
#define LEVEL_BIAS 0
#define MOST_SETS 4
INLINE int num_sets(const int rows) { return rows == 1 ? MOST_SETS : rows <= 3 ? 2 : 1; }
#define LAST (LINE_INPUTS - 1) /* is moved: it has the sign */

typedef int32_t table; /* there is none */
static table level_table(void) { return 0; }

typedef int32_t integers __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE lanes widened(const uint8_t *from) { /* of bfloat16 */
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return (lanes)(__builtin_convertvector(bits, words) << 16);
}

/* `x` are packed rows. */
INLINE void fit_inputs(inputs_bfloat16 *x, int64_t rows, int64_t K) {
    for (int64_t k = 0; k < K; k += 2, x += 2 * rows)
        for (int64_t at = 0; at < 2 * rows; at++) {
            int64_t input = (k + at % 2) % LINE_INPUTS;
            if (input < LAST)
                x[at] *= 1.0f / (float)(1 << 4 * input);
        }
}

INLINE lanes levels_of(const uint8_t *line, const int input) {
    words levels;
    memcpy(&levels, line, sizeof levels);
    levels = input == LAST ? levels >> 4 * LAST : levels & 15u << 4 * input;
    return __builtin_convertvector((integers)levels, lanes);
}

INLINE void step_line(sums_of_tile *sets, const inputs_bfloat16 *restrict x, const uint8_t *restrict line,
                      table levels, const int rows) {
    (void)levels;
#pragma GCC unroll 8
    for (int input = 0; input < LINE_INPUTS; input++) {
        lanes low = levels_of(line, input), high = levels_of(line + VECTOR_BYTES, input);
        lanes(*sums)[2] = sets[input % num_sets(rows)];
        const inputs_bfloat16 *own = x + input / 2 * 2 * rows + input % 2;
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            sums[m][0] = add_product(sums[m][0], low, own[2 * m]);
            sums[m][1] = add_product(sums[m][1], high, own[2 * m]);
        }
    }
}
#endif

#endif
