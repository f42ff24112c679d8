/* Attention of one type: included by decode_attention.c for each TYPE.
 *
 * Scores and weights are (L, BLOCK), in `scores`; sums of values are (BLOCK, D), in `values`. */

/* Scores to weights, which are not divided by their sums yet. Returns these. */
static floats OF_TYPE(softmax)(float *scores, int64_t length) {
    floats highest = (floats){0} + MASKED, sums = {0};
    for (int64_t l = 0; l < length; l++) {
        floats score = load(scores + l * BLOCK);
        highest = choose(score > highest, score, highest);
    }
    for (int64_t l = 0; l < length; l++) {
        floats weights = OF_TYPE(round)(exp_negative(load(scores + l * BLOCK) - highest));
        memcpy(scores + l * BLOCK, &weights, sizeof weights);
        sums += weights;
    }
    return sums;
}

/* Scores of `rows` rows, a multiple of QUAD unless they are the last. */
INLINE void OF_TYPE(score)(const TYPE *restrict q, const TYPE *restrict k, float *restrict scores,
                           int64_t length, int64_t next, const int64_t width, int64_t rows,
                           float scale) {
    for (int64_t l = 0; l < length; l++, k += next, scores += BLOCK) {
        int64_t r = 0;
        for (; r + QUAD <= rows; r += QUAD) {
            float found[QUAD];
            OF_TYPE(ask_for)(k + AT_ONCE * next + r * width, QUAD * width);
            OF_TYPE(four_dots)(q + r * width, k + r * width, found, width);
            for (int i = 0; i < QUAD; i++)
                scores[r + i] = scale * found[i];
        }
        for (; r < rows; r++) {
            float sum = 0.0f;
            for (int64_t d = r * width; d < (r + 1) * width; d++)
                sum += OF_TYPE(widen)(q[d]) * OF_TYPE(widen)(k[d]);
            scores[r] = scale * sum;
        }
        for (; r < BLOCK; r++)
            scores[r] = 0.0f;
    }
}

/* Rows of which the first is q's, k's, v's, is_real's and out's first. */
INLINE void OF_TYPE(block)(const TYPE *q, const TYPE *k, const TYPE *v, const uint8_t *is_real,
                           TYPE *out, float *scratch, int64_t length, int64_t next,
                           const int64_t width, int64_t rows, float scale) {
    float *scores = scratch, *values = scratch + length * BLOCK;
    OF_TYPE(score)(q, k, scores, length, next, width, rows, scale);
    if (is_real)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t l = 0; l < length; l++)
                if (!is_real[r * length + l])
                    scores[l * BLOCK + r] = MASKED;
    floats sums = OF_TYPE(softmax)(scores, length);
    memset(values, 0, sizeof(float) * rows * width);
    int64_t l = 0;
    for (; l + AT_ONCE <= length; l += AT_ONCE)
        for (int64_t r = 0; r < rows; r++) {
            const TYPE *own = v + l * next + r * width;
            for (int64_t ahead = AT_ONCE; ahead < 2 * AT_ONCE; ahead++)
                OF_TYPE(ask_for)(own + ahead * next, width);
            OF_TYPE(add_values)(values + r * width, scores + l * BLOCK + r, own, next, width,
                                AT_ONCE);
        }
    if (l < length)
        for (int64_t r = 0; r < rows; r++)
            OF_TYPE(add_values)(values + r * width, scores + l * BLOCK + r,
                                v + l * next + r * width, next, width, length - l);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < width; d++)
            out[r * width + d] =
                OF_TYPE(narrow)(values[r * width + OF_TYPE(place)(d, width)] / sums[r]);
}

/* q, out: (R, D); k, v: (L, R, D); is_real: (R, L) or null, one byte each; scratch: for each thread
 * (L + D) * BLOCK floats. All contiguous. */
void OF_TYPE(attend)(const TYPE *q, const TYPE *k, const TYPE *v, const uint8_t *is_real, TYPE *out,
                     float *scratch, int64_t length, int64_t num_rows, int64_t width, float scale,
                     int32_t num_threads) {
    int64_t quads = (num_rows + QUAD - 1) / QUAD, next = num_rows * width;
    int64_t tasks = (num_rows + BLOCK - 1) / BLOCK;
    tasks = (tasks + num_threads - 1) / num_threads * num_threads; /* alike for all threads */
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t first = task * quads / tasks * QUAD, end = (task + 1) * quads / tasks * QUAD;
        int64_t rows = (end < num_rows ? end : num_rows) - first, at = first * width;
        const uint8_t *real = is_real ? is_real + first * length : 0;
        float *own = scratch + omp_get_thread_num() * (length + width) * BLOCK;
        if (rows <= 0)
            continue;
        /* What is known beforehand can be unrolled: the usual head sizes. */
        if (width == 64)
            OF_TYPE(block)(q + at, k + at, v + at, real, out + at, own, length, next, 64, rows, scale);
        else if (width == 128)
            OF_TYPE(block)(q + at, k + at, v + at, real, out + at, own, length, next, 128, rows, scale);
        else
            OF_TYPE(block)(q + at, k + at, v + at, real, out + at, own, length, next, width, rows, scale);
    }
}
