// What the decode and the prefill kernels share: the call, the running softmax state of a block of query rows, the two
// arithmetics (fp32 lanes, bf16 pair dot products), and the softmax of one row of a tile of keys.
// Running (online) softmax after Milakov & Gimelshein 2018 and Dao et al. 2022, in the log2 domain, always in fp32.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "attention_simd.h"
#include "paged_attention.h"

namespace {
namespace attn {
using namespace simd;

constexpr float LOG2E = 1.4426950408889634f;
constexpr int MAX_TILE = 128;  // keys handled between two updates of the running softmax

HFA_INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// A run of query tokens of one sequence, for one kv head, against keys [key_begin, key_end).
// Row r is token r / group, query head r % group: causal limits never fall along the rows.
struct Block {
  int seq, kv_head;
  int64_t first_token;  // in q and out
  int num_tokens, first_position;
  int key_begin, key_end;
};

// The running softmax of a block's rows.
struct State {
  float* acc;       // [rows, acc_stride] sum of p*v
  int64_t acc_stride;
  float *max, *sum; // [rows] of the logits in the log2 domain, and of p
};

// Bump allocator over one growing buffer: each thread keeps its own between calls.
class Scratch {
 public:
  ~Scratch() { free(base_); }
  void reset(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    free(base_);
    size_ = size_t(round_up(int64_t(bytes), 4096));
    base_ = static_cast<char*>(aligned_alloc(64, size_));
    if (!base_) abort();
  }
  template <class T> T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += size_t(round_up(count * int64_t(sizeof(T)), 64));
    return p;
  }

