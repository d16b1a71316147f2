// Routed experts of a mixture-of-experts layer over row-major weights, plain C ABI. Reads the live parameters, of the
// chosen experts only, and keeps no copy. Knows tensors; not routers, models or who chose the experts.
#pragma once
#include <cstdint>

extern "C" {

enum HfaMoeActivation { HFA_MOE_SILU = 0, HFA_MOE_GELU_TANH = 1, HFA_MOE_GELU = 2, HFA_MOE_RELU = 3 };

typedef struct HfaMoeArgs {
  int32_t dtype;       // 0 = float32, 1 = bfloat16, 2 = float16: of hidden, gate_up, down and out
  int32_t activation;  // HfaMoeActivation
  int32_t round_weighted;  // 1: an expert's output times its weight is rounded to dtype before the sum
  int32_t num_threads;
  int64_t num_tokens, top_k, num_experts, hidden_size, intermediate_size;
  const void* hidden;  // [num_tokens, hidden_size], rows `hidden_stride` elements apart
  int64_t hidden_stride;
  const int64_t* expert_ids;    // [num_tokens, top_k]; an id >= num_experts contributes nothing
  const float* expert_weights;  // [num_tokens, top_k]
  const void* gate_up;          // [num_experts, 2 * intermediate_size, hidden_size], gate first
  const void* down;             // [num_experts, hidden_size, intermediate_size]
  void* out;                    // [num_tokens, hidden_size], rows `out_stride` elements apart; overwritten
  int64_t out_stride;
} HfaMoeArgs;

enum HfaMoeError { HFA_MOE_OK = 0, HFA_MOE_BAD_EXPERT = 1, HFA_MOE_NO_MEMORY = 2, HFA_MOE_BAD_DTYPE = 3 };

// Tokens of one expert from which bfloat16 goes through matrix tiles (AMX) here; 0: never, this machine has none.
int32_t hfa_moe_tile_tokens(void);

// Returns an HfaMoeError; on one, `out` is unspecified. HFA_MOE_BAD_EXPERT: a negative id.
int32_t hfa_moe_experts(const HfaMoeArgs* args);
}
