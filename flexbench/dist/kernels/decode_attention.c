/* Attention of one new position over the past, for many rows (pairs of prompt and head) at once.
 *
 * Torch has no such kernel for CPUs: it makes a product of every row, which copies keys and values
 * first. Here they are read once, as they lie: (L, R, D), positions first. It is compiled where it
 * runs, by native.py.
 *
 * For each row r: s[l] = scale * q[r] . k[l][r], w = softmax(s), out[r] = sum over l of w[l] v[l][r].
 * Sums are float. bfloat16 weights are rounded to that before they are multiplied with values, and
 * divided by the sum of what they were rounded to.
 */
#include <omp.h>

#include "kernels.h"
#include "softmax.h"

#define BLOCK ATTENTION_BLOCK
#define QUAD 4          /* rows whose products with keys are summed together */
#define AT_ONCE 8       /* positions whose values are added together; even */
#define LINE 64         /* bytes of a cache line */

/* Positions lie far from each other, and a processor does not foresee by itself that it will jump.
 * With float, which takes twice the time for each position, asking cost more than it gained. */
INLINE void ask_for_float(const float *from, int64_t count) {
    (void)from;
    (void)count;
}

INLINE void ask_for_bfloat16(const bfloat16 *from, int64_t count) {
    for (int64_t at = 0; at < count; at += LINE / 2)
        __builtin_prefetch(from + at, 0, 3);
}

/* Products with keys: QUAD rows each of a and b, which follow each other. */

