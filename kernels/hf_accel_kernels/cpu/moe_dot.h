// Products with row-major weights as dot products: a few rows of W times a few activations at once, so that each row is
// read from memory once and, with many activations, the arithmetic is the limit. The sum of one output has one order,
// whatever runs beside it.
#pragma once
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

// out[m * out_stride + r] = sum over K of w[r * depth + k] x[m][k], rows r < Rows and activations m < Tokens. With Fetch
// the same columns of the Rows rows at `ahead` are asked for on the way.
template <typename T, int Rows, int Tokens, bool Fetch>
void dot_tile(const T* w, int64_t depth, const T* const* x, float* out, int64_t out_stride, const T* ahead) {
  constexpr int kStep = Lanes<T>::kElements;
  vfloat acc[Rows][Tokens];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) acc[r][m] = vfloat{};
  const T* a[Tokens];
#pragma GCC unroll 8
  for (int m = 0; m < Tokens; ++m) a[m] = x[m];
  int64_t i = 0;
  for (; i + kStep <= depth; i += kStep) {
    typename Lanes<T>::Vector weights[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) weights[r] = Lanes<T>::read(w + r * depth + i);
    if (Fetch)
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) __builtin_prefetch(ahead + r * depth + i, 0, 2);
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
      const typename Lanes<T>::Vector v = Lanes<T>::read(a[m] + i);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) Lanes<T>::add(acc[r][m], weights[r], v);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Tokens; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) out[m * out_stride + r] = sum(acc[r][m]);
  for (; i < depth; ++i)
    for (int m = 0; m < Tokens; ++m)
      for (int r = 0; r < Rows; ++r) out[m * out_stride + r] += to_float(w[r * depth + i]) * to_float(a[m][i]);
}

template <typename T>
using DotTile = void (*)(const T*, int64_t, const T* const*, float*, int64_t, const T*);

template <typename T, int Rows, bool Fetch>
inline DotTile<T> dot_tile_of(int64_t tokens) {
  static const DotTile<T> kTiles[6] = {dot_tile<T, Rows, 1, Fetch>, dot_tile<T, Rows, 2, Fetch>,
                                       dot_tile<T, Rows, 3, Fetch>, dot_tile<T, Rows, 4, Fetch>,
                                       dot_tile<T, Rows, kDotTokens < 5 ? 4 : 5, Fetch>,
                                       dot_tile<T, Rows, kDotTokens < 6 ? 4 : 6, Fetch>};
  return kTiles[tokens - 1];
}

// out[m * out_stride + r] = w[r] . x[m] for `rows` rows of w [rows, depth] and `count` activations. `next` is what will be
// read after w.
template <typename T>
void dots(const T* w, int64_t rows, int64_t depth, const T* const* x, int64_t count, float* out, int64_t out_stride,
          const T* next) {
  const int64_t tiles = (count + kDotTokens - 1) / kDotTokens;
  for (int64_t r = 0; r < rows;) {
    const bool whole = r + kDotRows <= rows;
    const T* ahead = r + 2 * kDotRows <= rows ? w + (r + kDotRows) * depth : next;
    for (int64_t t = 0, m = 0; t < tiles; ++t) {
      const int64_t tokens = count / tiles + (t < count % tiles);
      const DotTile<T> tile = !whole      ? dot_tile_of<T, 1, false>(tokens)
                              : t == 0 ? dot_tile_of<T, kDotRows, true>(tokens)
                                       : dot_tile_of<T, kDotRows, false>(tokens);
      tile(w + r * depth, depth, x + m, out + m * out_stride + r, out_stride, ahead);
      m += tokens;
    }
    r += whole ? kDotRows : 1;
  }
}

}  // namespace moe
}  // namespace hfa
