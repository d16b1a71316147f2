// Prefill in bf16 on the AMX tile unit, everything transposed: S' = K Q' takes 16 keys x 16 rows a tile, the
// softmax runs down the keys with one query row per lane, and O' = V' P' takes P as the softmax leaves it.
// Q' is packed once a block, V' once for each run of keys; a pair of row tiles then walks the run.
#pragma once
#include "attention_amx_pack.h"

#ifdef HFA_AMX
namespace {
namespace attn {

// s[i][32 keys][16] = keys . queries of R row tiles, from two tiles of keys.
template <int R>
static void amx_scores(const uint32_t* k0, const uint32_t* k1, const uint32_t* q, int64_t q_steps, float* s) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (R == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t d = 0; d < q_steps; ++d) {
    _tile_loadd(4, k0 + d * TILE_WORDS, TILE_ROW_BYTES);
    _tile_loadd(6, q + d * TILE_WORDS, TILE_ROW_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, k1 + d * TILE_WORDS, TILE_ROW_BYTES);
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

// acc[i][2] += values . p of R row tiles over num_steps * 32 keys, for two tiles of columns.
template <int R> static void amx_values(const uint32_t* v, const uint32_t* p, int num_steps, float* acc, int64_t next_row) {
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

// s[32 keys][16 rows] -> p[16 pairs][16 rows] = exp2(s * factor - base), and what it adds to the rows' sums.
HFA_INLINE vf weigh(const float* s, vf factor, vf base, uint32_t* p) {
  alignas(64) static constexpr struct Interleave {
    uint16_t lane[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  } interleave;
  const __m512i lanes = _mm512_load_si512(&interleave);
  vf total[2] = {};
#pragma GCC unroll 2
  for (int t = 0; t < 32; t += 2) {
    const vf x = exp2<4>(loadu<vf>(s + t * 16) * factor - base), y = exp2<4>(loadu<vf>(s + t * 16 + 16) * factor - base);
    total[0] += x;
    total[1] += y;
    storeu(p + t * 8, _mm512_permutexvar_epi16(lanes, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x)));
  }
  return total[0] + total[1];
}

// Dot products s[round_up(count, 32)][16 rows], lane r of which sees [low[r], high[r]) -> -inf where not visible, logits
// unless `plain`; returns the rows' largest.
HFA_INLINE vf mask_lanes(float* s, int count, vi low, vi high, bool masked, bool plain, const LogitScale& scale) {
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
  return maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]));
}

// One run of packed keys against a block's rows. A unit is a pair of row tiles (or the last one) against one tile of keys;
// while a unit's softmax keeps the vector ports busy, the tile unit does the next unit's scores and the last one's values.
class AmxRun {
 public:
  AmxRun(const HfaAttentionArgs& a, const AmxBuffers& buf, const State& state, int begin, int end, int num_rows)
      : buf_(buf), state_(state), scale_(a), window_(a.sliding_window), begin_(begin), end_(end), num_rows_(num_rows),
        plain_(scale_.cap == 0 && scale_.scale > 0) {}

  // The next run is fetched meanwhile.
  void attend(Fetcher& fetcher) {
    const int row_tiles = int(round_up(num_rows_, 16) / 16);
    const int num_units = (row_tiles + 1) / 2 * ((end_ - begin_ + AMX_TILE - 1) / AMX_TILE);
    const int share = (end_ + AMX_RUN - fetcher.next() + num_units - 1) / num_units;
    Unit last{}, now{}, next{};
    int turn = 0;
    for (int r = 0; r < row_tiles; r += 2)
      for (int t = 0; begin_ + t < end_; t += AMX_TILE) {
        fetcher.until(std::min(end_ + AMX_RUN, fetcher.next() + share));
        next = unit(r, std::min(2, row_tiles - r), t);
        if (!next.steps) continue;
        step(last, now, next, turn);
        last = now, now = next, turn ^= 1;
      }
    step(last, now, Unit{}, turn);
    step(now, Unit{}, Unit{}, turn ^ 1);
  }

 private:
  struct Unit {
    int first_tile, num_tiles, key, count, steps;  // key: of the tile's first in the run; steps of 32 keys, 0: none
  };

  Unit unit(int first_tile, int num_tiles, int key) const {
    const int first_row = first_tile * 16, last_row = std::min(first_row + num_tiles * 16, num_rows_) - 1, begin = begin_ + key;
    const int count = std::min(std::min(end_ - begin, AMX_TILE), buf_.position[last_row] + 1 - begin);
    const bool seen = count > 0 && !(window_ && buf_.position[first_row] - window_ + 1 - begin >= count);
    return {first_tile, num_tiles, key, count, seen ? int(round_up(count, 32) / 32) : 0};
  }

  float* scores(int turn) const { return buf_.s + turn * 2 * AMX_TILE * 16; }
  uint32_t* weights(int turn) const { return buf_.p + turn * AMX_TILE * 16; }

