// Decode: the query heads of one kv head (one token) against its keys, each key and value read from memory once.
// A pass over a tile's keys fetches its values ahead, a pass over the values fetches the next tile's keys.
#pragma once
#include "attention_tile.h"

namespace {
namespace attn {

constexpr int MAX_DECODE_ROWS = 16;  // larger groups go through the prefill kernel
constexpr int TILE_BYTES = 8192;       // of keys, and about as many of values: half of a first-level cache
constexpr int NUM_ACC = NUM_REGS == 32 ? 16 : 8;

// s[r * MAX_TILE + t] = q[r] . k[t] for R rows; q: [R, q_stride] words, zero beyond head_dim.
template <class K, int R>
static void decode_qk(const typename K::T* q, int64_t q_stride, const Rows<typename K::T>& rows, int head_dim, int fetch_bytes,
                      float* s) {
  constexpr int PADDED = R == 3 ? 4 : R, TT = NUM_ACC / PADDED, STEP = K::STEP;
  for (int t0 = 0; t0 < rows.count; t0 += TT) {
    const typename K::T* const* k = rows.k + t0;
    vf a[NUM_ACC];
#pragma GCC unroll 16
    for (int i = 0; i < NUM_ACC; ++i) a[i] = zero();
    int c = 0;
    for (; c + STEP <= head_dim; c += STEP) {
      typename K::Reg query[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) query[r] = K::load_words(q + r * q_stride + c);
#pragma GCC unroll 16
      for (int t = 0; t < TT; ++t) {
        const typename K::Reg key = K::load_words(k[t] + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) a[r * TT + t] = K::mac(a[r * TT + t], query[r], key);
      }
    }
    if (c < head_dim) {
#pragma GCC unroll 16
      for (int t = 0; t < TT; ++t) {
        const typename K::Reg key = K::load_words_n(k[t] + c, head_dim - c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) a[r * TT + t] = K::mac(a[r * TT + t], K::load_words(q + r * q_stride + c), key);
      }
    }
    if (fetch_bytes)
      for (int t = 0; t < TT; ++t) prefetch(rows.v[t0 + t], fetch_bytes);
    alignas(64) float sums[NUM_ACC];
#pragma GCC unroll 4
    for (int i = 0; i < NUM_ACC; i += W) storeu(sums + i, sum_each(a + i));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) memcpy(s + r * MAX_TILE + t0, sums + r * TT, TT * sizeof(float));
  }
}

// acc[r] = alpha[r] * acc[r] + sum_t p[r][t] * v[t], columns [c, c + CV*W) of R rows.
template <class K, int R, int CV>
static void decode_pv(const typename K::P* p, const Rows<typename K::T>& rows, int c, int v_head_dim, const float* alpha,
                      const Rows<typename K::T>* next, int fetch_bytes, const State& state, int first_row) {
  using Word = typename K::Word;
  vf a[R][CV];
  float* const acc = state.acc + first_row * state.acc_stride + c;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < CV; ++i) a[r][i] = loadu<vf>(acc + r * state.acc_stride + i * W) * set1(alpha[r]);
  using Lane = decltype(K::broadcast(Word{}));
  const auto step = [&](int t, const Lane* value) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Lane w = K::broadcast(loadu<Word>(p + r * MAX_TILE + t));
#pragma GCC unroll 4
      for (int i = 0; i < CV; ++i) a[r][i] = K::mac(a[r][i], w, value[i]);
    }
  };
  const int num_next = next ? next->count : 0;
  Lane value[CV];
  if (c + CV * W <= v_head_dim) {
    for (int t = 0; t < rows.count; t += K::PER_WORD) {
      for (int i = t; i < t + K::PER_WORD && i < num_next; ++i) prefetch(next->k[i], fetch_bytes);
      K::template load_values<CV>(rows.v + t, c, value);
      step(t, value);
    }
  } else {
    for (int t = 0; t < rows.count; t += K::PER_WORD) {
      K::template load_values_n<CV>(rows.v + t, c, v_head_dim, value);
      step(t, value);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < CV; ++i) storeu(acc + r * state.acc_stride + i * W, a[r][i]);
}