 private:
  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// Addresses of the keys' and values' rows of one tile; slots beyond the last key repeat it, so reading them is harmless.
template <class T> struct Rows {
  const T* k[MAX_TILE + 16];
  const T* v[MAX_TILE + 16];
  int count = 0;
  void resolve(const HfaAttentionArgs& a, const Block& b, int begin, int end) {
    count = std::max(0, end - begin);
    if (!count) return;
    const int page_size = a.page_size;
    const int32_t* table = a.page_table + b.seq * a.page_table_stride;
    int page = begin / page_size, offset = begin % page_size;
    for (int t = 0; t < count; ++page, offset = 0) {
      const int64_t row = (int64_t(table[page]) * a.num_kv_heads + b.kv_head) * page_size + offset;
      const T* kr = static_cast<const T*>(a.k_pages) + row * a.head_dim;
      const T* vr = static_cast<const T*>(a.v_pages) + row * a.v_head_dim;
      for (const int stop = std::min(count, t + page_size - offset); t < stop; ++t) {
        k[t] = kr; v[t] = vr;
        kr += a.head_dim; vr += a.v_head_dim;
      }
    }
    for (int t = count; t < round_up(count, 16); ++t) { k[t] = k[count - 1]; v[t] = v[count - 1]; }
  }
};

// ---- the two arithmetics: a "word" is 32 bits of an operand, one fp32 or two bf16 neighbours along the summed axis ----
template <class Elem> struct Fp32Lanes {
  using T = Elem;       // of q, k, v
  using P = float;      // of the probabilities
  using Word = float;
  using Reg = vf;
  static constexpr int PER_WORD = 1, STEP = W;  // STEP: elements of a vector of words
  static HFA_INLINE Reg load_words(const T* p) { return load(p); }
  static HFA_INLINE Reg load_words_n(const T* p, int n) { return load_n(p, n); }
  static HFA_INLINE Reg broadcast(Word w) { return set1(w); }
  static HFA_INLINE vf mac(vf acc, Reg a, Reg b) { return a * b + acc; }
  // Values of one step along the keys, columns [c, c + CV*W): words of value rows t.
  template <int CV> static HFA_INLINE void load_values(const T* const* v, int c, Reg* out) {
#pragma GCC unroll 4
    for (int i = 0; i < CV; ++i) out[i] = load(v[0] + c + i * W);
  }
  template <int CV> static HFA_INLINE void load_values_n(const T* const* v, int c, int end, Reg* out) {
    for (int i = 0; i < CV; ++i) out[i] = load_n(v[0] + c + i * W, std::max(0, std::min(W, end - c - i * W)));
  }
  static void in_order(float*, int) {}
};

#ifdef HFA_BF16_DOT
struct Bf16Pairs {
  using T = bf16;
  using P = bf16;
  using Word = uint32_t;
  using Reg = vu;
  static constexpr int PER_WORD = 2, STEP = 2 * W;
  static HFA_INLINE Reg load_words(const T* p) { return loadu<vu>(p); }
  static HFA_INLINE Reg load_words_n(const T* p, int n) {
    return n >= 2 * W ? load_words(p) : (vu)_mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p);
  }
  static HFA_INLINE Reg broadcast(Word w) { return vu{} + w; }
  static HFA_INLINE vf mac(vf acc, Reg a, Reg b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  static HFA_INLINE void pair(vu even, vu odd, Reg& low, Reg& high) {
    low = (vu)shuffle<PairsLow, 2 * W>((vh2)even, (vh2)odd);
    high = (vu)shuffle<PairsHigh, 2 * W>((vh2)even, (vh2)odd);
  }
  // Words of value rows t and t+1 (v[0], v[1]): each word holds one column of both.
  template <int CV> static HFA_INLINE void load_values(const T* const* v, int c, Reg* out) {
    if constexpr (CV % 2) return load_values_n<CV>(v, c, c + CV * W, out);
#pragma GCC unroll 4
    for (int i = 0; i + 1 < CV; i += 2) pair(load_words(v[0] + c + i * W), load_words(v[1] + c + i * W), out[i], out[i + 1]);
  }
  template <int CV> static HFA_INLINE void load_values_n(const T* const* v, int c, int end, Reg* out) {
#pragma GCC unroll 4
    for (int i = 0; i < CV; i += 2) {
      const int n = std::max(0, std::min(2 * W, end - c - i * W));
      Reg unused;
      pair(load_words_n(v[0] + c + i * W, n), load_words_n(v[1] + c + i * W, n), out[i], i + 1 < CV ? out[i + 1] : unused);
    }
  }
  static void in_order(float*, int) {}
};
#endif

#ifdef HFA_SLOW_BF16_DOT
// bf16 pairs as fp32 lanes, the even elements of a word's vector and the odd ones: one shift, one mask, no shuffle.
// Sums over values hold columns in that order, [32 even, 32 odd] by halves; `in_order` puts a finished row right.
struct Bf16Halves {
  struct Reg {
    vf even, odd;
  };
  using T = bf16;
  using P = float;
  using Word = float;
  static constexpr int PER_WORD = 1, STEP = 2 * W;
  static HFA_INLINE Reg split(vu words) { return {(vf)(words << 16), (vf)(words & 0xffff0000u)}; }
  static HFA_INLINE Reg load_words(const T* p) { return split(Bf16Pairs::load_words(p)); }
  static HFA_INLINE Reg load_words_n(const T* p, int n) { return split(Bf16Pairs::load_words_n(p, n)); }
  static HFA_INLINE vf broadcast(Word w) { return set1(w); }
  static HFA_INLINE vf mac(vf acc, Reg a, Reg b) { return a.odd * b.odd + (a.even * b.even + acc); }
  static HFA_INLINE vf mac(vf acc, vf a, vf b) { return a * b + acc; }
  template <int CV> static HFA_INLINE void load_values(const T* const* v, int c, vf* out) {
#pragma GCC unroll 4
    for (int i = 0; i < CV; i += 2) {
      const Reg r = load_words(v[0] + c + i * W);
      out[i] = r.even;
      out[i + 1] = r.odd;
    }
  }
  template <int CV> static HFA_INLINE void load_values_n(const T* const* v, int c, int end, vf* out) {
#pragma GCC unroll 4
    for (int i = 0; i < CV; i += 2) {
      const Reg r = load_words_n(v[0] + c + i * W, std::max(0, std::min(2 * W, end - c - i * W)));
      out[i] = r.even;
      out[i + 1] = r.odd;
    }
  }
  static void in_order(float* row, int columns) {
    for (int c = 0; c < columns; c += 2 * W) {
      const vf even = loadu<vf>(row + c), odd = loadu<vf>(row + c + W);
      storeu(row + c, shuffle<Zip<0>, W>(even, odd));
      storeu(row + c + W, shuffle<Zip<W / 2>, W>(even, odd));
    }
  }
};
#endif

struct LogitScale {
  float scale;    // on the dot product; with a softcap, what tanh is taken of
  float cap;      // 0: none; else what the tanh is multiplied with
  explicit LogitScale(const HfaAttentionArgs& a)
      : scale(a.softcap != 0 ? a.scale / a.softcap : a.scale * LOG2E), cap(a.softcap * LOG2E) {}
  HFA_INLINE vf operator()(vf s) const {
    s *= set1(scale);
    return cap != 0 ? tanh(s) * set1(cap) : s;
  }
};

constexpr struct Iota {
  alignas(64) int32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
} IOTA;

// Dot products s[0..n) of one row, of which [low, high) are visible -> logits, -inf elsewhere, in place; returns their max.
HFA_INLINE float logits_row(float* s, int n, int low, int high, const LogitScale& scale) {
  const vf neg_inf = set1(-INFINITY);
  vf top = neg_inf;
  if (low <= 0 && high >= round_up(n, W)) {
    for (int t = 0; t < n; t += W) {
      const vf y = scale(loadu<vf>(s + t));
      storeu(s + t, y);
      top = maximum(top, y);
    }
  } else {
    const vi lane = loadu<vi>(IOTA.lane);
    for (int t = 0; t < n; t += W) {
      const vi index = lane + t;
      const vf y = ((index >= low) & (index < high)) ? scale(loadu<vf>(s + t)) : neg_inf;
      storeu(s + t, y);
      top = maximum(top, y);
    }
  }
  return max_lane(top);
}

// num_rows <= 8 rows of dot products, n <= MAX_TILE keys each; row r sees keys [low[r], high[r]). Writes probabilities
// p[r][0..round_up(n, W)), 0 where not visible, updates the running max and sum, and gives the factors the rows'
// accumulators are to be scaled with. Overwrites s. Step by step over all rows, so that their latencies overlap.
template <class P, bool EXACT = sizeof(P) == 4>
HFA_INLINE void softmax_rows(int num_rows, float* s, P* p, int n, const int* low, const int* high, const LogitScale& scale,
                             float* max, float* sum_, float* alpha) {
  float base[8], change[8] = {};
  for (int r = 0; r < num_rows; ++r) {
    const float top = std::max(max[r], logits_row(s + r * MAX_TILE, n, low[r], high[r], scale));
    base[r] = top == -INFINITY ? 0.f : top;  // nothing visible yet: every p is 0, a NaN stays one
    change[r] = max[r] - base[r];
    max[r] = top;
  }
  for (int r = 0; r < num_rows; r += W) {
    const vf e = exp2(load_n(change + r, 8 - r));
    store_n(alpha + r, e, num_rows - r);
  }
  for (int r = 0; r < num_rows; ++r) {
    const vf base_v = set1(base[r]);
    vf total = zero();
    for (int t = 0; t < n; t += W) {
      const vf e = exp2<EXACT ? 6 : 4>(loadu<vf>(s + r * MAX_TILE + t) - base_v);
      store(p + r * MAX_TILE + t, e);
      total += e;
    }
    sum_[r] = sum_[r] * alpha[r] + sum(total);
  }
}

}  // namespace attn
}  // namespace
