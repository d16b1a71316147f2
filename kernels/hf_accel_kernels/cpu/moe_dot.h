// Products with row-major weights as dot products: a few rows of W times a few activations at once, so that each row is
// read from memory once and, with many activations, the arithmetic is the limit. The sum of one output has one order,
// whatever runs beside it.
#pragma once
#include <algorithm>

#include "moe_elements.h"

namespace hfa {
namespace moe {

#if defined(__AVX512F__)
constexpr int kDotRows = 4;
constexpr int kDotTokens = 6;  // 4 x 6 accumulators, 4 weights, 1 activation: 29 of 32 registers
#else
constexpr int kDotRows = 2;
constexpr int kDotTokens = 4;  // 2 x 4 accumulators, 2 weights, 1 activation: 11 of 16 registers
#endif

constexpr int64_t kBlockTiles = 3;  // of activations, from which they count as many
constexpr int64_t kPartSteps = 64;  // of K in one part: the sums of a part are added up before the next part begins

// A step along K of T: kElements of them in one register, and what a multiplication adds to float32 lanes.
template <typename T>
struct Lanes {
  static constexpr int kElements = kWidth;
  typedef vfloat Vector;
  static inline Vector read(const T* p) { return load(p); }
  static inline void add(vfloat& acc, Vector w, Vector x) { acc += w * x; }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <>
struct Lanes<bf16> {
  static constexpr int kElements = 2 * kWidth;
  typedef __m512bh Vector;
  static inline Vector read(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline void add(vfloat& acc, Vector w, Vector x) { acc = (vfloat)_mm512_dpbf16_ps((__m512)acc, w, x); }
};
#endif

// out[r] (add: +)= the sum of v[r]'s lanes.
template <int Rows>
inline void store_sums(const vfloat (&v)[Rows], float* out, bool add) {
#if defined(__AVX512DQ__)
  if constexpr (Rows == 4) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a b a b in each 128 bits
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));  // a b c d
    const __m256 lower = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    __m128 total = _mm_add_ps(_mm256_castps256_ps128(lower), _mm256_extractf128_ps(lower, 1));
    if (add) total = _mm_add_ps(total, _mm_loadu_ps(out));
    _mm_storeu_ps(out, total);
    return;
  }
#endif
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) out[r] = sum(v[r]) + (add ? out[r] : 0.f);
}

// Columns [begin, end) of K of a product: w rows are `depth` apart, and x[m] is a whole row.
struct Part {
  int64_t depth, begin, end;
};

// out[m * out_stride + r] (begin > 0: +)= sum of w[r][k] x[m][k] over a part, rows r < Rows and activations m < Tokens. With
// Fetch the Rows rows at `ahead`, `depth` apart, are asked for on the way, as many columns as are read.
template <typename T, int Rows, int Tokens, bool Fetch>
void dot_tile(const T* w, Part part, const T* const* x, float* out, int64_t out_stride, const T* ahead) {
  constexpr int kStep = Lanes<T>::kElements;
  const int64_t depth = part.depth;
  vfloat acc[Rows][Tokens];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) acc[r][m] = vfloat{};
  const T* a[Tokens];
#pragma GCC unroll 8
  for (int m = 0; m < Tokens; ++m) a[m] = x[m];
  int64_t k = part.begin;
  for (; k + kStep <= part.end; k += kStep) {
    typename Lanes<T>::Vector weights[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) weights[r] = Lanes<T>::read(w + r * depth + k);
    if (Fetch)
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) __builtin_prefetch(ahead + r * depth + (k - part.begin), 0, 2);
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
      const typename Lanes<T>::Vector v = Lanes<T>::read(a[m] + k);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) Lanes<T>::add(acc[r][m], weights[r], v);
    }
  }
  const bool add = part.begin > 0;
#pragma GCC unroll 8
  for (int m = 0; m < Tokens; ++m) {
    vfloat column[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) column[r] = acc[r][m];
    store_sums<Rows>(column, out + m * out_stride, add);
  }
  for (; k < part.end; ++k)
    for (int m = 0; m < Tokens; ++m)
      for (int r = 0; r < Rows; ++r) out[m * out_stride + r] += to_float(w[r * depth + k]) * to_float(a[m][k]);
}

template <typename T>
using DotTile = void (*)(const T*, Part, const T* const*, float*, int64_t, const T*);

template <typename T, int Rows, bool Fetch>
inline DotTile<T> dot_tile_of(int64_t tokens) {
  constexpr int kFive = kDotTokens < 5 ? 4 : 5, kSix = kDotTokens < 6 ? 4 : 6;
  static const DotTile<T> kTiles[6] = {
      dot_tile<T, Rows, 1, Fetch>, dot_tile<T, Rows, 2, Fetch>,     dot_tile<T, Rows, 3, Fetch>,
      dot_tile<T, Rows, 4, Fetch>, dot_tile<T, Rows, kFive, Fetch>, dot_tile<T, Rows, kSix, Fetch>};
  return kTiles[tokens - 1];
}

// out[m * out_stride + r] = w[r] . x[m] for `rows` rows of w [rows, depth] and `count` activations. `next` is what will be
// read after w.
template <typename T>
struct Dots {
  const T* w;
  int64_t rows, depth;
  const T* const* x;
  int64_t count;
  float* out;
  int64_t out_stride;
  const T* next;

  int64_t num_tiles() const { return (count + kDotTokens - 1) / kDotTokens; }
  int64_t first_of(int64_t tile) const { return tile * (count / num_tiles()) + std::min(tile, count % num_tiles()); }

  // Rows [r, r + kDotRows), or row r alone where fewer are left.
  void tile(int64_t r, int64_t t, Part part, const T* ahead) const {
    const int64_t m = first_of(t), tokens = first_of(t + 1) - m;
    const DotTile<T> function = r + kDotRows > rows ? dot_tile_of<T, 1, false>(tokens)
                                : ahead             ? dot_tile_of<T, kDotRows, true>(tokens)
                                                    : dot_tile_of<T, kDotRows, false>(tokens);
    function(w + r * depth, part, x + m, out + m * out_stride + r, out_stride, ahead);
  }

  int64_t after(int64_t r) const { return r + kDotRows <= rows ? r + kDotRows : r + 1; }

  // Few activations: whole rows one after another, as memory gives them.
  void stream() const {
    constexpr int64_t kPart = kPartSteps * Lanes<T>::kElements;
    for (int64_t r = 0; r < rows; r = after(r)) {
      const T* ahead = r + 2 * kDotRows <= rows ? w + (r + kDotRows) * depth : next;
      for (int64_t t = 0; t < num_tiles(); ++t)
        for (int64_t k = 0; k < depth; k += kPart)
          tile(r, t, {depth, k, std::min(depth, k + kPart)}, t == 0 ? ahead + k : nullptr);
    }
  }

  // Many: a part of a few activations stays in L1 while the rows of that part come by from L2, where they were fetched to
  // during the part before.
  void block() const {
    constexpr int64_t kPart = kPartSteps * Lanes<T>::kElements;
    const int64_t tiles = num_tiles();
    for (int64_t k = 0; k < depth; k += kPart) {
      const Part part{depth, k, std::min(depth, k + kPart)};
      const T* ahead = k + kPart < depth ? w + k + kPart : next;
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t r = 0; r < rows; r = after(r))
          tile(r, t, part, r / kDotRows % tiles == t ? ahead + r * depth : nullptr);
    }
  }

  void run() const { num_tiles() < kBlockTiles ? stream() : block(); }
};

}  // namespace moe
}  // namespace hfa
