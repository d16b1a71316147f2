// Linear layers over packed weights, plain C ABI. A packed weight is a second copy of W [N, K] in panels of
// hfa_panel_columns() output columns, each laid out as its kernel reads it (gemm_packed.h). Knows nothing of models.
#pragma once
#include <cstdint>

extern "C" {

// Element types: 0 = float32, 1 = bfloat16.
typedef struct HfaPacked HfaPacked;

enum HfaEpilogue { HFA_PLAIN = 0, HFA_SILU_MUL = 1 };

typedef struct HfaLinearArgs {
  const void* x;         // [M, K], the weight's type, rows `x_stride` elements apart
  int64_t x_stride;
  int64_t num_rows;      // M
  void* out;             // [M, N] (HFA_SILU_MUL: [M, N / 2]), rows `out_stride` elements apart
  int64_t out_stride;
  const void* residual;  // same shape as out, the weight's type, or null; may be `out` itself
  int64_t residual_stride;
  float scale;           // of the product, before the residual; 1 for none
  int32_t epilogue;      // HfaEpilogue
  int32_t out_float32;   // 1: out is float32 whatever the weight's type; 0: the weight's type
  int32_t keep_float32;  // 1: with out_float32, do not round to the weight's type first
  int32_t num_threads;
} HfaLinearArgs;

// Columns of a panel; HFA_SILU_MUL expects the gate in the left half of each panel and the up projection in the right.
int32_t hfa_panel_columns(void);

// Whether bfloat16 weights packed from now on are multiplied on AMX tiles: not where the processor or the kernel has none,
// nor with `wanted` 0 (for tests). Weights packed before stay as they are.
int32_t hfa_amx(int32_t wanted);

// Null when memory is short. Weights start as zero.
HfaPacked* hfa_packed_create(int64_t num_columns, int64_t depth, int32_t dtype, int32_t with_bias);
void hfa_packed_destroy(HfaPacked* packed);
int64_t hfa_packed_bytes(const HfaPacked* packed);

// Copies weight [rows, K] (rows `stride` elements apart, the packed type) so that its row r becomes column
// first + (r / group) * group_stride + r % group. Group >= rows packs the rows side by side. `bias` [rows] or null.
void hfa_pack_weight(HfaPacked* packed, const void* weight, int64_t stride, int64_t rows, int64_t first, int64_t group,
                     int64_t group_stride, const void* bias, int32_t num_threads);

// out = epilogue(x W^T + bias), accumulated in float32, each intermediate rounded to the weight's type as a chain of
// tensor operations would.
void hfa_packed_linear(const HfaPacked* packed, const HfaLinearArgs* args);
}
