#include "decoder.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "elementwise.h"
#include "paged_attention.h"
#include "simd.h"

using namespace hfa;

struct HfaWorkspace {
  enum Slot { kHidden, kNormed, kQkv, kAttention, kMlp, kPicked, kNumSlots };
  void* memory[kNumSlots] = {};
  int64_t capacity[kNumSlots] = {};

  template <typename T>
  T* get(Slot slot, int64_t count) {
    const int64_t size = (count * int64_t(sizeof(T)) + 4095) / 4096 * 4096;
    if (size > capacity[slot]) {
      std::free(memory[slot]);
      capacity[slot] = 0;
      memory[slot] = std::aligned_alloc(4096, size);
      if (!memory[slot]) throw std::bad_alloc();
      capacity[slot] = size;
    }
    return static_cast<T*>(memory[slot]);
  }

  ~HfaWorkspace() {
    for (void* p : memory) std::free(p);
  }
};

namespace {

int32_t check_tokens(const HfaDecoder& d, const HfaBatch& b) {
  const int64_t slots = b.num_pages * d.page_size;
  for (int64_t t = 0; t < b.num_tokens; ++t) {
    if (!b.hidden && (b.input_ids[t] < 0 || b.input_ids[t] >= d.embedding_rows)) return HFA_BAD_TOKEN;
    if (b.positions[t] < 0 || b.positions[t] >= d.max_positions) return HFA_BAD_POSITION;
    if (b.slot_mapping[t] >= slots) return HFA_BAD_PAGE;
  }
  return HFA_OK;
}

int32_t check_batch(const HfaDecoder& d, const HfaBatch& b) {
  if (b.num_tokens <= 0 || b.num_seqs <= 0 || b.query_start_loc[0] != 0) return HFA_BAD_BATCH;
  if (b.query_start_loc[b.num_seqs] != b.num_tokens) return HFA_BAD_BATCH;
  for (int64_t s = 0; s < b.num_seqs; ++s) {
    const int64_t queries = b.query_start_loc[s + 1] - b.query_start_loc[s];
    if (queries < 0 || b.seq_lens[s] < queries) return HFA_BAD_BATCH;
    const int64_t pages = queries ? (int64_t(b.seq_lens[s]) + d.page_size - 1) / d.page_size : 0;
    if (pages > b.page_table_stride) return HFA_BAD_BATCH;
    const int32_t* table = b.page_table + s * b.page_table_stride;
    for (int64_t p = 0; p < pages; ++p)
      if (table[p] < 0 || table[p] >= b.num_pages) return HFA_BAD_PAGE;
  }
  for (int64_t r = 0; r < b.num_logits; ++r)
    if (b.logits_indices[r] < 0 || b.logits_indices[r] >= b.num_tokens) return HFA_BAD_BATCH;
  return check_tokens(d, b);
}

template <typename T>
class Step {
 public:
  Step(const HfaDecoder& d, const HfaBatch& b)
      : d_(d),
        b_(b),
        tokens_(b.num_tokens),
        q_size_(int64_t(d.num_heads) * d.head_dim),
        kv_size_(int64_t(d.num_kv_heads) * d.head_dim),
        qkv_size_(q_size_ + 2 * kv_size_),
        query_start_loc_(b.query_start_loc) {
    HfaWorkspace& w = *d.workspace;
    hidden_ = w.get<T>(HfaWorkspace::kHidden, tokens_ * d.hidden_size);
    normed_ = w.get<T>(HfaWorkspace::kNormed, std::max(tokens_, b.num_logits) * d.hidden_size);
    qkv_ = w.get<T>(HfaWorkspace::kQkv, tokens_ * qkv_size_);
    attention_ = w.get<T>(HfaWorkspace::kAttention, tokens_ * q_size_);
    mlp_ = w.get<T>(HfaWorkspace::kMlp, tokens_ * d.intermediate_size);
  }

