// Latent attention in bf16 on the AMX tile unit. Scores S' = C Q': sixteen latent rows are a tile as they lie in the pages,
// Q' was packed in pairs along the sum. Sums O = P C: P is transposed back a tile at a time, neighbouring latent rows are
// interleaved once for all heads, a few columns at a time.
#pragma once
#include "mla_vector.h"

#if defined(HFA_BF16_DOT) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HFA_MLA_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

namespace {
namespace mla {

// p: [panels][TILE / 32][16 rows][16 pairs of keys].
struct Bf16Tiles : Bf16Vectors {
  static constexpr int TILE = 256, ONE_PANEL_TILE = 64, DEPTH = 32, PANEL_STEP = 2;
};
constexpr int TILE_WORDS = 256;  // of 32 bits: 16 rows of 64 bytes
constexpr int64_t MAX_PART = 160;        // words of two panels' queries that stay in L1 while keys pass
static_assert(W == 16 && GROUP == 16 && Bf16Tiles::TILE <= MAX_GROUPS * GROUP);

// The kernel lends the tile registers to a process that asks; 18 is XFEATURE_XTILEDATA.
inline bool amx_permitted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return permitted;
}

// All eight registers 16 x 64 bytes while it lives.
template <> struct Registers<Bf16Tiles> {
  Registers() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Registers() { _tile_release(); }
};

// The tile intrinsics do not tell the compiler which memory they touch.
HFA_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

// Spends the time of tile operations on fetching the tile's next rows into L2, line after line, evenly over the tile's work.
class Fetcher {
 public:
  // Each line costs `price`; what the tile's work will pay is about `total`.
  Fetcher(const Tile<Bf16Tiles>& tile, int64_t total) : next_(tile.next) {
    for (num_groups_ = 0; num_groups_ < MAX_GROUPS && tile.next[num_groups_]; ++num_groups_) {}
    group_bytes_ = tile.stride * 2 * GROUP;
    price_ = num_groups_ ? std::max<int64_t>(1, total / std::max<int64_t>(1, num_groups_ * group_bytes_ / 64)) : 0;
    advance();
  }
  HFA_INLINE void pay(int cost) {
    if (!line_) return;
    for (credit_ += cost; credit_ >= price_; credit_ -= price_) {
      __builtin_prefetch(line_, 0, 2);
      line_ += 64;
      if (line_ >= end_ && !advance()) return;
    }
  }

 private:
  bool advance() {
    line_ = group_ < num_groups_ ? reinterpret_cast<const char*>(next_[group_++]) : nullptr;
    end_ = line_ + group_bytes_;
    return line_ != nullptr;
  }
  const bf16* const* next_;
  const char *line_ = nullptr, *end_ = nullptr;
  int num_groups_, group_ = 0;
  int64_t group_bytes_, price_, credit_ = 0;
};

// Costs in nanoseconds, measured: of a product of two tiles within scores and within sums, of two rows' 32 columns packed.
constexpr int SCORE_COST = 7, SUM_COST = 10, PACK_COST = 2;
inline int64_t score_work(const Sizes& s, const Tile<Bf16Tiles>& tile) {
  return (tile.count + 15) / 16 * s.num_panels * (s.num_words / 16) * SCORE_COST;
}
inline int64_t sum_work(const Sizes& s, const Tile<Bf16Tiles>& tile) {
  return (tile.count + 31) / 32 * (s.columns / 16) * (s.num_panels * SUM_COST + 8 * PACK_COST);
}

// Tiles 0-3 from and to c + {0, a, b, a + b} words.
HFA_INLINE void open_sums(const float* c, int64_t a, int64_t b, bool add) {
  if (!add) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + a, 64);
  _tile_loadd(2, c + b, 64);
  _tile_loadd(3, c + a + b, 64);
}
HFA_INLINE void close_sums(float* c, int64_t a, int64_t b) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + a, 64);
  _tile_stored(2, c + b, 64);
  _tile_stored(3, c + a + b, 64);
}

