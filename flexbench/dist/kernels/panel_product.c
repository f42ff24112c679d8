/* out = relu(x W^T + bias) + residual, with a matrix W of which the rows lie in panels.
 *
 * A panel has two vectors of outputs for each input, so that it is read once, in the order of
 * memory, for a few rows of x. oneDNN is as fast where x has many rows, but reads weights at two
 * thirds of this speed where it has few. It is compiled where it runs, by native.py.
 *
 * Letters: M rows of x, N outputs, K inputs. x is (M, K), W is (N, K), out and residual are (M, N),
 * bias is (N,). Sums are float.
 */
#include <omp.h>

#include "kernels.h"
#include "tile_sizes.h"

int64_t panel_outputs(void) { return PANEL; }
int32_t has_bfloat16_product(void) { return MULTIPLIES_BFLOAT16; }
int32_t has_bfloat16_instructions(void) { return HAS_BFLOAT16; }

INLINE int64_t panels_of(int64_t N) { return (N + PANEL - 1) / PANEL; }

/* Of the inputs, when there are M rows. A single tile reads all weights but once. */
INLINE int64_t num_parts(int64_t M, int64_t row_bytes) {
    return M <= TILE_ROWS ? 1 : (row_bytes + BYTES_AT_ONCE - 1) / BYTES_AT_ONCE;
}

/* Rows that are packed at the same time. */
INLINE int64_t most_rows(int64_t M, int32_t num_threads) {
    return M < num_threads * ROWS_AT_ONCE ? M : num_threads * ROWS_AT_ONCE;
}

/* Room for packed rows and, where inputs are in parts, for their sums; for any type. */
int64_t product_memory(int64_t M, int64_t N, int64_t K, int32_t num_threads) {
    int64_t sums = num_parts(M, K * (int64_t)sizeof(float)) > 1 ? panels_of(N) * PANEL : 0;
    return most_rows(M, num_threads) * (K + sums);
}

/* Where the panels of a thread begin. */
INLINE int64_t share_start(int64_t thread, int64_t num_panels) {
    return thread * num_panels / omp_get_num_threads();
}

#define TYPE float
#define STEP 1
#include "panel_product.h"
#undef TYPE
#undef STEP

#if MULTIPLIES_BFLOAT16
#define TYPE bfloat16
#define STEP 2
#include "panel_product.h"
#endif
