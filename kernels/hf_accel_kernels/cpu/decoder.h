// One forward step of a dense Llama-like decoder, plain C ABI: embedding, layers over paged KV, logits of chosen rows.
// Knows packed weights, pages and batches; not where the weights came from, nor who schedules the batch.
#pragma once
#include <cstdint>

#include "gemm.h"

extern "C" {

typedef struct HfaWorkspace HfaWorkspace;  // intermediate activations, grown on demand

typedef struct HfaDecoderLayer {
  const HfaPacked* qkv;      // q, k, v side by side: [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
  const HfaPacked* o_proj;   // [hidden_size, num_heads * head_dim]
  const HfaPacked* gate_up;  // interleaved by half panels: [2 * intermediate_size, hidden_size]
  const HfaPacked* down;     // [hidden_size, intermediate_size]
  const void* input_norm;    // [hidden_size]
  const void* post_norm;     // [hidden_size]
  const void* q_norm;        // [head_dim] or null
  const void* k_norm;        // [head_dim] or null
  float scale;               // of the attention scores
  int32_t sliding_window;    // 0: none; w: token i sees (i - w, i]
  int32_t use_rope;
} HfaDecoderLayer;

typedef struct HfaDecoder {
  int32_t dtype;  // HfaDtype: float32 or bfloat16; weights, activations and pages share it
  int32_t num_layers, num_heads, num_kv_heads, head_dim, rotary_dim, page_size;
  int64_t hidden_size, intermediate_size, vocab_size, embedding_rows, max_positions;
  float norm_eps;
  float embedding_multiplier, residual_multiplier, logits_divisor;  // 1 for none
  const void* embedding;   // [embedding_rows, hidden_size]
  const void* final_norm;  // [hidden_size]
  const HfaPacked* lm_head;
  const float* cos;  // [max_positions, rotary_dim], values of the model's dtype held as float32
  const float* sin;
  const HfaDecoderLayer* layers;  // [num_layers]
  HfaWorkspace* workspace;        // one call at a time
} HfaDecoder;

typedef struct HfaBatch {
  int64_t num_tokens, num_seqs, num_logits, num_pages, page_table_stride;
  const int64_t* input_ids;        // [num_tokens]; unread when `hidden` is given
  const void* hidden;              // [num_tokens, hidden_size] embeddings to start from, or null
  const int64_t* positions;        // [num_tokens]
  const int64_t* slot_mapping;     // [num_tokens] page * page_size + offset; < 0: not stored
  const int32_t* page_table;       // [num_seqs, >= pages]
  const int32_t* seq_lens;         // [num_seqs] context length including this step's tokens
  const int32_t* query_start_loc;  // [num_seqs + 1]
  const int64_t* logits_indices;   // [num_logits] rows whose logits are wanted
  void* const* k_pages;            // [num_layers] of [num_pages, num_kv_heads, page_size, head_dim]
  void* const* v_pages;
  float* logits;  // [num_logits, vocab_size]
  int32_t num_threads;
} HfaBatch;

enum HfaDecoderError {
  HFA_OK = 0,
  HFA_BAD_TOKEN = 1,     // an input id outside the embedding table
  HFA_BAD_POSITION = 2,  // a position outside the rope tables
  HFA_BAD_PAGE = 3,      // a slot or page outside the pool
  HFA_BAD_BATCH = 4,     // query_start_loc, seq_lens or logits_indices do not fit together
  HFA_NO_MEMORY = 5,
  HFA_BAD_MODEL = 6,  // the attention refuses the sizes
};

HfaWorkspace* hfa_workspace_create(void);
void hfa_workspace_destroy(HfaWorkspace* workspace);

// Returns an HfaDecoderError; on an error found in the batch nothing has been written.
int32_t hfa_decoder_forward(const HfaDecoder* decoder, const HfaBatch* batch);
}
