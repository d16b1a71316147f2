// C ABI of the paged attention ops for CPUs: one varlen attention (prefill chunks, decode rows, mixed batches) and the
// store of new keys and values into the pages. Re-entrant; every pointer is borrowed for the call.
#pragma once
#include <cstdint>

extern "C" {

enum HfaDtype { HFA_FLOAT32 = 0, HFA_BFLOAT16 = 1, HFA_FLOAT16 = 2 };

struct HfaAttentionArgs {
  int32_t dtype, num_seqs, num_heads, num_kv_heads, head_dim, v_head_dim, page_size, num_threads;
  int32_t sliding_window;       // 0: none; w: token i sees (i-w, i]
  float scale, softcap;         // softcap 0: none; logits = softcap*tanh(s/softcap)
  const float* sinks;           // [num_heads] or null: one more logit in the softmax's denominator (GPT-OSS)
  const void* q;                // [num_tokens, num_heads, head_dim], strides in elements, last dimension contiguous
  int64_t q_token_stride, q_head_stride;
  const void* k_pages;          // [num_pages, num_kv_heads, page_size, head_dim], contiguous
  const void* v_pages;          // [num_pages, num_kv_heads, page_size, v_head_dim], contiguous
  const int32_t* page_table;    // [num_seqs, >= pages]
  int64_t page_table_stride;
  const int32_t* seq_lens;         // [num_seqs] context length including this step's tokens
  const int32_t* query_start_loc;  // [num_seqs + 1]
  void* out;                       // [num_tokens, num_heads, v_head_dim]
  int64_t out_token_stride, out_head_stride;
};

// Query j of a sequence with q_len queries stands at position seq_len - q_len + j (causal, bottom-right).
// Returns 0, or 1 for arguments that make no sense (dtype, sizes, num_heads % num_kv_heads).
int hfa_paged_attention(const HfaAttentionArgs* args);

// Whether bf16 prefill may use the tile unit (AMX), for the whole process; it may from the start. Returns 1 if it will:
// it is wanted, compiled in, and the operating system permits it.
int hfa_attention_tiles(int wanted);

struct HfaStoreKvArgs {
  int32_t dtype, num_tokens, num_kv_heads, head_dim, v_head_dim, page_size, num_threads;
  const void* k;  // [num_tokens, num_kv_heads, head_dim]
  int64_t k_token_stride, k_head_stride;
  const void* v;  // [num_tokens, num_kv_heads, v_head_dim]
  int64_t v_token_stride, v_head_stride;
  void* k_pages;
  void* v_pages;
  const int64_t* slot_mapping;  // [num_tokens] page*page_size + offset; < 0: skip
};

int hfa_store_kv(const HfaStoreKvArgs* args);  // 0 ok
}
