/* What the kernels use of AVX-512, for CPUs that have AVX2 only: so that what is written for those that
 * have it can be tried on the others. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifndef __AVX512F__
#define __AVX512F__ 1
#define BY_HAND static inline __attribute__((always_inline, unused))

typedef int16_t by_hand_shorts __attribute__((vector_size(64)));
typedef uint16_t by_hand_unsigned_shorts __attribute__((vector_size(64)));
typedef int32_t by_hand_ints __attribute__((vector_size(64)));
typedef uint32_t by_hand_unsigned_ints __attribute__((vector_size(64)));
typedef float by_hand_floats __attribute__((vector_size(64)));

#define AT_512(type, first)                                                                        \
    type x;                                                                                        \
    memcpy(&x, first, sizeof x);                                                                   \
    return x

BY_HAND __m512 loadu_ps_by_hand(const void *from) { AT_512(__m512, from); }
BY_HAND __m512i loadu_si512_by_hand(const void *from) { AT_512(__m512i, from); }
BY_HAND void storeu_ps_by_hand(void *to, __m512 x) { memcpy(to, &x, sizeof x); }
BY_HAND __m512 set1_ps_by_hand(float x) { return (__m512)((by_hand_floats){0} + x); }
BY_HAND __m512i set1_epi32_by_hand(int32_t x) { return (__m512i)((by_hand_ints){0} + x); }
BY_HAND __m512 setzero_ps_by_hand(void) { return (__m512){0}; }
BY_HAND __m512i setzero_si512_by_hand(void) { return (__m512i){0}; }
BY_HAND __m512 add_ps_by_hand(__m512 a, __m512 b) { return a + b; }
BY_HAND __m512i and_si512_by_hand(__m512i a, __m512i b) { return a & b; }

BY_HAND __m512 fmadd_ps_by_hand(__m512 a, __m512 b, __m512 c) {
    __m256 half[2][3];
    for (int i = 0; i < 2; i++) {
        memcpy(&half[i][0], (const char *)&a + 32 * i, 32);
        memcpy(&half[i][1], (const char *)&b + 32 * i, 32);
        memcpy(&half[i][2], (const char *)&c + 32 * i, 32);
        half[i][0] = _mm256_fmadd_ps(half[i][0], half[i][1], half[i][2]);
        memcpy((char *)&a + 32 * i, &half[i][0], 32);
    }
    return a;
}

BY_HAND __m512i slli_epi32_by_hand(__m512i x, int n) { return (__m512i)((by_hand_ints)x << n); }
BY_HAND __m512i srli_epi32_by_hand(__m512i x, int n) {
    return (__m512i)((by_hand_unsigned_ints)x >> n);
}
BY_HAND __m512i srli_epi16_by_hand(__m512i x, int n) {
    return (__m512i)((by_hand_unsigned_shorts)x >> (uint16_t)n);
}

BY_HAND __m512i cvtepu16_epi32_by_hand(__m256i narrow) {
    uint16_t from[16];
    int32_t to[16];
    memcpy(from, &narrow, sizeof from);
    for (int i = 0; i < 16; i++)
        to[i] = from[i];
    return loadu_si512_by_hand(to);
}

/* Of the indices, as the instructions do, only as many bits are looked at as there are places. */
BY_HAND __m512i permutexvar_epi16_by_hand(__m512i index, __m512i x) {
    uint16_t places[32], from[32], to[32];
    memcpy(places, &index, sizeof places);
    memcpy(from, &x, sizeof from);
    for (int i = 0; i < 32; i++)
        to[i] = from[places[i] & 31];
    return loadu_si512_by_hand(to);
}
BY_HAND __m512 permutexvar_ps_by_hand(__m512i index, __m512 x) {
    uint32_t places[16];
    float from[16], to[16];
    memcpy(places, &index, sizeof places);
    memcpy(from, &x, sizeof from);
    for (int i = 0; i < 16; i++)
        to[i] = from[places[i] & 15];
    return loadu_ps_by_hand(to);
}

/* In each 16 bytes, numbers of `size` bytes of the lower (or upper) halves of a and b, in turns. */
BY_HAND void unpack_by_hand(const void *a, const void *b, void *to, int size, int upper) {
    for (int lane = 0; lane < 64; lane += 16)
        for (int i = 0; i < 8 / size; i++)
            for (int second = 0; second < 2; second++)
                memcpy((char *)to + lane + (2 * i + second) * size,
                       (const char *)(second ? b : a) + lane + 8 * upper + i * size, size);
}
#define UNPACK_BY_HAND(name, type, size, upper)                                                    \
    BY_HAND type name##_by_hand(type a, type b) {                                                  \
        type to;                                                                                   \
        unpack_by_hand(&a, &b, &to, size, upper);                                                  \
        return to;                                                                                 \
    }
UNPACK_BY_HAND(unpacklo_epi16, __m512i, 2, 0)
UNPACK_BY_HAND(unpackhi_epi16, __m512i, 2, 1)
UNPACK_BY_HAND(unpacklo_ps, __m512, 4, 0)
UNPACK_BY_HAND(unpackhi_ps, __m512, 4, 1)
UNPACK_BY_HAND(unpacklo_pd, __m512d, 8, 0)
UNPACK_BY_HAND(unpackhi_pd, __m512d, 8, 1)

BY_HAND __m256 castps512_ps256_by_hand(__m512 x) {
    __m256 low;
    memcpy(&low, &x, sizeof low);
    return low;
}
BY_HAND __m256d extractf64x4_pd_by_hand(__m512d x, int upper) {
    __m256d half;
    memcpy(&half, (const char *)&x + 32 * upper, sizeof half);
    return half;
}

#define _mm512_loadu_ps loadu_ps_by_hand
#define _mm512_loadu_si512 loadu_si512_by_hand
#define _mm512_storeu_ps storeu_ps_by_hand
#define _mm512_set1_ps set1_ps_by_hand
#define _mm512_set1_epi32 set1_epi32_by_hand
#define _mm512_setzero_ps setzero_ps_by_hand
#define _mm512_setzero_si512 setzero_si512_by_hand
#define _mm512_add_ps add_ps_by_hand
#define _mm512_and_si512 and_si512_by_hand
#define _mm512_fmadd_ps fmadd_ps_by_hand
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 slli_epi32_by_hand
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 srli_epi32_by_hand
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 srli_epi16_by_hand
#define _mm512_cvtepu16_epi32 cvtepu16_epi32_by_hand
#define _mm512_permutexvar_epi16 permutexvar_epi16_by_hand
#define _mm512_permutexvar_ps permutexvar_ps_by_hand
#define _mm512_unpacklo_epi16 unpacklo_epi16_by_hand
#define _mm512_unpackhi_epi16 unpackhi_epi16_by_hand
#define _mm512_unpacklo_ps unpacklo_ps_by_hand
#define _mm512_unpackhi_ps unpackhi_ps_by_hand
#define _mm512_unpacklo_pd unpacklo_pd_by_hand
#define _mm512_unpackhi_pd unpackhi_pd_by_hand
#define _mm512_castps512_ps256 castps512_ps256_by_hand
#undef _mm512_extractf64x4_pd
#define _mm512_extractf64x4_pd extractf64x4_pd_by_hand
#endif
