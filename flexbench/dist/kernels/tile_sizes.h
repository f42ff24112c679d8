/* The sizes of tiles of products on this CPU, and one step of a tile. */
#ifndef FLEXBENCH_TILE_SIZES_H
#define FLEXBENCH_TILE_SIZES_H

#include "numbers.h"

/* A tile of the product is TILE_ROWS x 2 vectors of sums, which have to fit into the registers. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_ROWS 12
#define STEPS_AT_ONCE 1
#else /* two vectors of 16 bytes each where there are none of 32 */
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#define STEPS_AT_ONCE 8 /* with half as many sums, a step is as short as what goes round it is long */
#endif
#define PANEL (2 * VECTOR_BYTES / 4) /* outputs of a panel, a multiple of 16 */
#define LINE 64    /* bytes of a cache line */
#define AHEAD 4096 /* bytes from what is read to what is asked for */

typedef float lanes __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES)));

/* sum + a b. Compilers that may associate would add two products first, and have too few registers. */
INLINE lanes add_product(lanes sum, lanes a, float b) {
#if defined(__AVX512F__)
    return (lanes)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)sum);
#elif defined(__FMA__)
    return (lanes)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)sum);
#else
    return sum + a * b;
#endif
}

/* One step of a tile: one input of each row for float, two for bfloat16. */

INLINE void step_float(lanes sums[][2], const inputs_float *restrict x, const float *restrict w,
                       const int rows) {
    lanes low, high;
    memcpy(&low, w, sizeof low);
    memcpy(&high, w + PANEL / 2, sizeof high);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        sums[m][0] = add_product(sums[m][0], low, x[m]);
        sums[m][1] = add_product(sums[m][1], high, x[m]);
    }
}

#if HAS_BFLOAT16
INLINE void step_bfloat16(lanes sums[][2], const inputs_bfloat16 *restrict x,
                          const bfloat16 *restrict w, const int rows) {
    __m512bh low = (__m512bh)_mm512_loadu_si512(w), high = (__m512bh)_mm512_loadu_si512(w + PANEL);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        int32_t pair;
        memcpy(&pair, x + m * 2, sizeof pair);
        __m512bh inputs = (__m512bh)_mm512_set1_epi32(pair);
        sums[m][0] = (lanes)_mm512_dpbf16_ps((__m512)sums[m][0], low, inputs);
        sums[m][1] = (lanes)_mm512_dpbf16_ps((__m512)sums[m][1], high, inputs);
    }
}
#else
/* Inputs that lie two apart. */
INLINE void add_inputs(lanes sums[][2], words low, words high, const float *restrict x,
                       const int rows) {
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        sums[m][0] = add_product(sums[m][0], (lanes)low, x[2 * m]);
        sums[m][1] = add_product(sums[m][1], (lanes)high, x[2 * m]);
    }
}

/* One input of a pair after the other: with both, there would be too few registers. */
INLINE void step_bfloat16(lanes sums[][2], const inputs_bfloat16 *restrict x,
                          const bfloat16 *restrict w, const int rows) {
    words low, high;
    memcpy(&low, w, sizeof low);
    memcpy(&high, w + PANEL, sizeof high);
    add_inputs(sums, low << 16, high << 16, x, rows);
    add_inputs(sums, low & 0xffff0000u, high & 0xffff0000u, x + 1, rows);
}
#endif

#endif
