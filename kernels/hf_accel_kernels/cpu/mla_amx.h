// Latent attention in bf16 on the AMX tile unit. Scores S' = C Q': sixteen latent rows are a tile as they lie in the pages,
// Q' was packed in pairs along the sum. Sums O = P C: P is transposed back a tile at a time, neighbouring latent rows are
// interleaved once for all heads.
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
  static constexpr int TILE = 128, DEPTH = 32;
};
constexpr int TILE_WORDS = 256;  // of 32 bits: 16 rows of 64 bytes
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

HFA_INLINE void fetch_rows(const bf16* rows, int64_t stride) {
  if (!rows) return;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) __builtin_prefetch(rows + r * stride, 0, 2);
}

// Four groups of keys x one panel.
inline void score_groups(const Tile<Bf16Tiles>& tile, int first, const uint32_t* q, int64_t num_words, bool fetch, float* s) {
  const int64_t bytes = tile.stride * 2;
  const bf16 *const *g = tile.group + first, *const *next = tile.next + first;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < num_words; k += 16) {
    _tile_loadd(4, q + k * 16, 64);
    _tile_loadd(5, g[0] + 2 * k, bytes);
    _tile_dpbf16ps(0, 5, 4);
    if (fetch && next[0]) fetch_rows(next[0] + 2 * k, tile.stride);
    _tile_loadd(6, g[1] + 2 * k, bytes);
    _tile_dpbf16ps(1, 6, 4);
    if (fetch && next[1]) fetch_rows(next[1] + 2 * k, tile.stride);
    _tile_loadd(7, g[2] + 2 * k, bytes);
    _tile_dpbf16ps(2, 7, 4);
    if (fetch && next[2]) fetch_rows(next[2] + 2 * k, tile.stride);
    _tile_loadd(5, g[3] + 2 * k, bytes);
    _tile_dpbf16ps(3, 5, 4);
    if (fetch && next[3]) fetch_rows(next[3] + 2 * k, tile.stride);
  }
  _tile_stored(0, s, 64);
  _tile_stored(1, s + TILE_WORDS, 64);
  _tile_stored(2, s + 2 * TILE_WORDS, 64);
  _tile_stored(3, s + 3 * TILE_WORDS, 64);
}

// Two groups of keys x two panels, `panel` words apart in q.
inline void score_pairs(const Tile<Bf16Tiles>& tile, int first, const uint32_t* q, int64_t num_words, bool fetch, float* s) {
  const int64_t bytes = tile.stride * 2, panel = num_words * 16, s_panel = Bf16Tiles::TILE * 16;
  const bf16 *const *g = tile.group + first, *const *next = tile.next + first;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < num_words; k += 16) {
    _tile_loadd(4, q + k * 16, 64);
    _tile_loadd(6, g[0] + 2 * k, bytes);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(7, g[1] + 2 * k, bytes);
    _tile_dpbf16ps(1, 7, 4);
    if (fetch && next[0]) fetch_rows(next[0] + 2 * k, tile.stride);
    _tile_loadd(5, q + panel + k * 16, 64);
    _tile_dpbf16ps(2, 6, 5);
    _tile_dpbf16ps(3, 7, 5);
    if (fetch && next[1]) fetch_rows(next[1] + 2 * k, tile.stride);
  }
  _tile_stored(0, s, 64);
  _tile_stored(1, s + TILE_WORDS, 64);
  _tile_stored(2, s + s_panel, 64);
  _tile_stored(3, s + s_panel + TILE_WORDS, 64);
}