#if defined(__AVX512F__)
/* The sums of each of four vectors. */
INLINE __m128 sums_of_four(const __m512 v[QUAD]) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd);
    __m512d high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    __m512 quarters = _mm512_add_ps((__m512)low, (__m512)high); /* each has a, b, c and d */
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters),
                                  (__m256)_mm512_extractf64x4_pd((__m512d)quarters, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
#endif

INLINE void four_dots_float(const float *restrict a, const float *restrict b, float *restrict out,
                            const int64_t width) {
#if defined(__AVX512F__)
    if (width % 16 == 0) {
        __m512 sums[QUAD];
#pragma GCC unroll 4
        for (int i = 0; i < QUAD; i++) {
            sums[i] = _mm512_setzero_ps();
            for (int64_t d = i * width; d < (i + 1) * width; d += 16)
                sums[i] = _mm512_fmadd_ps(_mm512_loadu_ps(a + d), _mm512_loadu_ps(b + d), sums[i]);
        }
        _mm_storeu_ps(out, sums_of_four(sums));
        return;
    }
#endif
    for (int i = 0; i < QUAD; i++, a += width, b += width) {
        float sum = 0.0f;
        for (int64_t d = 0; d < width; d++)
            sum += a[d] * b[d];
        out[i] = sum;
    }
}

#if defined(__AVX512F__)
/* sum + a b, where every 32 bits of a and b are a pair of bfloat16: the sum of its two products. */
INLINE __m512 add_products(__m512 sum, __m512i a, __m512i b) {
#if HAS_BFLOAT16
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    sum = _mm512_fmadd_ps(first_of_pairs(a), first_of_pairs(b), sum);
    return _mm512_fmadd_ps(second_of_pairs(a), second_of_pairs(b), sum);
#endif
}
#endif

INLINE void four_dots_bfloat16(const bfloat16 *restrict a, const bfloat16 *restrict b,
                               float *restrict out, const int64_t width) {
#if defined(__AVX512F__)
    if (width % 32 == 0) {
        __m512 sums[QUAD];
#pragma GCC unroll 4
        for (int i = 0; i < QUAD; i++) {
            sums[i] = _mm512_setzero_ps();
            for (int64_t d = i * width; d < (i + 1) * width; d += 32)
                sums[i] = add_products(sums[i], _mm512_loadu_si512(a + d), _mm512_loadu_si512(b + d));
        }
        _mm_storeu_ps(out, sums_of_four(sums));
        return;
    }
#endif
    for (int i = 0; i < QUAD; i++, a += width, b += width) {
        float sum = 0.0f;
        for (int64_t d = 0; d < width; d++)
            sum += widen_bfloat16(a[d]) * widen_bfloat16(b[d]);
        out[i] = sum;
    }
}

/* values[d] += sum over `count` positions of weights[l * BLOCK] * v[l * next + d]. */

INLINE void add_values_float(float *restrict values, const float *restrict weights,
                             const float *restrict v, int64_t next, const int64_t width,
                             const int64_t count) {
    for (int64_t d = 0; d < width; d++) {
        float sum = values[d];
        for (int64_t l = 0; l < count; l++)
            sum += weights[l * BLOCK] * v[l * next + d];
        values[d] = sum;
    }
}

/* Where `width` is a multiple of 32, sums of bfloat16 lie where `place_bfloat16` says. */
#if HAS_BFLOAT16
/* Two positions at once, so that their values are pairs. */
INLINE void add_pairs(float *restrict values, const float *restrict weights,
                      const bfloat16 *restrict v, int64_t next, const int64_t width,
                      const int64_t count) {
    for (int64_t d = 0; d < width; d += 32) {
        __m512 low = _mm512_loadu_ps(values + d), high = _mm512_loadu_ps(values + d + 16);
        for (int64_t l = 0; l < count; l += 2) {
            uint32_t first, second = 0;
            memcpy(&first, weights + l * BLOCK, sizeof first);
            __m512i a = _mm512_loadu_si512(v + l * next + d), b = _mm512_setzero_si512();
            if (l + 1 < count) {
                memcpy(&second, weights + (l + 1) * BLOCK, sizeof second);
                b = _mm512_loadu_si512(v + (l + 1) * next + d);
            }
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int32_t)(first >> 16 | second));
            low = _mm512_dpbf16_ps(low, (__m512bh)_mm512_unpacklo_epi16(a, b), pair);
            high = _mm512_dpbf16_ps(high, (__m512bh)_mm512_unpackhi_epi16(a, b), pair);
        }
        _mm512_storeu_ps(values + d, low);
        _mm512_storeu_ps(values + d + 16, high);
    }
}
#elif defined(__AVX512F__)
/* Pairs are neighbours, of which the first are summed to themselves. */
INLINE void add_pairs(float *restrict values, const float *restrict weights,
                      const bfloat16 *restrict v, int64_t next, const int64_t width,
                      const int64_t count) {
    for (int64_t d = 0; d < width; d += 32) {
        __m512 first = _mm512_loadu_ps(values + d), second = _mm512_loadu_ps(values + d + 16);
        for (int64_t l = 0; l < count; l++) {
            __m512 weight = _mm512_set1_ps(weights[l * BLOCK]);
            __m512i pairs = _mm512_loadu_si512(v + l * next + d);
            first = _mm512_fmadd_ps(first_of_pairs(pairs), weight, first);
            second = _mm512_fmadd_ps(second_of_pairs(pairs), weight, second);
        }
        _mm512_storeu_ps(values + d, first);
        _mm512_storeu_ps(values + d + 16, second);
    }
}
#endif

INLINE void add_values_bfloat16(float *restrict values, const float *restrict weights,
                                const bfloat16 *restrict v, int64_t next, const int64_t width,
                                const int64_t count) {
#if defined(__AVX512F__)
    if (width % 32 == 0) {
        add_pairs(values, weights, v, next, width, count);
        return;
    }
#endif
    for (int64_t d = 0; d < width; d++) {
        float sum = values[d];
        for (int64_t l = 0; l < count; l++)
            sum += weights[l * BLOCK] * widen_bfloat16(v[l * next + d]);
        values[d] = sum;
    }
}

/* Where the sum of element d is. */
INLINE int64_t place_float(int64_t d, int64_t width) {
    (void)width;
    return d;
}

INLINE int64_t place_bfloat16(int64_t d, int64_t width) {
#if HAS_BFLOAT16
    if (width % 32 == 0) /* of each 8, the first 4 are in the low half of 32, the others in the high */
        return d / 32 * 32 + d % 8 / 4 * 16 + d % 32 / 8 * 4 + d % 4;
#elif defined(__AVX512F__)
    if (width % 32 == 0)
        return d / 32 * 32 + d % 2 * 16 + d % 32 / 2;
#endif
    (void)width;
    return d;
}

int64_t attention_block(void) { return ATTENTION_BLOCK; }

#define TYPE float
#include "decode_attention.h"
#undef TYPE

#define TYPE bfloat16
#include "decode_attention.h"
