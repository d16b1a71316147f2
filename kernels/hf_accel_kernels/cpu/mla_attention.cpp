// Latent attention's entry points: cuts a call into blocks, shares them among threads, merges split keys, writes out.
#include "mla_attention.h"

#include <omp.h>

#include <vector>

#include "mla_product.h"

namespace {
using namespace mla;

constexpr int MIN_SPLIT_KEYS = 256;            // keys a thread gets at least when a block is split along its keys
constexpr int64_t CHUNK_BYTES = 32 << 20;      // of absorbed queries and their results at a time
constexpr int64_t MIN_CHUNK_TOKENS = 64;

thread_local Scratch block_scratch;             // one block's working memory
thread_local Scratch split_scratch;             // one call's states of split blocks
thread_local Scratch chunk_scratch;             // absorbed queries and results
thread_local std::vector<Block> call_blocks;

void cut_into_blocks(const HfaMlaArgs& a, std::vector<Block>& blocks) {
  blocks.clear();
  const int step = std::max(1, BLOCK_ROWS / a.num_heads);
  for (int s = 0; s < a.num_seqs; ++s) {
    const int start = a.query_start_loc[s], length = a.query_start_loc[s + 1] - start;
    for (int j = 0; j < length; j += step) {
      Block b;
      b.seq = s;
      b.first_token = start + j;
      b.num_tokens = std::min(step, length - j);
      b.first_position = a.seq_lens[s] - length + j;
      b.key_begin = 0;
      b.key_end = std::max(0, b.first_position + b.num_tokens);
      blocks.push_back(b);
    }
  }
}

void open_state(const Sizes& s, const State& state) {
  memset(state.acc, 0, size_t(s.num_panels * W * s.columns) * 4);
  for (int i = 0; i < s.num_panels * W; ++i) {
    state.base[i] = -INFINITY;
    state.sum[i] = 0;
  }
}

template <class T> void write_out(const HfaMlaArgs& a, const Block& b, const Sizes& s, const State& state) {
  for (int r = 0; r < s.num_rows; ++r) {
    T* to = static_cast<T*>(a.out) + (b.first_token + r / a.num_heads) * a.out_token_stride + r % a.num_heads * a.out_head_stride;
    const float* acc = state.acc + r / W * s.columns * W + r % W * W;
    const float sum = state.sum[r];
    const vf inverse = set1(sum > 0 ? 1.f / sum : sum == 0 ? 0.f : sum);  // NaN stays
    for (int c = 0; c < a.rank; c += W) store_n(to + c, loadu<vf>(acc + c * W) * inverse, a.rank - c);
  }
}

void merge(const Sizes& s, const State& into, const State& from) {
  for (int panel = 0; panel < s.num_panels; ++panel) {
    float *base = into.base + panel * W, *sum = into.sum + panel * W;
    const vf x = loadu<vf>(base), y = loadu<vf>(from.base + panel * W), top = usable(maximum(x, y));
    const vf fx = exp2(x - top), fy = exp2(y - top);
    storeu(base, maximum(x, y));
    storeu(sum, loadu<vf>(sum) * fx + loadu<vf>(from.sum + panel * W) * fy);
    const int64_t first = panel * s.columns * W;
    for (int64_t i = 0; i < s.columns; ++i) {
      float* to = into.acc + first + i * W;
      storeu(to, loadu<vf>(to) * set1(fx[i % W]) + loadu<vf>(from.acc + first + i * W) * set1(fy[i % W]));
    }
  }
}

template <class K, class T>
void attend(const HfaMlaArgs& a, const Block& b, const Block* after, const Sizes& s, const State& state, Scratch& scratch) {
  Buffers<K> buf;
  buf.take(s, scratch);
  open_state(s, state);
#ifdef HFA_MLA_AMX
  if constexpr (std::is_same_v<K, Bf16Tiles>) return attend_tiles<T>(a, b, after, s, state, buf);
#endif
  attend_vectors<K, T>(a, b, after, s, state, buf);
}

template <class K, class T> void run_whole(const HfaMlaArgs& a, const Block& b, const Block* after) {
  const Sizes s = Sizes::of<K>(a, b.num_tokens * a.num_heads);
  Scratch& scratch = block_scratch;
  scratch.reset(size_t(s.state_bytes() + Buffers<K>::bytes(s)));
  const State state = s.take_state(scratch);
  attend<K, T>(a, b, after, s, state, scratch);
  write_out<T>(a, b, s, state);
}

// Fewer blocks than threads: each block's keys are cut into num_splits runs, whose states are merged in order.
template <class K, class T> void run_split(const HfaMlaArgs& a, const std::vector<Block>& blocks, int num_splits) {
  const int num_items = int(blocks.size());
  int64_t bytes = 0;
  for (const Block& b : blocks) bytes += Sizes::of<K>(a, b.num_tokens * a.num_heads).state_bytes() * num_splits;
  Scratch& shared = split_scratch;
  shared.reset(size_t(bytes));
  std::vector<State> states;
  states.reserve(size_t(num_items) * num_splits);
  for (const Block& b : blocks)
    for (int i = 0; i < num_splits; ++i) states.push_back(Sizes::of<K>(a, b.num_tokens * a.num_heads).take_state(shared));
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.num_threads)
  for (int i = 0; i < num_items * num_splits; ++i) {
    Block b = blocks[size_t(i / num_splits)];
    const Sizes s = Sizes::of<K>(a, b.num_tokens * a.num_heads);
    const int chunk = int(round_up((b.key_end + num_splits - 1) / num_splits, K::TILE));
    b.key_begin = std::min(b.key_end, i % num_splits * chunk);
    b.key_end = std::min(b.key_end, b.key_begin + chunk);
    Scratch& scratch = block_scratch;
    scratch.reset(size_t(Buffers<K>::bytes(s)));
    attend<K, T>(a, b, nullptr, s, states[size_t(i)], scratch);
  }
#pragma omp parallel for num_threads(a.num_threads)
  for (int i = 0; i < num_items; ++i) {
    const Block& b = blocks[size_t(i)];
    const Sizes s = Sizes::of<K>(a, b.num_tokens * a.num_heads);
    const State& into = states[size_t(i) * num_splits];
    for (int j = 1; j < num_splits; ++j) merge(s, into, states[size_t(i) * num_splits + j]);
    write_out<T>(a, b, s, into);
  }
}