// Words [from, to) of four groups of keys x one panel.
inline void score_groups(const Tile<Bf16Tiles>& tile, int first, const uint32_t* q, int64_t from, int64_t to, Fetcher& fetcher,
                         float* s) {
  const int64_t bytes = tile.stride * 2;
  const bf16* const* g = tile.group + first;
  open_sums(s, TILE_WORDS, 2 * TILE_WORDS, from > 0);
  for (int64_t k = from; k < to; k += 16) {
    _tile_loadd(4, q + k * 16, 64);
    _tile_loadd(5, g[0] + 2 * k, bytes);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, g[1] + 2 * k, bytes);
    _tile_dpbf16ps(1, 6, 4);
    fetcher.pay(2 * SCORE_COST);
    _tile_loadd(7, g[2] + 2 * k, bytes);
    _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(5, g[3] + 2 * k, bytes);
    _tile_dpbf16ps(3, 5, 4);
    fetcher.pay(2 * SCORE_COST);
  }
  close_sums(s, TILE_WORDS, 2 * TILE_WORDS);
}

// Words [from, to) of two groups of keys x two panels, `panel` words apart in q.
inline void score_pairs(const Tile<Bf16Tiles>& tile, int first, const uint32_t* q, int64_t panel, int64_t from, int64_t to,
                        Fetcher& fetcher, float* s) {
  const int64_t bytes = tile.stride * 2, s_panel = Bf16Tiles::TILE * 16;
  const bf16* const* g = tile.group + first;
  open_sums(s, TILE_WORDS, s_panel, from > 0);
  for (int64_t k = from; k < to; k += 16) {
    _tile_loadd(4, q + k * 16, 64);
    _tile_loadd(6, g[0] + 2 * k, bytes);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(7, g[1] + 2 * k, bytes);
    _tile_dpbf16ps(1, 7, 4);
    fetcher.pay(2 * SCORE_COST);
    _tile_loadd(5, q + panel + k * 16, 64);
    _tile_dpbf16ps(2, 6, 5);
    _tile_dpbf16ps(3, 7, 5);
    fetcher.pay(2 * SCORE_COST);
  }
  close_sums(s, TILE_WORDS, s_panel);
}

// Two panels' queries, part by part along the words, stay in L1 while the keys pass.
inline void all_scores(const Sizes& s, const Tile<Bf16Tiles>& tile, Buffers<Bf16Tiles>& buf, Fetcher& fetcher) {
  memory_barrier();
  const int num_groups = (tile.count + 15) / 16;
  if (s.num_panels == 1) {
    for (int g = 0; g < num_groups; g += 4) score_groups(tile, g, buf.q, 0, s.num_words, fetcher, buf.s + g * TILE_WORDS);
  } else {
    const int64_t num_parts = (s.num_words + MAX_PART - 1) / MAX_PART, part = round_up((s.num_words + num_parts - 1) / num_parts, 16);
    for (int panel = 0; panel < s.num_panels; panel += 2)
      for (int64_t k = 0; k < s.num_words; k += part)
        for (int g = 0; g < num_groups; g += 2)
          score_pairs(tile, g, buf.q + panel * s.num_words * 16, s.num_words * 16, k, std::min(s.num_words, k + part), fetcher,
                      buf.s + (panel * Bf16Tiles::TILE + g * 16) * 16);
  }
  memory_barrier();
}

// p as A tiles of elements [0, n) of rows row(0..s.num_rows), zeros beyond.
template <class F> static void pack_tile_rows(const Sizes& s, int n, F row, uint32_t* p) {
  constexpr int64_t PANEL = Bf16Tiles::TILE / 2 * 16;
  for (int r = 0; r < s.num_panels * 16; ++r)
    for (int c = 0; c < n; c += 32) {
      const vu x = r < s.num_rows ? attn::Bf16Pairs::load_words_n(row(r) + c, n - c) : vu{};
      storeu(p + r / 16 * PANEL + c / 32 * TILE_WORDS + r % 16 * 16, x);
    }
}

