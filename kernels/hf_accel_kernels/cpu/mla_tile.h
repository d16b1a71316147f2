// What the latent attention kernels share: a block of query rows, its working memory, a tile of latent rows, the softmax.
// Query rows (token-major, then heads) lie in panels of W lanes: scores are kept transposed, [keys][lanes], so that the
// softmax runs down the keys. Its base moves only when the maximum grows by more than 2^8: sums seldom need rescaling.
#pragma once
#include "attention_tile.h"
#include "mla_attention.h"
#include "mla_fp8.h"

namespace {
namespace mla {
using attn::round_up;
using attn::Scratch;

constexpr int BLOCK_ROWS = 128;  // query rows of a block, or one token's heads
constexpr int GROUP = 16;        // consecutive keys at even distances in memory
constexpr int MAX_GROUPS = 16;   // of a tile
constexpr float LAZY = 8.f;      // powers of two that probabilities may exceed 1 by

// Query tokens of one sequence against its keys [key_begin, key_end); key_begin is a multiple of GROUP.
struct Block {
  int seq;
  int64_t first_token;  // in q and out
  int num_tokens, first_position;
  int key_begin, key_end;
};

// The running softmax of a block, by panel. acc: [panels][columns / W][W rows][W columns].
struct State {
  float* acc;
  float *base, *sum;  // [panels][W], base in the log2 domain, -inf at first
};

struct Sizes {
  int num_rows, num_panels;
  int dim;             // rank + rope
  int64_t num_words;   // along dim, in Q
  int64_t columns;     // along rank, in sums and values: a multiple of 4 * W
  int64_t row_stride;  // elements between the rows of a copied tile
  int tile;            // keys handled between two updates of the running softmax

