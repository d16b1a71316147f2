// Prefill: a block of query rows against tiles of keys, as two blocked matrix products around a softmax. A tile's keys are
// converted and transposed once for the block, its values converted once; MR rows x NR columns stay in registers.
#pragma once
#include "attention_tile.h"

namespace {
namespace attn {

constexpr int MR = 6;
constexpr int NV = NUM_REGS == 32 ? 4 : 2;
constexpr int NR = NV * W;
constexpr int BLOCK_ROWS = 192;
constexpr int PREFILL_TILE = 128;
static_assert(PREFILL_TILE == MAX_TILE && MR <= 8 && PREFILL_TILE % NR == 0 && BLOCK_ROWS % MR == 0);

// c[MR, N*W] = alpha * c + a[MR, len] . b[len, N*W] in words; a's element (r, k) is at r*RS + k*KS. alpha null: c = a . b.
template <class K, int N, int RS, int KS>
static HFA_INLINE void multiply(int len, const typename K::Word* a, const typename K::Word* b, int64_t b_stride, float* c,
                                int64_t c_stride, const float* alpha) {
  vf acc[MR][N];
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) acc[r][i] = alpha ? loadu<vf>(c + r * c_stride + i * W) * set1(alpha[r]) : zero();
  for (int k = 0; k < len; ++k) {
    typename K::Reg bk[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) bk[i] = loadu<typename K::Reg>(b + i * W);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) {
      const typename K::Reg w = K::broadcast(a[r * RS]);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) acc[r][i] = K::mac(acc[r][i], w, bk[i]);
    }
    a += KS;
    b += b_stride;
  }
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) storeu(c + r * c_stride + i * W, acc[r][i]);
}

template <class K, int RS, int KS>
static void multiply_columns(int num_vectors, int len, const typename K::Word* a, const typename K::Word* b, int64_t b_stride,
                             float* c, int64_t c_stride, const float* alpha) {
  switch (num_vectors) {
    case 1: multiply<K, 1, RS, KS>(len, a, b, b_stride, c, c_stride, alpha); break;
    case 2: multiply<K, 2, RS, KS>(len, a, b, b_stride, c, c_stride, alpha); break;
    case 3: multiply<K, NV == 4 ? 3 : 1, RS, KS>(len, a, b, b_stride, c, c_stride, alpha); break;
    default: multiply<K, NV, RS, KS>(len, a, b, b_stride, c, c_stride, alpha);
  }
}

// Scratch of one block. Words: [key panels][num_words][NR] for K, [steps][v_stride] for V, [row groups][num_words][MR] for Q.
template <class K> struct PrefillBuffers {
  using Word = typename K::Word;
  int64_t num_words, v_stride;
  Word *q, *k, *v;
  int* position;  // [rows] of the row's token in its sequence
};

template <class K> static void pack_queries(const HfaAttentionArgs& a, const Block& b, int num_rows, PrefillBuffers<K>& buf) {
  using T = typename K::T;
  constexpr int PW = K::PER_WORD;
  const int group = a.num_heads / a.num_kv_heads;
  const auto row = [&](int r) {
    return static_cast<const T*>(a.q) + (b.first_token + r / group) * a.q_token_stride +
           (int64_t(b.kv_head) * group + r % group) * a.q_head_stride;
  };
  typename K::Word* to = buf.q;
  for (int r0 = 0; r0 < num_rows; r0 += MR) {
    const T* from[MR];
    for (int i = 0; i < MR; ++i) from[i] = row(std::min(r0 + i, num_rows - 1));  // padding rows repeat the last
    for (int w = 0; w < buf.num_words; ++w, to += MR)
      for (int i = 0; i < MR; ++i) {
        if constexpr (PW == 1) to[i] = to_float(from[i][w]);
        else if (w < a.head_dim / PW) memcpy(to + i, from[i] + w * PW, sizeof(typename K::Word));
        else to[i] = from[i][w * PW].bits;  // an odd head_dim's last one, beside a zero
      }
  }
  for (int r = 0; r < num_rows; ++r) buf.position[r] = b.first_position + r / group;
}

template <class K> static void pack_keys(const Rows<typename K::T>& rows, int head_dim, PrefillBuffers<K>& buf) {
  constexpr int STEP = W * K::PER_WORD;
  for (int t0 = 0; t0 < rows.count; t0 += W) {
    typename K::Word* const panel = buf.k + t0 / NR * buf.num_words * NR + t0 % NR;
    for (int c = 0; c < head_dim; c += STEP) {
      typename K::Reg r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        r[i] = t0 + i >= rows.count ? typename K::Reg{}
               : c + STEP <= head_dim ? K::load_words(rows.k[t0 + i] + c) : K::load_words_n(rows.k[t0 + i] + c, head_dim - c);
      transpose(r);
      const int64_t first = c / K::PER_WORD;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        if (first + i < buf.num_words) storeu(panel + (first + i) * NR, r[i]);
    }
  }
}

