// Prefill in bf16 on the AMX tile unit, everything transposed: S' = K Q' takes 16 keys x 16 rows a tile straight from the
// pages, the softmax runs down the keys with one query row per lane, and O' = V' P' takes P as the softmax leaves it.
// Q' is packed once a block, V' once for each run of keys; a pair of row tiles then walks the run.
#pragma once
#include "attention_amx_pack.h"

#ifdef HFA_AMX
namespace {
namespace attn {

// s[i][32 keys][16] = keys . queries of R row tiles, from two tiles of keys.
template <int R>
static void amx_scores(const bf16* k0, const bf16* k1, int64_t k_row_bytes, const uint32_t* q, int64_t q_steps, float* s) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (R == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t d = 0; d < q_steps; ++d) {
    _tile_loadd(4, k0 + d * 32, k_row_bytes);
    _tile_loadd(6, q + d * TILE_WORDS, TILE_ROW_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, k1 + d * 32, k_row_bytes);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (R == 2) {
      _tile_loadd(7, q + (q_steps + d) * TILE_WORDS, TILE_ROW_BYTES);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, s, TILE_ROW_BYTES);
  _tile_stored(1, s + TILE_WORDS, TILE_ROW_BYTES);
  if constexpr (R == 2) {
    _tile_stored(2, s + AMX_TILE * 16, TILE_ROW_BYTES);
    _tile_stored(3, s + AMX_TILE * 16 + TILE_WORDS, TILE_ROW_BYTES);
  }
}

// acc[i] += values . p of R row tiles over num_steps * 32 keys, two tiles of columns at a time.
template <int R>
static void amx_values(const uint32_t* v, const uint32_t* p, int num_steps, int64_t value_tiles, float* acc) {
  const int64_t next_row = value_tiles * TILE_WORDS;
  for (int64_t d = 0; d < value_tiles; d += 2, v += 2 * VALUE_STEPS * TILE_WORDS, acc += 2 * TILE_WORDS) {
    _tile_loadd(0, acc, TILE_ROW_BYTES);
    _tile_loadd(1, acc + TILE_WORDS, TILE_ROW_BYTES);
    if constexpr (R == 2) {
      _tile_loadd(2, acc + next_row, TILE_ROW_BYTES);
      _tile_loadd(3, acc + next_row + TILE_WORDS, TILE_ROW_BYTES);
    }
    for (int j = 0; j < num_steps; ++j) {
      _tile_loadd(4, v + j * TILE_WORDS, TILE_ROW_BYTES);
      _tile_loadd(6, p + j * TILE_WORDS, TILE_ROW_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, v + (VALUE_STEPS + j) * TILE_WORDS, TILE_ROW_BYTES);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (R == 2) {
        _tile_loadd(7, p + AMX_TILE / 2 * 16 + j * TILE_WORDS, TILE_ROW_BYTES);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, acc, TILE_ROW_BYTES);
    _tile_stored(1, acc + TILE_WORDS, TILE_ROW_BYTES);
    if constexpr (R == 2) {
      _tile_stored(2, acc + next_row, TILE_ROW_BYTES);
      _tile_stored(3, acc + next_row + TILE_WORDS, TILE_ROW_BYTES);
    }
  }
}

// softmax_rows for 16 rows side by side: s[count][16] -> p[round_up(count, 32) / 2][16] pairs; lane r sees keys
// [low[r], high[r]). Returns the factors of the rows' accumulators.
HFA_INLINE vf softmax_lanes(float* s, uint32_t* p, int count, vi low, vi high, bool masked, const LogitScale& scale, float* max,
                            float* sum_) {
  const bool plain = scale.cap == 0 && scale.scale > 0;  // then the largest dot product is the largest logit
  const vf neg_inf = set1(-INFINITY);
  const int end = int(round_up(count, 32));
  vf tops[4] = {neg_inf, neg_inf, neg_inf, neg_inf};
  if (plain && !masked) {
    for (int t = 0; t < end; t += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) tops[i] = maximum(tops[i], loadu<vf>(s + (t + i) * 16));
  } else {
    for (int t = 0; t < end; ++t) {
      const vf x = loadu<vf>(s + t * 16), y = plain ? x : scale(x);
      const vi index = vi{} + t;
      const vf seen = ((index >= low) & (index < high)) ? y : neg_inf;
      storeu(s + t * 16, seen);
      tops[0] = maximum(tops[0], seen);
    }
  }
  const vf factor = set1(plain ? scale.scale : 1.f), old = loadu<vf>(max);
  const vf top = maximum(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])) * factor, old);
  const vf base = top == neg_inf ? zero() : top;  // nothing visible yet: every p is 0, a NaN stays one
  const vf alpha = exp2(old - base);
  alignas(64) static constexpr struct Interleave {
    uint16_t lane[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  } interleave;
  const __m512i lanes = _mm512_load_si512(&interleave);
  vf total[2] = {};
  for (int t = 0; t < end; t += 2) {
    const vf x = exp2<4>(loadu<vf>(s + t * 16) * factor - base), y = exp2<4>(loadu<vf>(s + t * 16 + 16) * factor - base);
    total[0] += x;
    total[1] += y;
    storeu(p + t * 8, _mm512_permutexvar_epi16(lanes, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x)));
  }
  storeu(max, top);
  storeu(sum_, loadu<vf>(sum_) * alpha + (total[0] + total[1]));
  return alpha;
}