  int32_t run() {
    embed();
    for (int32_t l = 0; l < d_.num_layers; ++l) {
      const HfaDecoderLayer& layer = d_.layers[l];
      const bool last = l + 1 == d_.num_layers;
      norm(hidden_, layer.input_norm, tokens_);
      linear(layer.qkv, normed_, d_.hidden_size, tokens_, qkv_, qkv_size_, nullptr, HFA_PLAIN);
      rotate(layer);
      if (store_kv(l)) return HFA_BAD_MODEL;
      if (last && b_.num_logits == 0) return HFA_OK;
      if (last) keep_logit_queries();
      if (attend(layer, l)) return HFA_BAD_MODEL;
      if (last) keep_logit_rows();
      linear(layer.o_proj, attention_, q_size_, tokens_, hidden_, d_.hidden_size, hidden_, HFA_PLAIN);
      norm(hidden_, layer.post_norm, tokens_);
      linear(layer.gate_up, normed_, d_.hidden_size, tokens_, mlp_, d_.intermediate_size, nullptr, HFA_SILU_MUL);
      linear(layer.down, mlp_, d_.intermediate_size, tokens_, hidden_, d_.hidden_size, hidden_, HFA_PLAIN);
    }
    if (b_.num_logits) logits();
    return HFA_OK;
  }

 private:
  template <typename F>
  void rows(int64_t count, int64_t width, F f) {
    parallel_rows(count, width, b_.num_threads, f);
  }

