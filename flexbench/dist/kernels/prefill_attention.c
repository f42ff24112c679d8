/* Causal attention of prompts over themselves.
 *
 * Torch's takes a product, a mask, a softmax and a product, each a pass over memory. Here a few
 * queries at a time are multiplied with the keys before them, and their weights with the values,
 * within the cache. It is compiled where it runs, by native.py.
 *
 * For each prompt and head: s = scale * q k^T, w = softmax(s) up to the query's own position, out =
 * w v. Sums are float. bfloat16 weights are rounded to that before they are multiplied with values,
 * and divided by the sum of what they were rounded to.
 *
 * Letters: B prompts, S positions, H heads, D size of a head.
 */
#include <omp.h>

#include "softmax.h"
#include "tile_sizes.h"

int64_t prefill_panel(void) { return PANEL; }
int64_t prefill_tile_rows(void) { return TILE_ROWS; }

#define TYPE float
#define STEP 1
#include "prefill_attention.h"
#undef TYPE
#undef STEP

#if MULTIPLIES_BFLOAT16
#define TYPE bfloat16
#define STEP 2
#include "prefill_attention.h"
#endif
