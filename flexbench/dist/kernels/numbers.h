/* Numbers of both types, and names of functions of one type: OF_TYPE(name) is name_TYPE. */
#ifndef FLEXBENCH_NUMBERS_H
#define FLEXBENCH_NUMBERS_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define HAS_BFLOAT16 1 /* products of pairs of bfloat16, summed in float */
#else
#define HAS_BFLOAT16 0
#endif

#define INLINE static inline __attribute__((always_inline, unused))

#define JOIN_(name, type) name##_##type
#define JOIN(name, type) JOIN_(name, type)
#define OF_TYPE(name) JOIN(name, TYPE)

typedef uint16_t bfloat16;

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

/* What comes after a product: relu(y + bias) + residual. */
struct epilogue {
    const void *bias, *residual; /* each may be null */
    int32_t is_relu;
};

#endif