  // Softmax of `now` (its scores are in buffer turn ^ 1) beside the values of `last` and the scores of `next`.
  void step(const Unit& last, const Unit& now, const Unit& next, int turn) {
    const int num_values = last.steps ? int(buf_.value_tiles / 2) : 0, num_jobs = num_values + next.steps;
    const int num_chunks = now.steps * now.num_tiles;
    int done = 0;
    const auto work_until = [&](int stop) {
      memory_barrier();
      for (; done < stop; ++done) {
        if (done < num_values) add_values(last, turn, done);
        else add_scores(next, turn, done - num_values);
      }
      memory_barrier();
    };
    vf alpha[2] = {};
    for (int i = 0, chunk = 0; i < now.num_tiles; ++i) {
      float* const s = scores(turn ^ 1) + i * AMX_TILE * 16;
      uint32_t* const p = weights(turn ^ 1) + i * AMX_TILE / 2 * 16;
      const vf base = open(now, i, s, &alpha[i]), factor = set1(plain_ ? scale_.scale : 1.f);
      vf total = zero();
      for (int t = 0; t < now.steps; ++t) {
        total += weigh(s + t * 32 * 16, factor, base, p + t * TILE_WORDS);
        ++chunk;
        work_until(num_jobs * chunk / num_chunks);
      }
      float* const sum = state_.sum + (now.first_tile + i) * 16;
      storeu(sum, loadu<vf>(sum) * alpha[i] + total);
    }
    work_until(num_jobs);
    for (int i = 0; i < now.num_tiles; ++i) rescale(now.first_tile + i, alpha[i]);
  }

  // Masks a row tile's scores and moves its running maximum; returns the new base of the logits.
  vf open(const Unit& u, int i, float* s, vf* alpha) {
    const int row = (u.first_tile + i) * 16;
    const vi position = loadu<vi>(buf_.position + row) - (begin_ + u.key);
    const vi high = position + 1 < u.count ? position + 1 : vi{} + u.count, low = window_ ? position + (1 - window_) : vi{};
    const bool masked = u.count % 32 || high[0] < u.count || (window_ && low[15] > 0);
    const vf largest = mask_lanes(s, u.count, low, high, masked, plain_, scale_) * set1(plain_ ? scale_.scale : 1.f);
    const vf old = loadu<vf>(state_.max + row), top = maximum(largest, old);
    const vf base = top == set1(-INFINITY) ? zero() : top;  // nothing visible yet: every p is 0, a NaN stays one
    storeu(state_.max + row, top);
    *alpha = exp2(old - base);
    return base;
  }

  void rescale(int tile, vf alpha) {
    if (!_mm512_cmp_ps_mask((__m512)alpha, (__m512)set1(1.f), _CMP_NEQ_UQ)) return;
    float* const acc = buf_.acc + tile * buf_.value_tiles * TILE_WORDS;
    for (int64_t c = 0; c < buf_.value_tiles * TILE_WORDS; c += 16) storeu(acc + c, loadu<vf>(acc + c) * alpha);
  }

  void add_scores(const Unit& u, int turn, int step) {
    const int key = u.key + step * 32, last = u.key + u.count - 1;
    const int64_t k_tile = buf_.q_steps * TILE_WORDS;
    const auto run = u.num_tiles == 2 ? amx_scores<2> : amx_scores<1>;
    run(buf_.k + key / 16 * k_tile, buf_.k + std::min(key + 16, last) / 16 * k_tile, buf_.q + u.first_tile * k_tile, buf_.q_steps,
        scores(turn) + step * 32 * 16);
  }

  void add_values(const Unit& u, int turn, int pair) {
    const int64_t tile = u.key / AMX_TILE * buf_.value_tiles + 2 * pair, row_tile = buf_.value_tiles * TILE_WORDS;
    const auto run = u.num_tiles == 2 ? amx_values<2> : amx_values<1>;
    run(buf_.v + tile * VALUE_STEPS * TILE_WORDS, weights(turn), u.steps,
        buf_.acc + u.first_tile * row_tile + 2 * pair * TILE_WORDS, row_tile);
  }

  const AmxBuffers& buf_;
  const State& state_;
  const LogitScale scale_;
  const int window_, begin_, end_, num_rows_;
  const bool plain_;
};

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

inline void amx_block(const HfaAttentionArgs& a, const Block& b, const State& state, Scratch& scratch) {
  const int num_rows = b.num_tokens * (a.num_heads / a.num_kv_heads), row_tiles = int(round_up(num_rows, 16) / 16);
  AmxBuffers buf = take_amx_buffers(a, num_rows, scratch);
  pack_amx_queries(a, b, num_rows, buf);
  memset(buf.acc, 0, size_t(row_tiles * buf.value_tiles * TILE_WORDS) * 4);
  const TileConfig config;
  Fetcher fetcher(a, b);
  for (int run = b.key_begin; run < b.key_end; run += AMX_RUN) {
    const int run_end = std::min(b.key_end, run + AMX_RUN);
    pack_run(a, b, run, run_end, buf, fetcher);
    AmxRun(a, buf, state, run, run_end, num_rows).attend(fetcher);
  }
  write_amx_state(buf, num_rows, state);
}

}  // namespace attn
}  // namespace
#endif