// p of 32 keys at a time from logits s[count][16]; adds to the panel's sums.
inline void tile_probabilities(float* s, uint32_t* p, int count, vf base, float* sum_) {
  alignas(64) static constexpr struct Pairs {
    uint16_t lane[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  } pairs;
  const __m512i lanes = _mm512_load_si512(&pairs);
  const int end = int(round_up(count, 32));
  for (int t = count; t < end; ++t) storeu(s + t * 16, set1(-INFINITY));
  vf total[2] = {};
  for (int t = 0; t < end; t += 32, p += TILE_WORDS) {
    vu r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const vf x = exp2<4>(loadu<vf>(s + (t + 2 * i) * 16) - base), y = exp2<4>(loadu<vf>(s + (t + 2 * i + 1) * 16) - base);
      total[0] += x;
      total[1] += y;
      r[i] = (vu)_mm512_permutexvar_epi16(lanes, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
    }
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) storeu(p + i * 16, r[i]);
  }
  storeu(sum_, loadu<vf>(sum_) + (total[0] + total[1]));
}

// Columns [c, c + 32) of rows 32 * step.. of the tile as two B tiles, `strip` words apart, zeros beyond the last row.
HFA_INLINE void pack_step(const Tile<Bf16Tiles>& tile, int rank, int64_t c, int step, int64_t strip, uint32_t* v) {
  using attn::Bf16Pairs;
  uint32_t* to = v + step * TILE_WORDS;
  const int count = tile.count - step * 32, n = int(std::max<int64_t>(0, rank - c));
  const bool whole = n >= 32 && count >= 32;
  for (int g = 0; g < 2; ++g) {
    const bf16* row = tile.group[2 * step + g] + c;
#pragma GCC unroll 8
    for (int t = 0; t < GROUP; t += 2, row += 2 * tile.stride, to += 16) {
      vu even, odd, low, high;
      if (whole) {
        even = Bf16Pairs::load_words(row), odd = Bf16Pairs::load_words(row + tile.stride);
      } else {
        even = g * GROUP + t < count ? Bf16Pairs::load_words_n(row, n) : vu{};
        odd = g * GROUP + t + 1 < count ? Bf16Pairs::load_words_n(row + tile.stride, n) : vu{};
      }
      Bf16Pairs::pair(even, odd, low, high);
      storeu(to, low);
      storeu(to + strip, high);
    }
  }
}

// One panel x four tiles of columns; the next 64 columns, from c on, are packed to `ahead` meanwhile.
inline void sum_columns(const Tile<Bf16Tiles>& tile, int rank, const uint32_t* p, const uint32_t* v, int num_steps, int64_t c,
                        uint32_t* ahead, Fetcher& fetcher, float* acc) {
  const int64_t strip = num_steps * TILE_WORDS;
  open_sums(acc, TILE_WORDS, 2 * TILE_WORDS, true);
  for (int t = 0; t < num_steps; ++t, p += TILE_WORDS, v += TILE_WORDS) {
    _tile_loadd(4, p, 64);
    _tile_loadd(5, v, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, v + strip, 64);
    _tile_dpbf16ps(1, 4, 6);
    pack_step(tile, rank, c, t, strip, ahead);
    fetcher.pay(2 * SUM_COST + 16 * PACK_COST);
    _tile_loadd(7, v + 2 * strip, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, v + 3 * strip, 64);
    _tile_dpbf16ps(3, 4, 5);
    pack_step(tile, rank, c + 32, t, strip, ahead + 2 * strip);
    fetcher.pay(2 * SUM_COST + 16 * PACK_COST);
  }
  close_sums(acc, TILE_WORDS, 2 * TILE_WORDS);
}

