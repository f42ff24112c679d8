/* Numbers of both types, and names of functions of one type: OF_TYPE(name) is name_TYPE. */
#ifndef FLEXBENCH_NUMBERS_H
#define FLEXBENCH_NUMBERS_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif
/* Whether the CPU multiplies pairs of bfloat16, and sums them in float. */
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define HAS_BFLOAT16 1
#else
#define HAS_BFLOAT16 0
#endif
/* Where it does not, they are widened to float first. On ARM torch has products that were not compared
 * with that. */
#if HAS_BFLOAT16 || defined(__x86_64__)
#define MULTIPLIES_BFLOAT16 1
#else
#define MULTIPLIES_BFLOAT16 0
#endif

#define INLINE static inline __attribute__((always_inline, unused))

#define JOIN_(name, type) name##_##type
#define JOIN(name, type) JOIN_(name, type)
#define OF_TYPE(name) JOIN(name, TYPE)

typedef uint16_t bfloat16;

/* What rows of x are while matrices of a type are multiplied with them. No more than float's size. */
typedef float inputs_float;
#if HAS_BFLOAT16
typedef bfloat16 inputs_bfloat16;
#else
typedef float inputs_bfloat16;
#endif

INLINE float widen_float(float x) { return x; }
INLINE float narrow_float(float x) { return x; }

INLINE float widen_bfloat16(bfloat16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE bfloat16 narrow_bfloat16(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bfloat16)(value == value ? rounded : 0x7fc0); /* no branch: it is to be vectorized */
}

#if defined(__AVX512F__)
/* Of bfloat16 in pairs, one of each, widened. */
INLINE __m512 first_of_pairs(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
INLINE __m512 second_of_pairs(__m512i pairs) {
    return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32((int32_t)0xffff0000));
}
#endif

/* Inputs that are multiplied at once: one of float, two of bfloat16. */
INLINE void put_float(const float *from, inputs_float *to) { *to = *from; }

INLINE void put_bfloat16(const bfloat16 *from, inputs_bfloat16 *to) {
#if HAS_BFLOAT16
    memcpy(to, from, 2 * sizeof *to);
#else
    to[0] = widen_bfloat16(from[0]);
    to[1] = widen_bfloat16(from[1]);
#endif
}

/* What comes after a product: relu(y + bias) + residual. */
struct epilogue {
    const void *bias, *residual; /* each may be null */
    int32_t is_relu;
};

#endif
