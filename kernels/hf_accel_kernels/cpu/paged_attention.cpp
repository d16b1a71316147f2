// The paged attention ops' entry points: cuts a call into blocks, shares them among threads, merges split keys, writes out.
#include "paged_attention.h"

#include <omp.h>

#include <atomic>
#include <vector>

#include "attention_amx.h"
#include "attention_decode.h"
#include "attention_prefill.h"

namespace {
using namespace attn;

constexpr int MIN_SPLIT_KEYS = 256;  // keys a thread gets at least when a block is split along its keys

thread_local Scratch thread_scratch;         // one block's working memory
thread_local Scratch call_scratch;           // one call's states of split blocks, owned by the calling thread
thread_local std::vector<Block> call_blocks; // one call's blocks

// What computes a block: decode rows by one arithmetic, all else by another or by the tile unit.
template <class D, class P> struct VectorForm {
  using T = typename D::T;
  using Decode = D;
  static constexpr int ROWS = BLOCK_ROWS, DECODE_ROWS = MAX_DECODE_ROWS;  // larger groups decode as prefill
  static int64_t scratch_bytes(const HfaAttentionArgs& a) { return prefill_scratch_bytes(a); }
  static void prefill(const HfaAttentionArgs& a, const Block& b, const State& state, Scratch& scratch) {
    prefill_block<P>(a, b, state, scratch);
  }
};

#if defined(HFA_SLOW_BF16_DOT)
using Bf16Form = VectorForm<Bf16Halves, Fp32Lanes<bf16>>;
#elif defined(HFA_BF16_DOT)
using Bf16Form = VectorForm<Bf16Pairs, Bf16Pairs>;
#else
using Bf16Form = VectorForm<Fp32Lanes<bf16>, Fp32Lanes<bf16>>;
#endif

#ifdef HFA_AMX
struct TileForm {
  using T = bf16;
  using Decode = Bf16Form::Decode;
  static constexpr int ROWS = AMX_BLOCK_ROWS, DECODE_ROWS = 8;
  static int64_t scratch_bytes(const HfaAttentionArgs& a) { return amx_scratch_bytes(a); }
  static void prefill(const HfaAttentionArgs& a, const Block& b, const State& state, Scratch& scratch) {
    amx_block(a, b, state, scratch);
  }
};
#endif

// The blocks of one kv head follow each other: they read the same keys.
template <class F> void cut_into_blocks(const HfaAttentionArgs& a, std::vector<Block>& blocks) {
  blocks.clear();
  const int step = std::max(1, F::ROWS / (a.num_heads / a.num_kv_heads));
  for (int s = 0; s < a.num_seqs; ++s) {
    const int start = a.query_start_loc[s], length = a.query_start_loc[s + 1] - start;
    for (int i = 0; i < (length + step - 1) / step * a.num_kv_heads; ++i) {
      const int blocks_per_head = (length + step - 1) / step, j = i % blocks_per_head * step;
      Block b;
      b.seq = s;
      b.kv_head = i / blocks_per_head;
      b.first_token = start + j;
      b.num_tokens = std::min(step, length - j);
      b.first_position = a.seq_lens[s] - length + j;
      b.key_end = std::max(0, b.first_position + b.num_tokens);
      b.key_begin = a.sliding_window ? std::max(0, b.first_position - a.sliding_window + 1) : 0;
      b.key_begin = std::min(b.key_begin, b.key_end);
      blocks.push_back(b);
    }
  }
}

int64_t acc_stride(const HfaAttentionArgs& a) { return round_up(a.v_head_dim, 2 * W); }
int64_t state_bytes(const HfaAttentionArgs& a, int64_t rows) { return rows * (acc_stride(a) + 2) * 4 + 3 * 64; }

State take_state(const HfaAttentionArgs& a, int64_t rows, Scratch& scratch) {
  State s;
  s.acc_stride = acc_stride(a);
  s.acc = scratch.take<float>(rows * s.acc_stride);
  s.max = scratch.take<float>(rows);
  s.sum = scratch.take<float>(rows);
  return s;
}

int64_t padded_rows(const HfaAttentionArgs& a, const Block& b) {
  return round_up(round_up(int64_t(b.num_tokens) * (a.num_heads / a.num_kv_heads), MR), 16);
}

// A sink is one more key with a zero value: it opens the running softmax of the first split.
void open_state(const HfaAttentionArgs& a, const Block& b, bool first_split, const State& state) {
  const int group = a.num_heads / a.num_kv_heads;
  const int64_t rows = padded_rows(a, b);
  memset(state.acc, 0, size_t(rows * state.acc_stride) * 4);
  for (int64_t r = 0; r < rows; ++r) {
    const bool sink = a.sinks && first_split;
    state.max[r] = sink ? a.sinks[b.kv_head * group + r % group] * LOG2E : -INFINITY;
    state.sum[r] = sink ? 1.f : 0.f;
  }
}

template <class T> void write_out(const HfaAttentionArgs& a, const Block& b, const State& state) {
  const int group = a.num_heads / a.num_kv_heads;
  for (int r = 0; r < b.num_tokens * group; ++r) {
    T* to = static_cast<T*>(a.out) + (b.first_token + r / group) * a.out_token_stride +
            (int64_t(b.kv_head) * group + r % group) * a.out_head_stride;
    const float* acc = state.acc + r * state.acc_stride;
    const vf inverse = set1(state.sum[r] > 0 ? 1.f / state.sum[r] : state.sum[r] == 0 ? 0.f : state.sum[r]);  // NaN stays
    for (int c = 0; c < a.v_head_dim; c += W) store_n(to + c, loadu<vf>(acc + c) * inverse, a.v_head_dim - c);
  }
}

void merge(const State& into, const State& from, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    if (from.max[r] == -INFINITY && from.sum[r] == 0) continue;
    const float top = std::max(into.max[r], from.max[r]), base = top == -INFINITY ? 0.f : top;
    const float x = std::exp2(into.max[r] - base), y = std::exp2(from.max[r] - base);
    float* acc = into.acc + r * into.acc_stride;
    const float* other = from.acc + r * from.acc_stride;
    for (int64_t c = 0; c < into.acc_stride; ++c) acc[c] = acc[c] * x + other[c] * y;
    into.sum[r] = into.sum[r] * x + from.sum[r] * y;
    into.max[r] = top;
  }
}