  void embed() {
    const T* table = static_cast<const T*>(b_.hidden ? b_.hidden : d_.embedding);
    rows(tokens_, d_.hidden_size, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* row = table + (b_.hidden ? t : b_.input_ids[t]) * d_.hidden_size;
        T* out = hidden_ + t * d_.hidden_size;
        std::memcpy(out, row, d_.hidden_size * sizeof(T));
        if (d_.embedding_multiplier == 1.f) continue;
        for (int64_t i = 0; i < d_.hidden_size; ++i) from_float(to_float(row[i]) * d_.embedding_multiplier, out + i);
      }
    });
  }

  void norm(const T* x, const void* weight, int64_t count) {
    rows(count, d_.hidden_size, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        rms_norm_row(x + t * d_.hidden_size, static_cast<const T*>(weight), d_.hidden_size, d_.norm_eps,
                     normed_ + t * d_.hidden_size);
    });
  }

  void linear(const HfaPacked* w, const T* x, int64_t x_stride, int64_t count, T* out, int64_t out_stride,
              const T* residual, int32_t epilogue) {
    HfaLinearArgs args = {};
    args.x = x, args.x_stride = x_stride, args.num_rows = count;
    args.out = out, args.out_stride = out_stride;
    args.residual = residual, args.residual_stride = out_stride;
    args.scale = residual ? d_.residual_multiplier : 1.f;
    args.epilogue = epilogue;
    args.num_threads = b_.num_threads;
    hfa_packed_linear(w, &args);
  }

  // Per-head norms and the rotary embedding, on q and k where they lie.
  void rotate(const HfaDecoderLayer& layer) {
    if (!layer.use_rope && !layer.q_norm && !layer.k_norm) return;
    const int32_t heads = d_.num_heads + d_.num_kv_heads;
    rows(tokens_, heads * d_.head_dim, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const float* cos = d_.cos + b_.positions[t] * d_.rotary_dim;
        const float* sin = d_.sin + b_.positions[t] * d_.rotary_dim;
        for (int32_t h = 0; h < heads; ++h) {
          T* x = qkv_ + t * qkv_size_ + h * d_.head_dim;
          const T* weight = static_cast<const T*>(h < d_.num_heads ? layer.q_norm : layer.k_norm);
          if (weight) rms_norm_row(x, weight, d_.head_dim, d_.norm_eps, x);
          if (layer.use_rope) rope_row(x, cos, sin, d_.rotary_dim);
        }
      }
    });
  }

  int store_kv(int32_t l) {
    HfaStoreKvArgs args = {};
    args.dtype = d_.dtype, args.num_tokens = int32_t(tokens_), args.num_kv_heads = d_.num_kv_heads;
    args.head_dim = args.v_head_dim = d_.head_dim;
    args.page_size = d_.page_size, args.num_threads = b_.num_threads;
    args.k = qkv_ + q_size_, args.v = qkv_ + q_size_ + kv_size_;
    args.k_token_stride = args.v_token_stride = qkv_size_;
    args.k_head_stride = args.v_head_stride = d_.head_dim;
    args.k_pages = b_.k_pages[l], args.v_pages = b_.v_pages[l];
    args.slot_mapping = b_.slot_mapping;
    return hfa_store_kv(&args);
  }

  int attend(const HfaDecoderLayer& layer, int32_t l) {
    HfaAttentionArgs args = {};
    args.dtype = d_.dtype, args.num_seqs = int32_t(b_.num_seqs);
    args.num_heads = d_.num_heads, args.num_kv_heads = d_.num_kv_heads;
    args.head_dim = args.v_head_dim = d_.head_dim;
    args.page_size = d_.page_size, args.num_threads = b_.num_threads;
    args.sliding_window = layer.sliding_window, args.scale = layer.scale;
    args.q = qkv_, args.q_token_stride = qkv_size_, args.q_head_stride = d_.head_dim;
    args.k_pages = b_.k_pages[l], args.v_pages = b_.v_pages[l];
    args.page_table = b_.page_table, args.page_table_stride = b_.page_table_stride;
    args.seq_lens = b_.seq_lens, args.query_start_loc = query_start_loc_;
    args.out = attention_, args.out_token_stride = q_size_, args.out_head_stride = d_.head_dim;
    return hfa_paged_attention(&args);
  }

  // In the last layer only queries from a sequence's first wanted row on are needed: the ends of sequences, as a rule.
  void keep_logit_queries() {
    starts_.assign(b_.num_seqs + 1, 0);
    kept_.clear();
    for (int64_t s = 0; s < b_.num_seqs; ++s) {
      int64_t first = b_.query_start_loc[s + 1];
      for (int64_t r = 0; r < b_.num_logits; ++r)
        if (b_.logits_indices[r] >= b_.query_start_loc[s]) first = std::min(first, b_.logits_indices[r]);
      for (int64_t t = first; t < b_.query_start_loc[s + 1]; ++t) kept_.push_back(t);
      starts_[s + 1] = int32_t(kept_.size());
    }
    if (int64_t(kept_.size()) == tokens_) return;
    for (size_t i = 0; i < kept_.size(); ++i)  // rows only move down, none is overwritten before it is read
      std::memmove(qkv_ + i * qkv_size_, qkv_ + kept_[i] * qkv_size_, q_size_ * sizeof(T));
    query_start_loc_ = starts_.data();
  }

  // After the last attention only the rows whose logits are wanted go on.
  void keep_logit_rows() {
    HfaWorkspace& w = *d_.workspace;
    const int64_t count = b_.num_logits;
    T* picked = w.get<T>(HfaWorkspace::kPicked, count * (q_size_ + d_.hidden_size));
    T* picked_hidden = picked + count * q_size_;
    mlp_ = w.get<T>(HfaWorkspace::kMlp, count * d_.intermediate_size);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = b_.logits_indices[r];
      const int64_t row = std::lower_bound(kept_.begin(), kept_.end(), t) - kept_.begin();
      std::memcpy(picked + r * q_size_, attention_ + row * q_size_, q_size_ * sizeof(T));
      std::memcpy(picked_hidden + r * d_.hidden_size, hidden_ + t * d_.hidden_size, d_.hidden_size * sizeof(T));
    }
    attention_ = picked, hidden_ = picked_hidden, tokens_ = count;
  }

  void logits() {
    norm(hidden_, d_.final_norm, tokens_);
    HfaLinearArgs args = {};
    args.x = normed_, args.x_stride = d_.hidden_size, args.num_rows = tokens_;
    args.out = b_.logits, args.out_stride = d_.vocab_size;
    args.scale = 1.f, args.out_float32 = 1, args.num_threads = b_.num_threads;
    hfa_packed_linear(d_.lm_head, &args);
    if (d_.logits_divisor == 1.f) return;
    rows(tokens_, d_.vocab_size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * d_.vocab_size; i < end * d_.vocab_size; ++i)
        b_.logits[i] = rounded<T>(b_.logits[i] / d_.logits_divisor);
    });
  }

  const HfaDecoder& d_;
  const HfaBatch& b_;
  int64_t tokens_;  // rows alive: all of the batch, then those of the logits
  const int64_t q_size_, kv_size_, qkv_size_;
  T *hidden_, *normed_, *qkv_, *attention_, *mlp_;
  const int32_t* query_start_loc_;  // of the queries that attend
  std::vector<int64_t> kept_;       // their rows in the batch, in the last layer
  std::vector<int32_t> starts_;
};

}  // namespace

extern "C" {

HfaWorkspace* hfa_workspace_create(void) { return new (std::nothrow) HfaWorkspace; }

void hfa_workspace_destroy(HfaWorkspace* workspace) { delete workspace; }

int32_t hfa_decoder_forward(const HfaDecoder* decoder, const HfaBatch* batch) {
  if (const int32_t error = check_batch(*decoder, *batch)) return error;
  try {
    return decoder->dtype ? Step<bf16>(*decoder, *batch).run() : Step<float>(*decoder, *batch).run();
  } catch (const std::bad_alloc&) {
    return HFA_NO_MEMORY;
  }
}
}
