// Latent attention on vector lanes, fp32 or bf16 pair dot products: scores S' = C Q' with the latents broadcast word by
// word and query rows in the lanes; sums O = P C with P broadcast and columns in the lanes. No transposed copy of the
// latents; bf16 needs neighbouring rows interleaved once a tile.
#pragma once
#include "mla_tile.h"

namespace {
namespace mla {

constexpr int KEY_ROWS = NUM_REGS == 32 ? 8 : 4;  // keys of one score kernel; query rows of one sum kernel
constexpr int MAX_VECTORS = 3;
static_assert(GROUP % KEY_ROWS == 0 && W % std::min(W, KEY_ROWS) == 0);

struct Fp32Vectors : attn::Fp32Lanes<float> {
  using Elem = float;
  static constexpr int TILE = 64, ONE_PANEL_TILE = 64, DEPTH = 1, KEYS = 1, PANEL_STEP = 1;
  static HFA_INLINE Reg broadcast(Word w) { return w - vf{}; }  // 0 + w would be an addition: it changes -0
};
#ifdef HFA_BF16_DOT
struct Bf16Vectors : attn::Bf16Pairs {
  using Elem = bf16;
  static constexpr int TILE = 64, ONE_PANEL_TILE = 64, DEPTH = 2, KEYS = 2, PANEL_STEP = 1;
};
#endif

// What a kernel needs set up in the processor while it runs.
template <class K> struct Registers {
  Registers() {}
};

// s[KEY_ROWS keys][W] of N panels; `ahead`: half as many rows as these to fetch meanwhile, or null.
template <class K, int N>
static void score_keys(const typename K::Word* q, int64_t num_words, const typename K::Elem* rows, int64_t stride, const char* ahead,
                       float* s) {
  using Word = typename K::Word;
  vf acc[KEY_ROWS][N];
#pragma GCC unroll 8
  for (int r = 0; r < KEY_ROWS; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < N; ++i) acc[r][i] = zero();
  typedef Word Aliased __attribute__((may_alias, aligned(2)));  // read in place, so that it is broadcast by the load
  const Aliased* row[KEY_ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < KEY_ROWS; ++r) row[r] = reinterpret_cast<const Aliased*>(rows + r * stride);
  constexpr int WORDS_A_LINE = 32 / KEY_ROWS;  // passed for every 64 bytes of these rows' halves
  for (int64_t k = 0; k < num_words; ++k) {
    if (ahead && k % WORDS_A_LINE == 0) __builtin_prefetch(ahead + k / WORDS_A_LINE * 64, 0, 2);
    typename K::Reg query[N];
#pragma GCC unroll 3
    for (int i = 0; i < N; ++i) query[i] = loadu<typename K::Reg>(q + (i * num_words + k) * W);
#pragma GCC unroll 8
    for (int r = 0; r < KEY_ROWS; ++r) {
      const typename K::Reg key = K::broadcast(row[r][k]);
#pragma GCC unroll 3
      for (int i = 0; i < N; ++i) acc[r][i] = K::mac(acc[r][i], query[i], key);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < KEY_ROWS; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < N; ++i) storeu(s + (i * K::TILE + r) * W, acc[r][i]);
}

template <class K> static void all_scores(const Sizes& s, const Tile<K>& tile, Buffers<K>& buf) {
  for (int panel = 0; panel < s.num_panels; panel += MAX_VECTORS)
    for (int t = 0; t < tile.count; t += KEY_ROWS) {
      const int64_t offset = t % GROUP * tile.stride;
      const auto* next = panel ? nullptr : tile.next[t / GROUP];
      const char* ahead = next ? reinterpret_cast<const char*>(next + offset / 2) : nullptr;
      const auto run = [&](auto function) {
        function(buf.q + panel * s.num_words * W, s.num_words, tile.group[t / GROUP] + offset, tile.stride, ahead,
                 buf.s + (panel * K::TILE + t) * W);
      };
      switch (std::min(MAX_VECTORS, s.num_panels - panel)) {
        case 1: run(score_keys<K, 1>); break;
        case 2: run(score_keys<K, 2>); break;
        default: run(score_keys<K, 3>);
      }
    }
}

// p[count][W] words from logits, one word for KEYS keys; adds to the panel's sums.
template <class K> HFA_INLINE void probabilities(float* s, typename K::Word* p, int count, vf base, float* sum_) {
  vf total[2] = {};
  if constexpr (K::KEYS == 1) {
    for (int t = 0; t < count; ++t) {
      const vf e = exp2(loadu<vf>(s + t * W) - base);
      storeu(p + t * W, e);
      total[t & 1] += e;
    }
  } else {
    if (count & 1) storeu(s + count * W, set1(-INFINITY));
    for (int t = 0; t < count; t += 2) {
      const vf x = exp2<4>(loadu<vf>(s + t * W) - base), y = exp2<4>(loadu<vf>(s + (t + 1) * W) - base);
      total[0] += x;
      total[1] += y;
      uint16_t even[W], odd[W];
      store(reinterpret_cast<bf16*>(even), x);
      store(reinterpret_cast<bf16*>(odd), y);
      storeu(p + t / 2 * W, __builtin_convertvector(loadu<vh>(even), vu) | __builtin_convertvector(loadu<vh>(odd), vu) << 16);
    }
  }
  storeu(sum_, loadu<vf>(sum_) + (total[0] + total[1]));
}

// v[pairs][columns + 16]: words of neighbouring rows of latents, zeros beyond the last.
#ifdef HFA_BF16_DOT
template <class K> static void interleave(const Sizes& s, int rank, const Tile<K>& tile, Buffers<K>& buf) {
  for (int t = 0; t < tile.count; t += 2) {
    const bf16* rows = tile.group[t / GROUP] + t % GROUP * tile.stride;
    uint32_t* to = buf.v + t / 2 * (s.columns + 16);
    const bool odd = t + 1 < tile.count;
    for (int64_t c = 0; c < s.columns; c += 2 * W) {
      const int n = int(std::max<int64_t>(0, std::min<int64_t>(2 * W, rank - c)));
      vu low, high;
      attn::Bf16Pairs::pair(attn::Bf16Pairs::load_words_n(rows + c, n),
                            odd ? attn::Bf16Pairs::load_words_n(rows + tile.stride + c, n) : vu{},
                            low, high);
      storeu(to + c, low);
      storeu(to + c + W, high);
    }
  }
}
#endif

// What the sums fetch of the next rows: of each group the second half, the lines shared among the calls in turn.
struct Ahead {
  const char* group[MAX_GROUPS];  // or null
  int64_t line, num_lines;
};

// acc[KEY_ROWS rows][N vectors] += p . rows of latents, over all keys of the tile.
template <class K, int N>
static void sum_rows(const typename K::Word* p, const typename K::Word* const* group, int64_t stride, int num_steps, const Ahead& ahead,
                     float* acc) {
  constexpr int R = std::min(W, KEY_ROWS), STEPS = GROUP / K::KEYS;
  vf a[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < N; ++i) a[r][i] = loadu<vf>(acc + (i * W + r) * W);
  for (int first = 0; first < num_steps; first += STEPS) {
    const typename K::Word* v = group[first / STEPS];
    const int stop = std::min(num_steps, first + STEPS);
    const char* line = ahead.line < ahead.num_lines ? ahead.group[first / STEPS] : nullptr;
    if (line) line += ahead.line * 64;
    for (int t = first; t < stop; ++t, v += stride) {
      if (line) {
        __builtin_prefetch(line, 0, 2);
        line += 64;
      }
      typename K::Reg value[N];
#pragma GCC unroll 3
      for (int i = 0; i < N; ++i) value[i] = loadu<typename K::Reg>(v + i * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const typename K::Reg w = K::broadcast(p[t * W + r]);
#pragma GCC unroll 3
        for (int i = 0; i < N; ++i) a[r][i] = K::mac(a[r][i], w, value[i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < N; ++i) storeu(acc + (i * W + r) * W, a[r][i]);
}

template <class K> static void sums(const HfaMlaArgs& a, const Sizes& s, const Tile<K>& tile, Buffers<K>& buf, const State& state) {
  using Word = typename K::Word;
  constexpr int R = std::min(W, KEY_ROWS);
  int64_t stride = tile.stride;
#ifdef HFA_BF16_DOT
  if constexpr (K::KEYS == 2) {
    interleave(s, a.rank, tile, buf);
    stride = s.columns + 16;
  }
#endif
  const int num_steps = (tile.count + K::KEYS - 1) / K::KEYS, num_vectors = (a.rank + W - 1) / W;
  const int64_t half = GROUP / 2 * tile.stride;
  Ahead ahead;
  for (int g = 0; g < MAX_GROUPS; ++g) ahead.group[g] = tile.next[g] ? reinterpret_cast<const char*>(tile.next[g] + half) : nullptr;
  ahead.line = 0, ahead.num_lines = half * int64_t(sizeof(typename K::Elem)) / 64;
  for (int i = 0; i < num_vectors; i += MAX_VECTORS) {
    const Word* group[MAX_GROUPS];
    for (int g = 0; g < MAX_GROUPS; ++g)
      group[g] = (K::KEYS == 2 ? buf.v + g * (GROUP / K::KEYS) * stride : reinterpret_cast<const Word*>(tile.group[g])) + i * W;
    for (int row = 0; row < s.num_rows; row += R) {
      const int panel = row / W;
      float* acc = state.acc + panel * s.columns * W + (i * W + row % W) * W;
      const Word* p = buf.p + panel * K::TILE * W + row % W;
      switch (std::min(MAX_VECTORS, num_vectors - i)) {
        case 1: sum_rows<K, 1>(p, group, stride, num_steps, ahead, acc); break;
        case 2: sum_rows<K, 2>(p, group, stride, num_steps, ahead, acc); break;
        default: sum_rows<K, 3>(p, group, stride, num_steps, ahead, acc);
      }
      ahead.line += GROUP / K::KEYS;
    }
  }
}

// state: base -inf, the rest zero on entry.
template <class K, class T> static void attend_vectors(const HfaMlaArgs& a, const Block& b, const Block* after, const Sizes& s,
                                                         const State& state, Buffers<K>& buf) {
  pack_queries<K, T>(a, s, b, buf);
  Tile<K> tile;
  for (int begin = b.key_begin; begin < b.key_end; begin += s.tile) {
    load_tile<K, T>(a, s, b, after, begin, buf.rows, tile);
    all_scores(s, tile, buf);
    for (int panel = 0; panel < s.num_panels; ++panel) {
      float *lane_s = buf.s + panel * K::TILE * W, *base = state.base + panel * W, *sum_ = state.sum + panel * W;
      vf alpha;
      if (move_base(lane_s, begin, tile.count, buf.position + panel * W, a.scale * attn::LOG2E, base, &alpha)) {
        rescale(state.acc + panel * s.columns * W, s.columns, alpha);
        storeu(sum_, loadu<vf>(sum_) * alpha);
      }
      probabilities<K>(lane_s, buf.p + panel * K::TILE * W, tile.count, usable(loadu<vf>(base)), sum_);
    }
    sums(a, s, tile, buf, state);
  }
}

}  // namespace mla
}  // namespace