  template <class K> static Sizes of(const HfaMlaArgs& a, int num_rows) {
    Sizes s;
    s.num_rows = num_rows;
    s.num_panels = int(round_up(num_rows, W) / W);
    if (s.num_panels > 1) s.num_panels = int(round_up(s.num_panels, K::PANEL_STEP));
    s.dim = a.rank + a.rope;
    s.tile = s.num_panels > 1 ? K::TILE : K::ONE_PANEL_TILE;
    s.num_words = round_up(s.dim, K::DEPTH) / K::PER_WORD;
    s.columns = round_up(a.rank, 4 * W);
    const int64_t padded = round_up(std::max<int64_t>(s.dim, round_up(a.rank, W)), 32);
    s.row_stride = padded % 128 == 0 ? padded + 32 : padded;
    return s;
  }
  int64_t state_bytes() const { return num_panels * W * (columns + 2) * 4 + 3 * 64; }
  State take_state(Scratch& scratch) const {
    State s;
    s.acc = scratch.take<float>(num_panels * W * columns);
    s.base = scratch.take<float>(num_panels * W);
    s.sum = scratch.take<float>(num_panels * W);
    return s;
  }
};

// Up to K::TILE rows of latents as the kernel's elements: where they lie in the pages, or copied and converted.
template <class K> struct Tile {
  using Elem = typename K::Elem;
  const Elem* group[MAX_GROUPS + 1];  // GROUP rows each; beyond the last, the last again
  const Elem* next[MAX_GROUPS];       // the rows to fetch meanwhile, null after the last
  int64_t stride;                     // elements between rows
  int begin, count;
  bool direct;
};

// Rows of GROUP keys lie evenly in a page, are of the kernel's type and need no padding.
template <class K, class T> bool reads_pages(const HfaMlaArgs& a) {
  const int dim = a.rank + a.rope;
  return std::is_same_v<T, typename K::Elem> && !a.scales && a.page_size % GROUP == 0 && dim % K::DEPTH == 0 &&
         dim >= round_up(a.rank, W);
}

inline int64_t row_of(const HfaMlaArgs& a, int seq, int key) {
  return int64_t(a.page_table[seq * a.page_table_stride + key / a.page_size]) * a.page_size + key % a.page_size;
}

template <class T, class Elem> HFA_INLINE void convert(const T* from, int n, Elem* to) {
  if constexpr (std::is_same_v<T, Elem>) memcpy(to, from, size_t(n) * sizeof(T));
  else for (int i = 0; i < n; i += W) store_n(to + i, load_n(from + i, n - i), n - i);
}

template <class Elem> HFA_INLINE void dequantize(const uint8_t* from, float scale, int n, Elem* to) {
  int i = 0;
  for (; i + W <= n; i += W) store(to + i, load_fp8(from + i) * set1(scale));
  for (; i < n; ++i) store_n(to + i, set1(fp8_to_float(from[i]) * scale), 1);
}

// Copies the tile's rows to `rows` [K::TILE, row_stride], zeros beyond dim.
template <class K, class T> static void copy_rows(const HfaMlaArgs& a, const Sizes& s, int seq, const Tile<K>& tile,
                                                  typename K::Elem* rows) {
  for (int t = 0; t < tile.count; ++t) {
    const int64_t row = row_of(a, seq, tile.begin + t);
    typename K::Elem* to = rows + t * s.row_stride;
    if (a.scales) {
      const uint8_t* from = static_cast<const uint8_t*>(a.pages) + row * s.dim;
      dequantize(from, a.scales[2 * row], a.rank, to);
      dequantize(from + a.rank, a.scales[2 * row + 1], a.rope, to + a.rank);
    } else {
      convert(static_cast<const T*>(a.pages) + row * s.dim, s.dim, to);
    }
    memset(to + s.dim, 0, size_t(s.row_stride - s.dim) * sizeof(typename K::Elem));
  }
}

// `after`: the block that comes after this one, whose first rows are fetched during the last tile, or null.
template <class K, class T>
static void load_tile(const HfaMlaArgs& a, const Sizes& s, const Block& b, const Block* after, int begin, typename K::Elem* rows,
                      Tile<K>& tile) {
  using Elem = typename K::Elem;
  tile.begin = begin;
  tile.count = std::min(s.tile, b.key_end - begin);
  tile.direct = reads_pages<K, T>(a);
  tile.stride = tile.direct ? s.dim : s.row_stride;
  if (!tile.direct) copy_rows<K, T>(a, s, b.seq, tile, rows);
  const int num_groups = (tile.count + GROUP - 1) / GROUP;
  const auto address = [&](int seq, int key) { return static_cast<const Elem*>(a.pages) + row_of(a, seq, key) * s.dim; };
  const bool last = begin + s.tile >= b.key_end;
  const int ahead = !last ? begin + s.tile : after ? after->key_begin : 0;
  const int ahead_end = !last ? b.key_end : after ? after->key_end : 0;
  for (int g = 0; g < MAX_GROUPS; ++g) {
    const int key = ahead + g * GROUP;
    tile.next[g] = tile.direct && g < s.tile / GROUP && key < ahead_end ? address(last ? after->seq : b.seq, key) : nullptr;
    tile.group[g] = g >= num_groups ? tile.group[g - 1]
                    : tile.direct   ? address(b.seq, begin + g * GROUP)
                                    : rows + g * GROUP * s.row_stride;
  }
}

// A block's working memory. q: [panels][num_words][W] words; s: [panels][K::TILE][W]; p: as K lays probabilities out.
template <class K> struct Buffers {
  typename K::Word *q, *v, *p;
  float* s;
  typename K::Elem* rows;
  int* position;  // [panels * W] of the row's token in its sequence

  static int64_t bytes(const Sizes& s) {
    return 4 * (s.num_panels * W * (s.num_words + 2 * K::TILE + 1) + K::TILE * s.row_stride +
                K::TILE * (s.columns + 16)) + 8 * 64;
  }
  void take(const Sizes& s, Scratch& scratch) {
    using Word = typename K::Word;
    q = scratch.take<Word>(s.num_panels * s.num_words * W);
    v = scratch.take<Word>(K::TILE / K::PER_WORD * (s.columns + 16));
    p = scratch.take<Word>(s.num_panels * K::TILE * W);
    this->s = scratch.take<float>(s.num_panels * K::TILE * W);
    rows = scratch.take<typename K::Elem>(K::TILE * s.row_stride);
    position = scratch.take<int>(s.num_panels * W);
  }
};

// Elements [0, n) of rows row(0..s.num_rows) to [panels][panel_words][W] words, zeros beyond n and the rows.
template <class K, class T, class F>
static void pack_rows(const Sizes& s, int n, int64_t num_words, int64_t panel_words, F row, typename K::Word* out) {
  constexpr int STEP = W * K::PER_WORD;
  typename K::Elem lane[STEP];
  for (int panel = 0; panel < s.num_panels; ++panel)
    for (int64_t c = 0; c < num_words; c += W) {
      const int from = int(c) * K::PER_WORD, live = std::max(0, std::min(STEP, n - from));
      typename K::Reg r[W];
      for (int i = 0; i < W; ++i) {
        r[i] = typename K::Reg{};
        if (panel * W + i >= s.num_rows || !live) continue;
        if (live < STEP) memset(lane, 0, sizeof lane);
        convert(row(panel * W + i) + from, live, lane);
        r[i] = loadu<typename K::Reg>(lane);
      }
      transpose(r);
      typename K::Word* const to = out + (panel * panel_words + c) * W;
      for (int i = 0; i < W && c + i < num_words; ++i) storeu(to + i * W, r[i]);
    }
}

template <class K, class T>
static void pack_queries(const HfaMlaArgs& a, const Sizes& s, const Block& b, Buffers<K>& buf) {
  const auto row = [&](int r) {
    return static_cast<const T*>(a.q) + (b.first_token + r / a.num_heads) * a.q_token_stride + r % a.num_heads * a.q_head_stride;
  };
  pack_rows<K, T>(s, s.dim, s.num_words, s.num_words, row, buf.q);
  for (int r = 0; r < s.num_panels * W; ++r)
    buf.position[r] = b.first_position + std::min(r, s.num_rows - 1) / a.num_heads;
}

// The logits of one panel against a tile of `count` keys from `begin` on, in place in s (log2 domain, -inf where a lane
// does not see), and the panel's new base. Returns whether sums must be rescaled, by `alpha`.
HFA_INLINE bool move_base(float* s, int begin, int count, const int* position, float factor, float* base, vf* alpha) {
  const vf scale = set1(factor), neg_inf = set1(-INFINITY);
  const vi high = loadu<vi>(position) + 1 - begin;
  int last = high[0];
  for (int i = 1; i < W; ++i) last = std::min(last, int(high[i]));
  vf tops[2] = {neg_inf, neg_inf};
  const int plain = std::min(count, last) & ~1;
  int t = 0;
  for (; t < plain; t += 2)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const vf y = loadu<vf>(s + (t + i) * W) * scale;
      storeu(s + (t + i) * W, y);
      tops[i] = maximum(y, tops[i]);
    }
  for (; t < count; ++t) {
    const vf y = (vi{} + t) < high ? loadu<vf>(s + t * W) * scale : neg_inf;
    storeu(s + t * W, y);
    tops[0] = maximum(y, tops[0]);
  }
  const vf old = loadu<vf>(base), top = maximum(tops[0], tops[1]);
  const vi grows = (top > old + set1(LAZY)) | ((old == neg_inf) & (top > neg_inf));
  const vf fresh = grows ? top : old;
  *alpha = grows ? exp2(old - top) : set1(1.f);
  storeu(base, fresh);
  const vi any = grows & (old != neg_inf);  // before the first visible key the sums are zero
  int bits = 0;
  for (int i = 0; i < W; ++i) bits |= any[i];
  return bits != 0;
}

HFA_INLINE vf usable(vf base) { return base == set1(-INFINITY) ? zero() : base; }  // nothing seen yet: every p is 0

inline void rescale(float* acc, int64_t columns, vf alpha) {
  for (int64_t c = 0; c < columns; c += W)
    for (int r = 0; r < W; ++r) {
      float* row = acc + (c + r) * W;
      storeu(row, loadu<vf>(row) * set1(alpha[r]));
    }
}

}  // namespace mla
}  // namespace
