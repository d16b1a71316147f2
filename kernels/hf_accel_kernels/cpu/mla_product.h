// The two products beside latent attention, head by head on kv_b_proj's weight as it lies [num_heads * (nope + v), rank]:
// absorb, q_nope [tokens, nope] . Wuk [nope, rank], and expand, o_lat [tokens, rank] . Wuv^T with Wuv [v, rank]. They go
// through the attention's own kernels, for which Wuk's rows are values and Wuv's rows are keys. A token's sums run in the
// same order however many tokens there are.
#pragma once
#include "mla_amx.h"

namespace {
namespace mla {

#ifdef HFA_BF16_DOT
template <class T> using Lanes = std::conditional_t<std::is_same_v<T, bf16>, attn::Bf16Pairs, attn::Fp32Lanes<T>>;
#else
template <class T> using Lanes = attn::Fp32Lanes<T>;
#endif

// A head's part of the weight: `count` rows.
template <class T> struct Weight {
  const T* first;
  int64_t stride;
  int count;
  const T* row(int i) const { return first + i * stride; }
};

// Rows of x and of a result, one a token.
template <class T> struct Operand {
  T* first;
  int64_t stride;
  T* row(int64_t token) const { return first + token * stride; }
};

HFA_INLINE uint32_t query_word(const bf16* x, bool both, uint32_t) { return x[0].bits | (both ? uint32_t(x[1].bits) << 16 : 0); }
template <class T> HFA_INLINE float query_word(const T* x, bool, float) { return to_float(*x); }

// out[rank] = sum of x[n] * row n of the weight, for one token; sums: scratch [round_up(rank, 2 * W)].
template <class T> static void absorb_one(const T* x, const Weight<T>& w, int rank, float* sums, T* out) {
  using L = Lanes<T>;
  using Word = typename L::Word;
  constexpr int ROWS = 4, STEPS = ROWS / L::PER_WORD, AHEAD = 8;
  memset(sums, 0, size_t(round_up(rank, 2 * W)) * 4);
  for (int n = 0; n < w.count; n += ROWS) {
    const T *row[ROWS], *next[ROWS];
    typename L::Reg word[STEPS];
    for (int i = 0; i < ROWS; ++i) {
      row[i] = w.row(std::min(n + i, w.count - 1));
      next[i] = w.row(std::min(n + i + AHEAD, w.count - 1));
    }
    for (int i = 0; i < STEPS; ++i) {
      const int at = n + i * L::PER_WORD;
      word[i] = at < w.count ? L::broadcast(query_word(x + at, at + 1 < w.count, Word())) : typename L::Reg{};
    }
    const auto step = [&](int c, auto whole) __attribute__((always_inline)) {
      vf low = loadu<vf>(sums + c), high = loadu<vf>(sums + c + W);
#pragma GCC unroll 4
      for (int i = 0; i < STEPS; ++i) {
        typename L::Reg v[2];
        if constexpr (decltype(whole)::value) L::template load_values<2>(row + i * L::PER_WORD, c, v);
        else L::template load_values_n<2>(row + i * L::PER_WORD, c, rank, v);
        low = L::mac(low, word[i], v[0]);
        high = L::mac(high, word[i], v[1]);
      }
      storeu(sums + c, low);
      storeu(sums + c + W, high);
    };
    int c = 0;
    for (; c + 2 * W <= rank; c += 2 * W) {
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) prefetch(next[i] + c, 2 * W * int(sizeof(T)));
      step(c, std::true_type());
    }
    if (c < rank) step(c, std::false_type());
  }
  for (int c = 0; c < rank; c += W) store_n(out + c, loadu<vf>(sums + c), rank - c);
}

// Rows [first, ...) of the weight as a tile of the attention's; `next` is where the rows lie that come after these.
template <class K, class T>
static void weight_tile(const Weight<T>& w, int first, const T* next, const Sizes& s, typename K::Elem* rows, Tile<K>& tile) {
  using Elem = typename K::Elem;
  tile.begin = first;
  tile.count = std::min(s.tile, w.count - first);
  tile.direct = std::is_same_v<T, Elem> && s.dim % K::DEPTH == 0 && s.dim % W == 0 && w.count % GROUP == 0;
  tile.stride = tile.direct ? w.stride : s.row_stride;
  for (int t = 0; !tile.direct && t < tile.count; ++t) {
    convert(w.row(first + t), s.dim, rows + t * s.row_stride);
    memset(rows + t * s.row_stride + s.dim, 0, size_t(s.row_stride - s.dim) * sizeof(Elem));
  }
  const int num_groups = (tile.count + GROUP - 1) / GROUP;
  for (int g = 0; g <= MAX_GROUPS; ++g) {
    const void* at = tile.direct ? static_cast<const void*>(w.row(first + g * GROUP)) : rows + g * GROUP * s.row_stride;
    tile.group[g] = g < num_groups ? static_cast<const Elem*>(at) : tile.group[g - 1];
    if (g < MAX_GROUPS)
      tile.next[g] = next && tile.direct && g < num_groups ? reinterpret_cast<const Elem*>(next + g * GROUP * w.stride) : nullptr;
  }
}

template <class K> static void scores_and_fetch(const Sizes& s, const Tile<K>& tile, Buffers<K>& buf) {
#ifdef HFA_MLA_AMX
  if constexpr (std::is_same_v<K, Bf16Tiles>) {
    Fetcher fetcher(tile, score_work(s, tile));
    return all_scores(s, tile, buf, fetcher);
  }
#endif
  all_scores(s, tile, buf);
}

// One head's products of up to BLOCK_ROWS tokens. `next`: the next head's weight, or null.
template <class K, class T> struct HeadProduct {
  const Sizes& s;  // dim: rank
  const HfaMlaArgs& a;
  Buffers<K>& buf;
  const State& state;

  void absorb(const Operand<const T>& x, const Weight<T>& w, const T* next, const Operand<T>& out) const {
    constexpr bool tiles = K::KEYS == 2 && K::DEPTH == 32;
    if (!tiles && s.num_rows == 1) return absorb_one(x.row(0), w, a.rank, state.acc, out.row(0));
    memset(state.acc, 0, size_t(s.num_panels * W * s.columns) * 4);
    Tile<K> tile;
    for (int first = 0; first < w.count; first += s.tile) {
      weight_tile<K, T>(w, first, next ? next + first * w.stride : nullptr, s, buf.rows, tile);
      const auto row = [&](int t) { return x.row(t) + first; };
#ifdef HFA_MLA_AMX
      if constexpr (tiles) {
        pack_tile_rows(s, tile.count, row, buf.p);
        Fetcher fetcher(tile, sum_work(s, tile));
        tile_sums(s, a.rank, tile, buf, fetcher, state);
        continue;
      }
#endif
      pack_rows<K, T>(s, tile.count, (tile.count + K::KEYS - 1) / K::KEYS, K::TILE, row, buf.p);
      sums(a, s, tile, buf, state);
    }
    for (int t = 0; t < s.num_rows; ++t) {
      const float* acc = state.acc + t / W * s.columns * W + t % W * W;
      for (int c = 0; c < a.rank; c += W) store_n(out.row(t) + c, loadu<vf>(acc + c * W), a.rank - c);
    }
  }

  void expand(const Operand<const T>& x, const Weight<T>& w, const T* next, const Operand<T>& out) const {
    pack_rows<K, T>(s, a.rank, s.num_words, s.num_words, [&](int t) { return x.row(t); }, buf.q);
    Tile<K> tile;
    for (int first = 0; first < w.count; first += s.tile) {
      weight_tile<K, T>(w, first, next ? next + first * w.stride : nullptr, s, buf.rows, tile);
      scores_and_fetch(s, tile, buf);
      for (int panel = 0; panel < s.num_panels; ++panel)
        for (int i = 0; i < tile.count; i += W) {
          vf r[W];
          for (int j = 0; j < W; ++j) r[j] = loadu<vf>(buf.s + (panel * K::TILE + i + j) * W);
          transpose(r);
          for (int j = 0; j < W && panel * W + j < s.num_rows; ++j)
            store_n(out.row(panel * W + j) + first + i, r[j], tile.count - i);
        }
    }
  }
};

// f(product, first token, head, next head's is there) for all heads and blocks of tokens, heads shared among threads.
template <class K, class T, class F> static void for_heads(const HfaMlaArgs& a, int64_t num_tokens, Scratch& (*scratch_of)(), F f) {
  HfaMlaArgs sizes = a;
  sizes.rope = 0;
#pragma omp parallel num_threads(a.num_threads) if (a.num_threads > 1)
  {
    const int id = omp_get_thread_num(), threads = omp_get_num_threads();
    const int begin = int(int64_t(a.num_heads) * id / threads), end = int(int64_t(a.num_heads) * (id + 1) / threads);
    Scratch& scratch = scratch_of();
    const Registers<K> registers;
    for (int h = begin; h < end; ++h)
      for (int64_t first = 0; first < num_tokens; first += BLOCK_ROWS) {
        const Sizes s = Sizes::of<K>(sizes, int(std::min<int64_t>(BLOCK_ROWS, num_tokens - first)));
        scratch.reset(size_t(s.state_bytes() + Buffers<K>::bytes(s)));
        const State state = s.take_state(scratch);
        Buffers<K> buf;
        buf.take(s, scratch);
        f(HeadProduct<K, T>{s, a, buf, state}, first, h, h + 1 < end);
      }
  }
}

}  // namespace mla
}  // namespace
