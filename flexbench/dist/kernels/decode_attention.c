/* Attention of one new position over the past, for many rows (pairs of prompt and head) at once.
 *
 * Torch has no such kernel for CPUs: it makes a product of every row, which copies keys and values
 * first. Here they are read once, as they lie: (L, R, D), positions first. It is compiled where it
 * runs, by flexbench/dist/kernels/native.py.
 *
 * For each row r: s[l] = scale * q[r] . k[l][r], w = softmax(s), out[r] = sum over l of w[l] v[l][r].
 * Sums are float; a block of rows is one task of a thread.
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define BLOCK 16        /* rows of a task: few prompts, too, are to keep all threads busy */
#define MASKED (-1e30f) /* of positions that are not looked at */

typedef uint16_t bfloat16;

static inline float load_bfloat16(bfloat16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline bfloat16 store_bfloat16(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0x7fc0;
    return (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float load_float(float x) { return x; }
static inline float store_float(float x) { return x; }

static inline __attribute__((always_inline)) float dot_float(const float *restrict a,
                                                             const float *restrict b,
                                                             const int64_t width) {
    float sum = 0.0f;
    for (int64_t d = 0; d < width; d++)
        sum += a[d] * b[d];
    return sum;
}

static inline __attribute__((always_inline)) float dot_bfloat16(const bfloat16 *restrict a,
                                                                const bfloat16 *restrict b,
                                                                const int64_t width) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    if (width % 32 == 0) { /* products of pairs, which are exact, in one instruction */
        __m512 sums = _mm512_setzero_ps();
        for (int64_t d = 0; d < width; d += 32)
            sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(a + d),
                                    (__m512bh)_mm512_loadu_si512(b + d));
        return _mm512_reduce_add_ps(sums);
    }
#endif
    float sum = 0.0f;
    for (int64_t d = 0; d < width; d++)
        sum += load_bfloat16(a[d]) * load_bfloat16(b[d]);
    return sum;
}

/* exp for x <= 0: 2^n times a polynomial in what is left, to 2e-7 of the value. */
static inline float exp_negative(float x) {
    float t = (x < -87.0f ? -87.0f : x) * 1.44269504f; /* NaN stays NaN */
    float n = (float)(int32_t)(t - 0.5f);
    float f = (t - n) * 0.693147181f;
    float p = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f +
              f * (0.00833333333f + f * 0.00138888889f)))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static void softmax(float *scores, float *sums, int64_t length, int64_t rows) {
    float highest[BLOCK];
    for (int64_t r = 0; r < rows; r++) {
        highest[r] = MASKED;
        sums[r] = 0.0f;
    }
    for (int64_t l = 0; l < length; l++)
        for (int64_t r = 0; r < rows; r++) {
            float score = scores[l * BLOCK + r];
            highest[r] = score > highest[r] ? score : highest[r];
        }
    for (int64_t l = 0; l < length; l++)
        for (int64_t r = 0; r < rows; r++) {
            float weight = exp_negative(scores[l * BLOCK + r] - highest[r]);
            scores[l * BLOCK + r] = weight;
            sums[r] += weight;
        }
}

/* q, out: (R, D); k, v: (L, R, D); is_real: (R, L) or null, one byte each; scratch: for each task,
 * (L + D) * BLOCK floats. All contiguous. */
#define DEFINE_ATTENTION(type)                                                                    \
    static inline __attribute__((always_inline)) void block_##type(                               \
        const type *restrict q, const type *restrict k, const type *restrict v,                   \
        const uint8_t *restrict is_real, type *restrict out, float *restrict scratch,             \
        int64_t length, int64_t num_rows, const int64_t width, int64_t first, int64_t rows,       \
        float scale) {                                                                            \
        float *restrict scores = scratch;                  /* (L, BLOCK) */                       \
        float *restrict values = scratch + length * BLOCK; /* (BLOCK, D) */                       \
        float sums[BLOCK];                                                                        \
        for (int64_t l = 0; l < length; l++) {                                                    \
            const type *keys = k + (l * num_rows + first) * width;                                \
            for (int64_t r = 0; r < rows; r++)                                                    \
                scores[l * BLOCK + r] =                                                           \
                    scale * dot_##type(q + (first + r) * width, keys + r * width, width);         \
            if (is_real)                                                                          \
                for (int64_t r = 0; r < rows; r++)                                                \
                    if (!is_real[(first + r) * length + l])                                       \
                        scores[l * BLOCK + r] = MASKED;                                           \
        }                                                                                         \
        softmax(scores, sums, length, rows);                                                      \
        memset(values, 0, sizeof(float) * rows * width);                                          \
        int64_t l = 0;                                                                            \
        for (; l + 4 <= length; l += 4) { /* four at a time: sums are loaded and stored less often */ \
            const type *seen = v + (l * num_rows + first) * width;                                \
            const int64_t next = num_rows * width;                                                \
            for (int64_t r = 0; r < rows; r++) {                                                  \
                const float *weights = scores + l * BLOCK + r;                                    \
                float w0 = weights[0], w1 = weights[BLOCK];                                       \
                float w2 = weights[2 * BLOCK], w3 = weights[3 * BLOCK];                           \
                const type *own = seen + r * width;                                               \
                for (int64_t d = 0; d < width; d++)                                               \
                    values[r * width + d] +=                                                      \
                        w0 * load_##type(own[d]) + w1 * load_##type(own[next + d]) +              \
                        w2 * load_##type(own[2 * next + d]) + w3 * load_##type(own[3 * next + d]); \
            }                                                                                     \
        }                                                                                         \
        for (; l < length; l++) {                                                                 \
            const type *seen = v + (l * num_rows + first) * width;                                \
            for (int64_t r = 0; r < rows; r++)                                                    \
                for (int64_t d = 0; d < width; d++)                                               \
                    values[r * width + d] += scores[l * BLOCK + r] * load_##type(seen[r * width + d]); \
        }                                                                                         \
        for (int64_t r = 0; r < rows; r++)                                                        \
            for (int64_t d = 0; d < width; d++)                                                   \
                out[(first + r) * width + d] = store_##type(values[r * width + d] / sums[r]);     \
    }                                                                                             \
                                                                                                  \
    void attend_##type(const type *q, const type *k, const type *v, const uint8_t *is_real,       \
                       type *out, float *scratch, int64_t length, int64_t num_rows,               \
                       int64_t width, float scale) {                                              \
        int64_t tasks = (num_rows + BLOCK - 1) / BLOCK;                                           \
        int64_t floats = (length + width) * BLOCK;                                                \
        _Pragma("omp parallel for schedule(static)") for (int64_t task = 0; task < tasks; task++) { \
            int64_t first = task * BLOCK;                                                         \
            int64_t rows = num_rows - first < BLOCK ? num_rows - first : BLOCK;                   \
            float *own = scratch + task * floats;                                                 \
            /* What is known beforehand can be unrolled: the usual head sizes. */                 \
            if (width == 64)                                                                      \
                block_##type(q, k, v, is_real, out, own, length, num_rows, 64, first, rows, scale); \
            else if (width == 128)                                                                \
                block_##type(q, k, v, is_real, out, own, length, num_rows, 128, first, rows, scale); \
            else                                                                                  \
                block_##type(q, k, v, is_real, out, own, length, num_rows, width, first, rows,    \
                             scale);                                                              \
        }                                                                                         \
    }

DEFINE_ATTENTION(float)
DEFINE_ATTENTION(bfloat16)
