// C ABI of latent attention for CPUs (DeepSeek's MLA, absorbed): one row of `rank` latent and `rope` rotary values a token,
// in pages, read once for all heads. Re-entrant; every pointer is borrowed for the call.
#pragma once
#include <cstdint>

#include "paged_attention.h"

extern "C" {

struct HfaMlaArgs {
  int32_t dtype;  // HfaDtype of q, out and (without scales) pages
  int32_t num_seqs, num_heads, rank, rope, page_size, num_threads;
  float scale;
  const void* q;  // [num_tokens, num_heads, rank + rope], absorbed: [.., nope + rope]; strides in elements, last one 1
  int64_t q_token_stride, q_head_stride;
  const void* pages;    // [num_pages, page_size, rank + rope], contiguous
  const float* scales;  // null, or [num_pages, page_size, 2]: pages are float8_e4m3fn, to be multiplied with these
  const int32_t* page_table;  // [num_seqs, >= pages]
  int64_t page_table_stride;
  const int32_t* seq_lens;         // [num_seqs] context length including this step's tokens
  const int32_t* query_start_loc;  // [num_seqs + 1]
  void* out;                       // [num_tokens, num_heads, rank], absorbed: [.., v]
  int64_t out_token_stride, out_head_stride;
  // hfa_mla_absorbed_attention only:
  int64_t num_tokens;
  int32_t nope, v;
  const void* weight;  // [num_heads, nope + v, rank] of q's type: Wuk above Wuv
  int64_t weight_stride;
};

// Query j of a sequence with q_len queries stands at position seq_len - q_len + j (causal, bottom-right).
// Returns 0, or 1 for arguments that make no sense.
int hfa_mla_attention(const HfaMlaArgs* args);

// Absorb each head's query, attend, expand each head's result; intermediates are of q's type.
int hfa_mla_absorbed_attention(const HfaMlaArgs* args);

struct HfaMlaStoreArgs {
  int32_t dtype, num_tokens, rank, rope, page_size, num_threads;
  const void* latent;  // [num_tokens, rank]
  int64_t latent_stride;
  const void* rope_key;  // [num_tokens, rope]
  int64_t rope_key_stride;
  void* pages;
  float* scales;                // null, or as above; written
  const int64_t* slot_mapping;  // [num_tokens] page * page_size + offset; < 0: skip
};

int hfa_mla_store(const HfaMlaStoreArgs* args);
}
