/* Halves of one type: included by decode_layer.c for each TYPE. They replace hidden states by what
 * they make of them, and return 0, or -1 when there is no memory. */

/* to = norm(x), which may be the same; both (B, h). */
static void OF_TYPE(normalize)(const struct norm *norm, const TYPE *x, TYPE *to, int64_t B, int64_t h,
                               int32_t num_threads) {
    const TYPE *weight = norm->weight, *bias = norm->bias;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (B > 4)
    for (int64_t b = 0; b < B; b++) {
        const TYPE *from = x + b * h;
        float sum = 0.0f, squares = 0.0f;
        for (int64_t i = 0; i < h; i++)
            sum += OF_TYPE(widen)(from[i]);
        float mean = sum / (float)h;
        for (int64_t i = 0; i < h; i++) {
            float distance = OF_TYPE(widen)(from[i]) - mean;
            squares += distance * distance;
        }
        float scale = 1.0f / sqrtf(squares / (float)h + norm->epsilon);
        for (int64_t i = 0; i < h; i++) {
            float y = (OF_TYPE(widen)(from[i]) - mean) * scale;
            to[b * h + i] = OF_TYPE(narrow)(y * OF_TYPE(widen)(weight[i]) + OF_TYPE(widen)(bias[i]));
        }
    }
}

/* out = relu(x W^T + bias) + residual for M rows. */
static void OF_TYPE(product)(const struct matrix *w, const TYPE *x, const TYPE *residual, TYPE *out,
                             struct room room, int64_t M, int32_t is_relu, int32_t num_threads) {
    int64_t N = w->num_outputs, K = w->num_inputs, S = w->group_size;
    if (S == 0) {
        OF_TYPE(multiply)(x, w->panels, w->bias, residual, out, (float *)room.next, M, N, K, is_relu,
                          num_threads);
        return;
    }
    const bfloat16 *inputs = (const bfloat16 *)x;
    int32_t is_float = sizeof(TYPE) == sizeof(float);
    if (is_float) {
        bfloat16 *rounded_inputs = take(&room, M * K * (int64_t)sizeof(bfloat16));
#pragma omp parallel for schedule(static) num_threads(num_threads) if (M > 4)
        for (int64_t i = 0; i < M * K; i++)
            rounded_inputs[i] = narrow_bfloat16(OF_TYPE(widen)(x[i]));
        inputs = rounded_inputs;
    }
    float *memory = take(&room, M * K * (int64_t)sizeof(float));
    multiply_four_bits(inputs, w->panels, w->bias, residual, out, memory, (float *)room.next, M, N, K,
                       S, is_relu, is_float, num_threads);
}

/* What the new position gives, (B, 3, h), to where it is read: its keys and values are the caches'
 * last, at `new_k` and `new_v`. */
static void OF_TYPE(spread)(const TYPE *qkv, TYPE *q, TYPE *new_k, TYPE *new_v, int64_t B, int64_t h,
                            int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (B > 4)
    for (int64_t b = 0; b < B; b++) {
        const TYPE *from = qkv + b * 3 * h;
        memcpy(q + b * h, from, h * sizeof(TYPE));
        memcpy(new_k + b * h, from + h, h * sizeof(TYPE));
        memcpy(new_v + b * h, from + 2 * h, h * sizeof(TYPE));
    }
}

/* hidden: (B, h); k, v: (L, B H, D), of which the last position is written; is_real: (B H, L) or null,
 * one byte each. */
static int32_t OF_TYPE(attention_half)(const struct attention *layer, TYPE *hidden, TYPE *k, TYPE *v,
                                       const uint8_t *is_real, int64_t B, int64_t length,
                                       int32_t num_threads) {
    int64_t h = layer->out.num_outputs, heads = layer->num_heads, width = h / heads;
    int64_t bytes = B * h * (int64_t)sizeof(TYPE), at = (length - 1) * B * h;
    int64_t attention = num_threads * (length + width) * ATTENTION_BLOCK * (int64_t)sizeof(float);
    int64_t products = product_bytes(&layer->qkv, B, num_threads) +
                       product_bytes(&layer->out, B, num_threads);
    void *memory = aligned_alloc(ALIGNMENT, 3 * rounded(bytes) + rounded(3 * bytes) +
                                                rounded(attention) + products);
    if (!memory)
        return -1;
    struct room room = {memory};
    TYPE *x = take(&room, bytes), *qkv = take(&room, 3 * bytes), *q = take(&room, bytes);
    TYPE *attended = take(&room, bytes);
    float *scratch = take(&room, attention);
    const TYPE *inputs = hidden;
    if (layer->norm.is_first) {
        OF_TYPE(normalize)(&layer->norm, hidden, x, B, h, num_threads);
        inputs = x;
    }
    OF_TYPE(product)(&layer->qkv, inputs, 0, qkv, room, B, 0, num_threads);
    OF_TYPE(spread)(qkv, q, k + at, v + at, B, h, num_threads);
    OF_TYPE(attend)(q, k, v, is_real, attended, scratch, length, B * heads, width,
                    1.0f / sqrtf((float)width), num_threads);
    OF_TYPE(product)(&layer->out, attended, hidden, hidden, room, B, 0, num_threads);
    if (!layer->norm.is_first)
        OF_TYPE(normalize)(&layer->norm, hidden, hidden, B, h, num_threads);
    free(memory);
    return 0;
}

/* hidden: (B, h). */
static int32_t OF_TYPE(mlp_half)(const struct mlp *layer, TYPE *hidden, int64_t B,
                                 int32_t num_threads) {
    int64_t h = layer->fc2.num_outputs, f = layer->fc1.num_outputs;
    int64_t narrow = B * h * (int64_t)sizeof(TYPE), wide = B * f * (int64_t)sizeof(TYPE);
    int64_t products = product_bytes(&layer->fc1, B, num_threads) +
                       product_bytes(&layer->fc2, B, num_threads);
    void *memory = aligned_alloc(ALIGNMENT, rounded(narrow) + rounded(wide) + products);
    if (!memory)
        return -1;
    struct room room = {memory};
    TYPE *x = take(&room, narrow), *inner = take(&room, wide);
    const TYPE *inputs = hidden;
    if (layer->norm.is_first) {
        OF_TYPE(normalize)(&layer->norm, hidden, x, B, h, num_threads);
        inputs = x;
    }
    OF_TYPE(product)(&layer->fc1, inputs, 0, inner, room, B, 1, num_threads);
    OF_TYPE(product)(&layer->fc2, inner, hidden, hidden, room, B, 0, num_threads);
    if (!layer->norm.is_first)
        OF_TYPE(normalize)(&layer->norm, hidden, hidden, B, h, num_threads);
    free(memory);
    return 0;
}

/* Halves, `count` of them, one after the other. hidden: (B, h); is_real: (B H, L) or null; seconds,
 * (count,), gets how long each took. */
int32_t OF_TYPE(decode_halves)(const struct half *halves, int64_t count, TYPE *hidden,
                               const uint8_t *is_real, double *seconds, int64_t B, int64_t length,
                               int32_t num_threads) {
    double begun_at = now();
    for (int64_t i = 0; i < count; i++) {
        const struct half *half = halves + i;
        int32_t status = half->attention
                             ? OF_TYPE(attention_half)(half->attention, hidden, half->keys,
                                                       half->values, is_real, B, length, num_threads)
                             : OF_TYPE(mlp_half)(half->mlp, hidden, B, num_threads);
        if (status)
            return status;
        double ended_at = now();
        seconds[i] = ended_at - begun_at;
        begun_at = ended_at;
    }
    return 0;
}
