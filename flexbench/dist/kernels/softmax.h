/* What a softmax is made of. */
#ifndef FLEXBENCH_SOFTMAX_H
#define FLEXBENCH_SOFTMAX_H

#include "numbers.h"

#define MASKED (-1e30f) /* the score of positions that are not looked at */

/* Sixteen numbers. Compilers are slow to see vectors in loops of 16. */
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t unsigned_ints __attribute__((vector_size(64)));

INLINE floats load(const float *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE floats choose(ints is_first, floats first, floats second) {
    return (floats)(((ints)first & is_first) | ((ints)second & ~is_first));
}

/* Lanes whose number is below this. */
INLINE ints is_below(int64_t count) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < (int32_t)(count < 16 ? count : 16);
}

INLINE float largest(floats x) {
    float lanes[16];
    memcpy(lanes, &x, sizeof lanes);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
    return lanes[0];
}

/* exp for x <= 0: 2^n times a polynomial in what is left, to 2e-7 of the value. */
INLINE floats exp_negative(floats x) {
    floats t = choose(x < -87.0f, (floats){0} - 87.0f, x) * 1.44269504f; /* NaN stays NaN */
    ints n = __builtin_convertvector(t - 0.5f, ints);
    floats f = (t - __builtin_convertvector(n, floats)) * 0.693147181f;
    floats p = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f +
               f * (0.00833333333f + f * 0.00138888889f)))));
    return p * (floats)((n + 127) << 23);
}

/* What weights are rounded to before they are multiplied with values. */
INLINE floats round_float(floats weights) { return weights; }
INLINE floats round_bfloat16(floats weights) {
    ints bits = (ints)weights;
    return (floats)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
}

/* Rounded weights as what is multiplied with. */
INLINE void store_float(floats weights, inputs_float *to) { memcpy(to, &weights, sizeof weights); }
#if HAS_BFLOAT16
INLINE void store_bfloat16(floats weights, inputs_bfloat16 *to) {
    typedef uint16_t halves __attribute__((vector_size(32)));
    halves narrowed = __builtin_convertvector((unsigned_ints)weights >> 16, halves);
    memcpy(to, &narrowed, sizeof narrowed);
}
#else
INLINE void store_bfloat16(floats weights, inputs_bfloat16 *to) { store_float(weights, to); }
#endif

#endif