template <class F> void attend(const HfaAttentionArgs& a, const Block& b, const State& state, Scratch& scratch) {
  if (b.num_tokens == 1 && a.num_heads / a.num_kv_heads <= F::DECODE_ROWS) decode_block<typename F::Decode>(a, b, state, scratch);
  else F::prefill(a, b, state, scratch);
}

template <class F> int64_t block_bytes(const HfaAttentionArgs& a) {
  const int64_t rows = round_up(std::max(F::ROWS, a.num_heads / a.num_kv_heads), MR) + 16;
  return state_bytes(a, rows) + std::max(decode_scratch_bytes(a), F::scratch_bytes(a));
}

template <class F> void run_whole(const HfaAttentionArgs& a, const Block& b) {
  Scratch& scratch = thread_scratch;
  scratch.reset(size_t(block_bytes<F>(a)));
  const State state = take_state(a, padded_rows(a, b), scratch);
  open_state(a, b, true, state);
  attend<F>(a, b, state, scratch);
  write_out<typename F::T>(a, b, state);
}

// Fewer blocks than threads: each block's keys are cut into num_splits runs, whose states are merged in order.
template <class F> void run_split(const HfaAttentionArgs& a, const std::vector<Block>& blocks, int num_splits) {
  const int num_items = int(blocks.size());
  int64_t bytes = 0;
  for (const Block& b : blocks) bytes += state_bytes(a, padded_rows(a, b)) * num_splits;
  Scratch& shared = call_scratch;
  shared.reset(size_t(bytes));
  std::vector<State> states;
  states.reserve(size_t(num_items) * num_splits);
  for (const Block& b : blocks)
    for (int s = 0; s < num_splits; ++s) states.push_back(take_state(a, padded_rows(a, b), shared));
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.num_threads)
  for (int i = 0; i < num_items * num_splits; ++i) {
    Block b = blocks[size_t(i / num_splits)];
    const int split = i % num_splits;
    const int chunk = int(round_up((b.key_end - b.key_begin + num_splits - 1) / num_splits, 64));
    b.key_begin = std::min(b.key_end, b.key_begin + split * chunk);
    b.key_end = std::min(b.key_end, b.key_begin + chunk);
    Scratch& scratch = thread_scratch;
    scratch.reset(size_t(block_bytes<F>(a)));
    open_state(a, b, split == 0, states[size_t(i)]);
    attend<F>(a, b, states[size_t(i)], scratch);
  }