// Row tiles [first_tile, first_tile + R) against the packed tile of keys [begin, begin + num_keys).
template <int R>
static void attend_tiles(const HfaAttentionArgs& a, const AmxBuffers& buf, int first_tile, int num_rows, int begin, int num_keys,
                         const bf16* const* key_tiles, const uint32_t* v, const LogitScale& scale, const State& state) {
  const int first_row = first_tile * 16, last_row = std::min(first_row + R * 16, num_rows) - 1, window = a.sliding_window;
  const int count = std::min(num_keys, buf.position[last_row] + 1 - begin);
  if (count <= 0 || (window && buf.position[first_row] - window + 1 - begin >= count)) return;
  for (int t = 0; t < count; t += 32)
    amx_scores<R>(key_tiles[t / 16], key_tiles[std::min(t + 16, count - 1) / 16], buf.k_row_bytes,
                  buf.q + first_tile * buf.q_steps * TILE_WORDS, buf.q_steps, buf.s + t * 16);
  memory_barrier();
  for (int i = 0; i < R; ++i) {
    const int row = first_row + i * 16;
    const vi position = loadu<vi>(buf.position + row) - begin;
    const vi high = position + 1 < count ? position + 1 : vi{} + count, low = window ? position + (1 - window) : vi{};
    const bool masked = count % 32 || high[0] < count || (window && low[15] > 0);
    const vf alpha = softmax_lanes(buf.s + i * AMX_TILE * 16, buf.p + i * AMX_TILE / 2 * 16, count, low, high, masked, scale,
                                   state.max + row, state.sum + row);
    float* const acc = buf.acc + (first_tile + i) * buf.value_tiles * TILE_WORDS;
    if (_mm512_cmp_ps_mask((__m512)alpha, (__m512)set1(1.f), _CMP_NEQ_UQ))
      for (int64_t c = 0; c < buf.value_tiles * TILE_WORDS; c += 16) storeu(acc + c, loadu<vf>(acc + c) * alpha);
  }
  memory_barrier();
  amx_values<R>(v, buf.p, int(round_up(count, 32) / 32), buf.value_tiles, buf.acc + first_tile * buf.value_tiles * TILE_WORDS);
  memory_barrier();
}

inline void write_amx_state(const AmxBuffers& buf, int num_rows, const State& state) {
  for (int row = 0; row < num_rows; row += 16)
    for (int64_t d = 0; d < buf.value_tiles; ++d) {
      const float* const tile = buf.acc + (row / 16 * buf.value_tiles + d) * TILE_WORDS;
      vf r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = loadu<vf>(tile + i * 16);
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) storeu(state.acc + (row + i) * state.acc_stride + d * 16, r[i]);
    }
}

// state.acc is zero on entry. With keys_from_pages, block.key_begin is a multiple of 16.
inline void amx_block(const HfaAttentionArgs& a, const Block& b, const State& state, Scratch& scratch) {
  const int num_rows = b.num_tokens * (a.num_heads / a.num_kv_heads), row_tiles = int(round_up(num_rows, 16) / 16);
  AmxBuffers buf = take_amx_buffers(a, num_rows, scratch);
  pack_amx_queries(a, b, num_rows, buf);
  memset(buf.acc, 0, size_t(row_tiles * buf.value_tiles * TILE_WORDS) * 4);
  const LogitScale scale(a);
  const TileConfig config;
  for (int run = b.key_begin; run < b.key_end; run += AMX_RUN) {
    const int run_end = std::min(b.key_end, run + AMX_RUN);
    pack_run(a, b, run, run_end, buf);
    memory_barrier();
    for (int r = 0; r < row_tiles; r += 2)
      for (int begin = run; begin < run_end; begin += AMX_TILE) {
        const auto attend = r + 1 < row_tiles ? attend_tiles<2> : attend_tiles<1>;
        attend(a, buf, r, num_rows, begin, std::min(AMX_TILE, run_end - begin), buf.key_tiles + (begin - run) / 16,
               buf.v + (begin - run) / AMX_TILE * buf.value_tiles * VALUE_STEPS * TILE_WORDS, scale, state);
      }
  }
  write_amx_state(buf, num_rows, state);
}

}  // namespace attn
}  // namespace
#endif