template <class K, class T> void run(const HfaMlaArgs& a) {
  std::vector<Block>& blocks = call_blocks;
  cut_into_blocks(a, blocks);
  const int num_items = int(blocks.size());
  if (a.num_threads <= 1) {
    for (int i = 0; i < num_items; ++i) run_whole<K, T>(a, blocks[size_t(i)], i + 1 < num_items ? &blocks[size_t(i) + 1] : nullptr);
    return;
  }
  int longest = 0, num_splits = 1;
  for (const Block& b : blocks) longest = std::max(longest, b.key_end);
  while (num_items * num_splits < 2 * a.num_threads && longest >= 2 * num_splits * MIN_SPLIT_KEYS) num_splits *= 2;
  if (num_splits > 1) return run_split<K, T>(a, blocks, num_splits);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.num_threads)
  for (int i = num_items - 1; i >= 0; --i) run_whole<K, T>(a, blocks[size_t(i)], nullptr);  // a sequence's last blocks are its longest
}

bool make_sense(const HfaMlaArgs& a) {
  return a.dtype >= HFA_FLOAT32 && a.dtype <= HFA_FLOAT16 && a.num_seqs >= 0 && a.num_heads > 0 && a.rank > 0 && a.rope >= 0 &&
         a.page_size > 0;
}

// f.run<K, T>(): K the kernels for the call's type T on this processor.
template <class F> auto with_kernels(const HfaMlaArgs& a, F f) {
  if (a.dtype == HFA_FLOAT32) return f.template run<Fp32Vectors, float>();
  if (a.dtype == HFA_FLOAT16) return f.template run<Fp32Vectors, fp16>();
#ifdef HFA_MLA_AMX
  if (amx_permitted()) return f.template run<Bf16Tiles, bf16>();
#endif
#ifdef HFA_BF16_DOT
  return f.template run<Bf16Vectors, bf16>();
#else
  return f.template run<Fp32Vectors, bf16>();
#endif
}

// Tokens [first, first + count) of a call, with tables of their own.
struct Chunk {
  std::vector<int32_t> seq_lens, starts;

