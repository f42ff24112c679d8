/* What sources use of each other. */
#ifndef FLEXBENCH_KERNELS_H
#define FLEXBENCH_KERNELS_H

#include "numbers.h"

#define ROWS_AT_ONCE 128 /* rows of x that a panel is multiplied with before the next */
/* Of each row's inputs: those of ROWS_AT_ONCE rows and of a panel fit into L2, and a tile's into L1. */
#define BYTES_AT_ONCE 4096

/* panel_product.c */
int64_t product_memory(int64_t M, int64_t N, int64_t K, int32_t num_threads); /* in floats */
void multiply_float(const float *x, const float *panels, const float *bias, const float *residual,
                    float *out, float *memory, int64_t M, int64_t N, int64_t K, int32_t is_relu,
                    int32_t num_threads);
void multiply_bfloat16(const bfloat16 *x, const bfloat16 *panels, const bfloat16 *bias,
                       const bfloat16 *residual, bfloat16 *out, float *memory, int64_t M,
                       int64_t N, int64_t K, int32_t is_relu, int32_t num_threads);

/* four_bit_product.c */
void multiply_four_bits(const bfloat16 *x, const uint8_t *panels, const void *bias,
                        const void *residual, void *out, float *memory, float *x_sums, int64_t M,
                        int64_t N, int64_t K, int64_t S, int32_t is_relu, int32_t is_float,
                        int32_t num_threads);

/* decode_attention.c */
#define ATTENTION_BLOCK 16 /* rows at most that are computed together */
void attend_float(const float *q, const float *k, const float *v, const uint8_t *is_real, float *out,
                  float *scratch, int64_t length, int64_t num_rows, int64_t width, float scale,
                  int32_t num_threads);
void attend_bfloat16(const bfloat16 *q, const bfloat16 *k, const bfloat16 *v, const uint8_t *is_real,
                     bfloat16 *out, float *scratch, int64_t length, int64_t num_rows, int64_t width,
                     float scale, int32_t num_threads);

#endif