// Two panels x two tiles of columns.
inline void sum_pairs(const uint32_t* p, int64_t p_panel, const uint32_t* v, int num_steps, Fetcher& fetcher, float* acc,
                      int64_t acc_panel) {
  const int64_t strip = num_steps * TILE_WORDS;
  open_sums(acc, TILE_WORDS, acc_panel, true);
  for (int t = 0; t < num_steps; ++t, p += TILE_WORDS, v += TILE_WORDS) {
    _tile_loadd(4, p, 64);
    _tile_loadd(6, v, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, v + strip, 64);
    _tile_dpbf16ps(1, 4, 7);
    fetcher.pay(2 * SUM_COST);
    _tile_loadd(5, p + p_panel, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    fetcher.pay(2 * SUM_COST);
  }
  close_sums(acc, TILE_WORDS, acc_panel);
}

// acc += P . latents; a few columns of the latents at a time stay in L1 while the panels pass.
inline void tile_sums(const Sizes& s, int rank, const Tile<Bf16Tiles>& tile, Buffers<Bf16Tiles>& buf, Fetcher& fetcher,
                      const State& state) {
  const int num_steps = (tile.count + 31) / 32;
  const int64_t strip = num_steps * TILE_WORDS, other = 4 * strip + 512;  // 2 KB off: loads wait for stores 4 KB apart
  const int64_t p_panel = Bf16Tiles::TILE / 2 * 16, acc_panel = s.columns * 16;
  if (s.num_panels == 1) {
    for (int t = 0; t < num_steps; ++t)
      for (int half = 0; half < 2; ++half) pack_step(tile, rank, half * 32, t, strip, buf.v + half * 2 * strip);
    for (int64_t c = 0; c < s.columns; c += 64) {
      memory_barrier();
      const int64_t turn = c / 64 % 2;
      sum_columns(tile, rank, buf.p, buf.v + turn * other, num_steps, std::min(c + 64, s.columns - 64), buf.v + (1 - turn) * other, fetcher,
                  state.acc + c * 16);
    }
  }
  for (int64_t c = 0; s.num_panels > 1 && c < s.columns; c += 32) {
    for (int t = 0; t < num_steps; ++t) {
      pack_step(tile, rank, c, t, strip, buf.v);
      fetcher.pay(16 * PACK_COST);
    }
    memory_barrier();
    for (int panel = 0; panel < s.num_panels; panel += 2)
      sum_pairs(buf.p + panel * p_panel, p_panel, buf.v, num_steps, fetcher, state.acc + c * 16 + panel * acc_panel, acc_panel);
    memory_barrier();
  }
  memory_barrier();
}

// state: base -inf, the rest zero on entry.
template <class T> static void attend_tiles(const HfaMlaArgs& a, const Block& b, const Block* after, const Sizes& s,
                                              const State& state, Buffers<Bf16Tiles>& buf) {
  pack_queries<Bf16Tiles, T>(a, s, b, buf);
  const Registers<Bf16Tiles> registers;
  Tile<Bf16Tiles> tile;
  for (int begin = b.key_begin; begin < b.key_end; begin += s.tile) {
    load_tile<Bf16Tiles, T>(a, s, b, after, begin, buf.rows, tile);
    Fetcher fetcher(tile, score_work(s, tile) + sum_work(s, tile));
    all_scores(s, tile, buf, fetcher);
    for (int panel = 0; panel < s.num_panels; ++panel) {
      float *lane_s = buf.s + panel * Bf16Tiles::TILE * 16, *base = state.base + panel * 16, *sum_ = state.sum + panel * 16;
      vf alpha;
      if (move_base(lane_s, begin, tile.count, buf.position + panel * 16, a.scale * attn::LOG2E, base, &alpha)) {
        rescale(state.acc + panel * s.columns * 16, s.columns, alpha);
        storeu(sum_, loadu<vf>(sum_) * alpha);
      }
      tile_probabilities(lane_s, buf.p + panel * Bf16Tiles::TILE / 2 * 16, tile.count, usable(loadu<vf>(base)), sum_);
    }
    tile_sums(s, a.rank, tile, buf, fetcher, state);
  }
}

}  // namespace mla
}  // namespace
#endif