  HfaMlaArgs of(const HfaMlaArgs& a, int64_t first, int64_t count) {
    seq_lens.assign(size_t(a.num_seqs), 0);
    starts.assign(size_t(a.num_seqs) + 1, 0);
    for (int s = 0; s < a.num_seqs; ++s) {
      const int64_t end = a.query_start_loc[s + 1];
      const int64_t from = std::clamp<int64_t>(a.query_start_loc[s], first, first + count);
      const int64_t to = std::clamp<int64_t>(end, first, first + count);
      starts[size_t(s) + 1] = int32_t(to - first);
      seq_lens[size_t(s)] = from < to ? int32_t(a.seq_lens[s] - (end - to)) : 0;
    }
    HfaMlaArgs part = a;
    part.seq_lens = seq_lens.data();
    part.query_start_loc = starts.data();
    return part;
  }
};

template <class T> void copy_rope(const HfaMlaArgs& a, const T* q, int64_t count, T* absorbed) {
  const int64_t width = int64_t(a.rank) + a.rope;
  for (int64_t t = 0; t < count; ++t)
    for (int h = 0; h < a.num_heads; ++h)
      memcpy(absorbed + (t * a.num_heads + h) * width + a.rank, q + t * a.q_token_stride + h * a.q_head_stride + a.nope,
             size_t(a.rope) * sizeof(T));
}

Scratch& thread_block_scratch() { return block_scratch; }

template <class K, class T> void run_absorbed(const HfaMlaArgs& a) {
  const int64_t width = int64_t(a.rank) + a.rope, heads = a.num_heads;
  const int64_t fit = CHUNK_BYTES / int64_t(sizeof(T)) / (heads * (width + a.rank));
  const int64_t step = std::min(a.num_tokens, std::max(fit, MIN_CHUNK_TOKENS));
  Scratch& scratch = chunk_scratch;
  scratch.reset(size_t(step * heads * (width + a.rank)) * sizeof(T) + 128);
  T* const absorbed = scratch.take<T>(step * heads * width);
  T* const o_lat = scratch.take<T>(step * heads * a.rank);
  const int64_t head_rows = (int64_t(a.nope) + a.v) * a.weight_stride;
  const T* const weight = static_cast<const T*>(a.weight);
  Chunk chunk;
  for (int64_t first = 0; first < a.num_tokens; first += step) {
    const int64_t count = std::min(step, a.num_tokens - first);
    const T* q = static_cast<const T*>(a.q) + first * a.q_token_stride;
    T* out = static_cast<T*>(a.out) + first * a.out_token_stride;
    for_heads<K, T>(a, count, thread_block_scratch, [&](const HeadProduct<K, T>& product, int64_t t, int h, bool more) {
      const T* w = weight + h * head_rows;
      product.absorb({q + t * a.q_token_stride + h * a.q_head_stride, a.q_token_stride}, {w, a.weight_stride, a.nope},
                     more ? w + head_rows : nullptr, {absorbed + (t * heads + h) * width, heads * width});
    });
    copy_rope(a, q, count, absorbed);
    HfaMlaArgs part = chunk.of(a, first, count);
    part.q = absorbed, part.q_token_stride = heads * width, part.q_head_stride = width;
    part.out = o_lat, part.out_token_stride = heads * a.rank, part.out_head_stride = a.rank;
    run<K, T>(part);
    for_heads<K, T>(a, count, thread_block_scratch, [&](const HeadProduct<K, T>& product, int64_t t, int h, bool more) {
      const T* w = weight + h * head_rows + a.nope * a.weight_stride;
      product.expand({o_lat + (t * heads + h) * a.rank, heads * a.rank}, {w, a.weight_stride, a.v}, more ? w + head_rows : nullptr,
                     {out + t * a.out_token_stride + h * a.out_head_stride, a.out_token_stride});
    });
  }
}

struct Attend {
  const HfaMlaArgs& a;
  template <class K, class T> void run() const { ::run<K, T>(a); }
};
struct Absorbed {
  const HfaMlaArgs& a;
  template <class K, class T> void run() const { run_absorbed<K, T>(a); }
};

}  // namespace

extern "C" int hfa_mla_attention(const HfaMlaArgs* args) {
  if (!make_sense(*args)) return 1;
  with_kernels(*args, Attend{*args});
  return 0;
}

extern "C" int hfa_mla_absorbed_attention(const HfaMlaArgs* args) {
  if (!make_sense(*args) || args->nope <= 0 || args->v <= 0 || args->num_tokens < 0) return 1;
  with_kernels(*args, Absorbed{*args});
  return 0;
}
