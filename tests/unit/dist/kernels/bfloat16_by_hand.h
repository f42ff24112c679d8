/* Products of pairs of bfloat16 for CPUs that have no instruction for it: so that what is written for
 * those that have one can be tried on the others. */
#include <immintrin.h>

#define __AVX512BF16__ 1
#define _mm512_dpbf16_ps add_products_by_hand

static inline __m512 add_products_by_hand(__m512 sum, __m512bh a, __m512bh b) {
    const __m512i second = _mm512_set1_epi32((int)0xffff0000);
    sum = _mm512_fmadd_ps((__m512)_mm512_slli_epi32((__m512i)a, 16),
                          (__m512)_mm512_slli_epi32((__m512i)b, 16), sum);
    return _mm512_fmadd_ps((__m512)_mm512_and_si512((__m512i)a, second),
                           (__m512)_mm512_and_si512((__m512i)b, second), sum);
}