#pragma omp parallel for num_threads(a.num_threads)
  for (int i = 0; i < num_items; ++i) {
    const Block& b = blocks[size_t(i)];
    const State& into = states[size_t(i) * num_splits];
    for (int s = 1; s < num_splits; ++s) merge(into, states[size_t(i) * num_splits + s], padded_rows(a, b));
    write_out<typename F::T>(a, b, into);
  }
}

template <class F> void run(const HfaAttentionArgs& a) {
  std::vector<Block>& blocks = call_blocks;
  cut_into_blocks<F>(a, blocks);
  const int num_items = int(blocks.size());
  if (a.num_threads <= 1) {
    for (const Block& b : blocks) run_whole<F>(a, b);
    return;
  }
  int longest = 0;
  for (const Block& b : blocks) longest = std::max(longest, b.key_end - b.key_begin);
  int num_splits = 1;
  while (num_items * num_splits < 2 * a.num_threads && longest >= 2 * num_splits * MIN_SPLIT_KEYS) num_splits *= 2;
  if (num_splits > 1) return run_split<F>(a, blocks, num_splits);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.num_threads)
  for (int i = num_items - 1; i >= 0; --i)  // a head's last blocks are its longest
    run_whole<F>(a, blocks[size_t(i)]);
}

std::atomic<bool> tiles_wanted{true};

bool use_tiles() {
#ifdef HFA_AMX
  return tiles_wanted.load(std::memory_order_relaxed) && amx_permitted();
#else
  return false;
#endif
}

void run_bf16(const HfaAttentionArgs& a) {
#ifdef HFA_AMX
  if (use_tiles()) return run<TileForm>(a);
#endif
  run<Bf16Form>(a);
}

template <class T> void store(const HfaStoreKvArgs& a) {
  const auto token = [&](int i) {
    const int64_t slot = a.slot_mapping[i];
    if (slot < 0) return;
    const int64_t page = slot / a.page_size, offset = slot % a.page_size;
    for (int h = 0; h < a.num_kv_heads; ++h) {
      const int64_t row = (page * a.num_kv_heads + h) * a.page_size + offset;
      memcpy(static_cast<T*>(a.k_pages) + row * a.head_dim,
             static_cast<const T*>(a.k) + i * a.k_token_stride + h * a.k_head_stride, size_t(a.head_dim) * sizeof(T));
      memcpy(static_cast<T*>(a.v_pages) + row * a.v_head_dim,
             static_cast<const T*>(a.v) + i * a.v_token_stride + h * a.v_head_stride, size_t(a.v_head_dim) * sizeof(T));
    }
  };
  if (a.num_threads <= 1 || a.num_tokens < 64) {
    for (int i = 0; i < a.num_tokens; ++i) token(i);
    return;
  }
#pragma omp parallel for num_threads(a.num_threads)
  for (int i = 0; i < a.num_tokens; ++i) token(i);
}
}  // namespace

extern "C" int hfa_paged_attention(const HfaAttentionArgs* args) {
  const HfaAttentionArgs& a = *args;
  if (a.num_seqs < 0 || a.num_kv_heads <= 0 || a.num_heads <= 0 || a.num_heads % a.num_kv_heads || a.head_dim <= 0 ||
      a.v_head_dim <= 0 || a.page_size <= 0 || a.sliding_window < 0)
    return 1;
  switch (a.dtype) {
    case HFA_FLOAT32: run<VectorForm<Fp32Lanes<float>, Fp32Lanes<float>>>(a); return 0;
    case HFA_BFLOAT16: run_bf16(a); return 0;
    case HFA_FLOAT16: run<VectorForm<Fp32Lanes<fp16>, Fp32Lanes<fp16>>>(a); return 0;
    default: return 1;
  }
}

extern "C" int hfa_attention_tiles(int wanted) {
  tiles_wanted.store(wanted != 0, std::memory_order_relaxed);
  return use_tiles();
}

extern "C" int hfa_store_kv(const HfaStoreKvArgs* args) {
  if (args->page_size <= 0 || args->num_kv_heads <= 0) return 1;
  switch (args->dtype) {
    case HFA_FLOAT32: store<float>(*args); return 0;
    case HFA_BFLOAT16:
    case HFA_FLOAT16: store<uint16_t>(*args); return 0;
    default: return 1;
  }
}