inline void all_scores(const Sizes& s, const Tile<Bf16Tiles>& tile, Buffers<Bf16Tiles>& buf) {
  memory_barrier();
  const int num_groups = (tile.count + 15) / 16;
  int panel = 0;
  for (; panel + 1 < s.num_panels; panel += 2)
    for (int g = 0; g < num_groups; g += 2)
      score_pairs(tile, g, buf.q + panel * s.num_words * 16, s.num_words, panel == 0, buf.s + (panel * Bf16Tiles::TILE + g * 16) * 16);
  for (int g = 0; panel < s.num_panels && g < num_groups; g += 4)
    score_groups(tile, g, buf.q + panel * s.num_words * 16, s.num_words, panel == 0, buf.s + (panel * Bf16Tiles::TILE + g * 16) * 16);
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

// One panel x four tiles of columns. v: rows of pairs, `stride` words apart.
inline void sum_columns(const uint32_t* p, const uint32_t* v, int64_t stride, int num_steps, float* acc) {
  _tile_loadd(0, acc, 64);
  _tile_loadd(1, acc + TILE_WORDS, 64);
  _tile_loadd(2, acc + 2 * TILE_WORDS, 64);
  _tile_loadd(3, acc + 3 * TILE_WORDS, 64);
  for (int t = 0; t < num_steps; ++t, p += TILE_WORDS, v += 16 * stride) {
    _tile_loadd(4, p, 64);
    _tile_loadd(5, v, stride * 4);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, v + 16, stride * 4);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, v + 32, stride * 4);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, v + 48, stride * 4);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, acc, 64);
  _tile_stored(1, acc + TILE_WORDS, 64);
  _tile_stored(2, acc + 2 * TILE_WORDS, 64);
  _tile_stored(3, acc + 3 * TILE_WORDS, 64);
}

// Two panels x two tiles of columns.
inline void sum_pairs(const uint32_t* p, int64_t p_panel, const uint32_t* v, int64_t stride, int num_steps, float* acc, int64_t acc_panel) {
  _tile_loadd(0, acc, 64);
  _tile_loadd(1, acc + TILE_WORDS, 64);
  _tile_loadd(2, acc + acc_panel, 64);
  _tile_loadd(3, acc + acc_panel + TILE_WORDS, 64);
  for (int t = 0; t < num_steps; ++t, p += TILE_WORDS, v += 16 * stride) {
    _tile_loadd(4, p, 64);
    _tile_loadd(6, v, stride * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, v + 16, stride * 4);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, p + p_panel, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, acc, 64);
  _tile_stored(1, acc + TILE_WORDS, 64);
  _tile_stored(2, acc + acc_panel, 64);
  _tile_stored(3, acc + acc_panel + TILE_WORDS, 64);
}

inline void tile_sums(const Sizes& s, int count, Buffers<Bf16Tiles>& buf, const State& state) {
  memory_barrier();
  const int num_steps = (count + 31) / 32;
  const int64_t stride = s.columns + 16, p_panel = Bf16Tiles::TILE / 2 * 16, acc_panel = s.columns * 16;
  int panel = 0;
  for (; panel + 1 < s.num_panels; panel += 2)
    for (int64_t c = 0; c < s.columns; c += 32)
      sum_pairs(buf.p + panel * p_panel, p_panel, buf.v + c, stride, num_steps, state.acc + panel * acc_panel + c * 16, acc_panel);
  for (int64_t c = 0; panel < s.num_panels && c < s.columns; c += 64)
    sum_columns(buf.p + panel * p_panel, buf.v + c, stride, num_steps, state.acc + panel * acc_panel + c * 16);
  memory_barrier();
}

// state: base -inf, the rest zero on entry.
template <class T> static void attend_tiles(const HfaMlaArgs& a, const Block& b, const Sizes& s, const State& state, Buffers<Bf16Tiles>& buf) {
  pack_queries<Bf16Tiles, T>(a, s, b, buf);
  const Registers<Bf16Tiles> registers;
  Tile<Bf16Tiles> tile;
  for (int begin = b.key_begin; begin < b.key_end; begin += Bf16Tiles::TILE) {
    load_tile<Bf16Tiles, T>(a, s, b, begin, buf.rows, tile);
    all_scores(s, tile, buf);
    interleave(s, a.rank, tile, int(round_up(tile.count, 32)), a.rank, buf);
    for (int panel = 0; panel < s.num_panels; ++panel) {
      float *lane_s = buf.s + panel * Bf16Tiles::TILE * 16, *base = state.base + panel * 16, *sum_ = state.sum + panel * 16;
      vf alpha;
      if (move_base(lane_s, begin, tile.count, buf.position + panel * 16, a.scale * attn::LOG2E, base, &alpha)) {
        rescale(state.acc + panel * s.columns * 16, s.columns, alpha);
        storeu(sum_, loadu<vf>(sum_) * alpha);
      }
      tile_probabilities(lane_s, buf.p + panel * Bf16Tiles::TILE / 2 * 16, tile.count, usable(loadu<vf>(base)), sum_);
    }
    tile_sums(s, tile.count, buf, state);
  }
}

}  // namespace mla
}  // namespace
#endif