template <class K> static void pack_values(const Rows<typename K::T>& rows, int v_head_dim, PrefillBuffers<K>& buf) {
  typename K::Word* to = buf.v;
  for (int t = 0; t < rows.count; t += K::PER_WORD, to += buf.v_stride)
    for (int c = 0; c < v_head_dim; c += 2 * W) {
      typename K::Reg r[2];
      if (c + 2 * W <= v_head_dim) K::template load_values<2>(rows.v + t, c, r);
      else K::template load_values_n<2>(rows.v + t, c, v_head_dim, r);
      storeu(to + c, r[0]);
      storeu(to + c + W, r[1]);
    }
}

// One group of MR rows against the packed tile of keys [begin, begin + count).
template <class K>
static void attend_rows(const PrefillBuffers<K>& buf, const Rows<typename K::T>& rows, int first_row, int num_rows, int begin,
                        int window, int v_head_dim, const LogitScale& scale, const State& state) {
  using Word = typename K::Word;
  constexpr int P_STRIDE = PREFILL_TILE / K::PER_WORD;
  const int last_row = std::min(first_row + MR, num_rows) - 1;
  const int count = std::min(rows.count, buf.position[last_row] + 1 - begin);
  const auto lowest = [&](int r) { return window ? buf.position[r] - window + 1 - begin : 0; };
  if (count <= 0 || lowest(first_row) >= count) return;
  alignas(64) float s[MR * PREFILL_TILE];
  alignas(64) typename K::P p[MR * PREFILL_TILE];
  float alpha[MR];
  const Word* q = buf.q + first_row / MR * buf.num_words * MR;
  for (int t = 0; t < count; t += NR)
    multiply_columns<K, 1, MR>(std::min(NV, int(round_up(count - t, W) / W)), int(buf.num_words), q,
                               buf.k + t / NR * buf.num_words * NR, NR, s + t, PREFILL_TILE, nullptr);
  int low[MR], high[MR];
  for (int r = first_row; r <= last_row; ++r) {
    low[r - first_row] = lowest(r);
    high[r - first_row] = std::min(count, buf.position[r] + 1 - begin);
  }
  const int num_live = last_row - first_row + 1;
  softmax_rows(num_live, s, p, count, low, high, scale, state.max + first_row, state.sum + first_row, alpha);
  for (int i = num_live; i < MR; ++i) {  // padding
    memset(p + i * PREFILL_TILE, 0, sizeof(typename K::P) * PREFILL_TILE);
    alpha[i] = 1;
  }
  const int num_steps = (count + K::PER_WORD - 1) / K::PER_WORD;
  for (int c = 0; c < v_head_dim; c += NR)
    multiply_columns<K, P_STRIDE, 1>(std::min(NV, int(round_up(v_head_dim - c, W) / W)), num_steps,
                                     reinterpret_cast<const Word*>(p), buf.v + c, buf.v_stride,
                                     state.acc + first_row * state.acc_stride + c, state.acc_stride, alpha);
}

template <class K> static PrefillBuffers<K> take_buffers(const HfaAttentionArgs& a, int num_rows, Scratch& scratch) {
  PrefillBuffers<K> buf;
  using Word = typename K::Word;
  buf.num_words = (a.head_dim + K::PER_WORD - 1) / K::PER_WORD;
  buf.v_stride = round_up(a.v_head_dim, 2 * W);
  buf.q = scratch.take<Word>(round_up(num_rows, MR) * buf.num_words);
  buf.k = scratch.take<Word>(PREFILL_TILE * buf.num_words);
  buf.v = scratch.take<Word>(PREFILL_TILE * buf.v_stride);
  buf.position = scratch.take<int>(num_rows);
  return buf;
}

inline int64_t prefill_scratch_bytes(const HfaAttentionArgs& a) {
  const int64_t group = a.num_heads / a.num_kv_heads, rows = round_up(std::max<int64_t>(BLOCK_ROWS, group), MR);
  return 4 * ((rows + PREFILL_TILE) * (a.head_dim + 1) + PREFILL_TILE * round_up(a.v_head_dim, 2 * W) + rows) + 5 * 64;
}

template <class K> static void prefill_block(const HfaAttentionArgs& a, const Block& b, const State& state, Scratch& scratch) {
  const int num_rows = b.num_tokens * (a.num_heads / a.num_kv_heads);
  PrefillBuffers<K> buf = take_buffers<K>(a, num_rows, scratch);
  pack_queries<K>(a, b, num_rows, buf);
  const LogitScale scale(a);
  Rows<typename K::T> rows;
  for (int begin = b.key_begin; begin < b.key_end; begin += PREFILL_TILE) {
    rows.resolve(a, b, begin, std::min(b.key_end, begin + PREFILL_TILE));
    pack_keys<K>(rows, a.head_dim, buf);
    pack_values<K>(rows, a.v_head_dim, buf);
    for (int r = 0; r < num_rows; r += MR)
      attend_rows<K>(buf, rows, r, num_rows, begin, a.sliding_window, a.v_head_dim, scale, state);
  }
}

}  // namespace attn
}  // namespace
