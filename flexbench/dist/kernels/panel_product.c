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
int64_t rows_at_once(void) { return ROWS_AT_ONCE; }
int32_t has_bfloat16_product(void) { return MULTIPLIES_BFLOAT16; }
int32_t has_bfloat16_instructions(void) { return HAS_BFLOAT16; }

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