template <class K, int R>
static void decode_rows(const HfaAttentionArgs& a, const typename K::T* q, int64_t q_stride, const Rows<typename K::T>& rows,
                        const Rows<typename K::T>& next, const LogitScale& scale, const State& state, int first_row) {
  constexpr int CHUNK = NUM_REGS == 32 ? 4 : 2;
  alignas(64) float s[R * MAX_TILE];
  alignas(64) typename K::P p[R * MAX_TILE];
  float alpha[R];
  const bool fetch = first_row == 0;
  constexpr int size = int(sizeof(typename K::T));
  decode_qk<K, R>(q, q_stride, rows, a.head_dim, fetch ? a.v_head_dim * size : 0, s);
  const int low[4] = {}, high[4] = {rows.count, rows.count, rows.count, rows.count};
  softmax_rows<typename K::P, size == 4>(R, s, p, rows.count, low, high, scale, state.max + first_row, state.sum + first_row, alpha);
  for (int c = 0; c < a.v_head_dim; c += CHUNK * W) {
    const Rows<typename K::T>* ahead = fetch && c == 0 ? &next : nullptr;
    const auto run = [&](auto width) {
      decode_pv<K, R, decltype(width)::value>(p, rows, c, a.v_head_dim, alpha, ahead, a.head_dim * size, state, first_row);
    };
    switch (std::min<int64_t>(CHUNK, round_up(a.v_head_dim - c, K::PER_WORD == 2 ? W : K::STEP) / W)) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, CHUNK == 4 ? 3 : 1>{}); break;
      default: run(std::integral_constant<int, CHUNK>{});
    }
  }
}

inline int64_t decode_scratch_bytes(const HfaAttentionArgs& a) { return MAX_DECODE_ROWS * (a.head_dim + 64) * 4 + 64; }

// block.num_tokens == 1 and at most MAX_DECODE_ROWS query heads share the kv head.
template <class K> static void decode_block(const HfaAttentionArgs& a, const Block& b, const State& state, Scratch& scratch) {
  using T = typename K::T;
  const int num_rows = a.num_heads / a.num_kv_heads;
  const int64_t q_stride = round_up(a.head_dim, K::STEP);
  T* const q = scratch.take<T>(num_rows * q_stride);
  for (int r = 0; r < num_rows; ++r) {
    const T* from = static_cast<const T*>(a.q) + b.first_token * a.q_token_stride + (int64_t(b.kv_head) * num_rows + r) * a.q_head_stride;
    memcpy(q + r * q_stride, from, size_t(a.head_dim) * sizeof(T));
    memset(q + r * q_stride + a.head_dim, 0, size_t(q_stride - a.head_dim) * sizeof(T));
  }
  const LogitScale scale(a);
  const int row_bytes = std::max(a.head_dim, a.v_head_dim) * int(sizeof(T));
  const int tile = std::max(16, std::min(MAX_TILE, TILE_BYTES / row_bytes / 16 * 16));
  Rows<T> buffers[2];
  buffers[0].resolve(a, b, b.key_begin, std::min(b.key_end, b.key_begin + tile));
  for (int begin = b.key_begin, turn = 0; begin < b.key_end; begin += tile, turn ^= 1) {
    const Rows<T>& rows = buffers[turn];
    Rows<T>& next = buffers[turn ^ 1];
    next.resolve(a, b, begin + tile, std::min(b.key_end, begin + 2 * tile));
    for (int r = 0; r < num_rows; r += 4) {
      const T* const qr = q + r * q_stride;
      switch (std::min(4, num_rows - r)) {
        case 1: decode_rows<K, 1>(a, qr, q_stride, rows, next, scale, state, r); break;
        case 2: decode_rows<K, 2>(a, qr, q_stride, rows, next, scale, state, r); break;
        case 3: decode_rows<K, 3>(a, qr, q_stride, rows, next, scale, state, r); break;
        default: decode_rows<K, 4>(a, qr, q_stride, rows, next, scale, state, r);
      }
    }
  }
  for (int r = 0; r < num_rows; ++r) K::in_order(state.acc + r * state.acc_stride, a.v_head_dim);
}

}  // namespace attn
}  // namespace
