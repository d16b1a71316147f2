// Vectors for the attention kernels: one source for AVX512, AVX2 and NEON by GCC/clang vector extensions, the width
// chosen at compile time. Owns loads with conversion, exp2, tanh, lane transposes. Knows nothing about attention.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define HFA_INLINE inline __attribute__((always_inline))

namespace {
namespace simd {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HFA_AVX512 1
constexpr int W = 16;       // floats in a vector
constexpr int NUM_REGS = 32;
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int NUM_REGS = 16;
#else
constexpr int W = 4;        // NEON, SSE
#if defined(__aarch64__)
constexpr int NUM_REGS = 32;
#else
constexpr int NUM_REGS = 16;
#endif
#endif
#if defined(HFA_AVX512) && defined(__AVX512BF16__)
#define HFA_BF16_DOT 1
#endif
#if defined(HFA_BF16_DOT) && defined(__AMX_BF16__)
#define HFA_SLOW_BF16_DOT 1  // Intel: one every other cycle, half the products of the two fused multiply-adds of each cycle
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));       // W half-width elements
typedef uint16_t vh2 __attribute__((vector_size(W * 4)));      // 2W half-width elements

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

HFA_INLINE vf set1(float x) { return x - vf{}; }  // 0 + x would be a real addition: it turns -0 into 0
HFA_INLINE vf zero() { return vf{}; }
HFA_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted by the compiler
template <class V, class P> HFA_INLINE V loadu(const P* p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V, class P> HFA_INLINE void storeu(P* p, V v) { memcpy(p, &v, sizeof v); }
HFA_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }

// ---- element types -> fp32 lanes ----
HFA_INLINE float to_float(float x) { return x; }
HFA_INLINE float to_float(bf16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; memcpy(&f, &u, 4); return f; }
inline float to_float(fp16 h) {
  uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = uint32_t(h.bits & 0x7fff) << 13, u;
  float f;
  if (rest >= 0x0f800000) { u = sign | (rest + 0x70000000); memcpy(&f, &u, 4); return f; }  // inf, nan
  memcpy(&f, &rest, 4);
  f *= 5.192296858534828e33f;  // 2^112: moves the exponent's bias; right for subnormals too
  memcpy(&u, &f, 4); u |= sign; memcpy(&f, &u, 4);
  return f;
}
inline fp16 from_float(float x) {
  uint32_t u; memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000; u &= 0x7fffffff;
  if (u > 0x7f800000) return fp16{uint16_t(sign | 0x7e00)};
  if (u >= 0x477ff000) return fp16{uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (u < 0x38800000) {                                       // subnormal: let the adder round
    float f; memcpy(&f, &u, 4); f += 0.5f; memcpy(&u, &f, 4);
    return fp16{uint16_t(sign | (u - 0x3f000000))};
  }
  return fp16{uint16_t(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13))};
}

HFA_INLINE vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }  // bf16 bits
HFA_INLINE vf load(const float* p) { return loadu<vf>(p); }
HFA_INLINE vf load(const bf16* p) { return widen(loadu<vh>(p)); }
HFA_INLINE vf load(const fp16* p) {
#if defined(HFA_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  typedef __fp16 half4 __attribute__((vector_size(8)));
  return __builtin_convertvector(loadu<half4>(p), vf);
#else
  vf v; for (int i = 0; i < W; ++i) v[i] = to_float(p[i]); return v;
#endif
}
// The first n (0 <= n <= W) elements, the rest zero; reads nothing beyond them.
template <class T> HFA_INLINE vf load_n(const T* p, int n) {
  if (n >= W) return load(p);
#if defined(HFA_AVX512)
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return (vf)_mm512_maskz_loadu_ps(mask, p);
  else if constexpr (std::is_same_v<T, bf16>) return widen((vh)_mm256_maskz_loadu_epi16(mask, p));
  else return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
#else
  T tmp[W]; memset(tmp, 0, sizeof tmp); memcpy(tmp, p, size_t(n) * sizeof(T)); return load(tmp);
#endif
}
HFA_INLINE void store(float* p, vf v) { storeu(p, v); }
HFA_INLINE void store(bf16* p, vf v) {
#if defined(HFA_BF16_DOT)
  storeu(p, _mm512_cvtneps_pbh((__m512)v));
#else
  const vu u = (vu)v, rounded = u + 0x7fff + ((u >> 16) & 1);
  storeu(p, __builtin_convertvector((v != v ? u | 0x400000 : rounded) >> 16, vh));
#endif
}
HFA_INLINE void store(fp16* p, vf v) {
#if defined(HFA_AVX512)
  storeu(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  storeu(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i] = from_float(v[i]);
#endif
}
template <class T> HFA_INLINE void store_n(T* p, vf v, int n) {
  if (n >= W) return store(p, v);
  T all[W];
  store(all, v);
  memcpy(p, all, size_t(n) * sizeof(T));
}

// ---- shuffles between two vectors, written as a rule lane -> source lane (>= N: of the second) ----
template <class Rule, class V, size_t... I> HFA_INLINE V shuffle_impl(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, Rule::at(int(I))...);
}
template <class Rule, int N, class V> HFA_INLINE V shuffle(V a, V b) {
  return shuffle_impl<Rule>(a, b, std::make_index_sequence<N>{});
}
template <int H> struct TakeLow { static constexpr int at(int i) { return (i & H) ? W + i - H : i; } };
template <int H> struct TakeHigh { static constexpr int at(int i) { return (i & H) ? W + i : i + H; } };
template <int H> struct Own { static constexpr int at(int i) { return (i & H) ? W + i : i; } };
template <int H> struct Other { static constexpr int at(int i) { return (i & H) ? W + (i ^ H) : (i ^ H); } };
template <int B> struct Zip { static constexpr int at(int i) { return (i & 1) * W + i / 2 + B; } };
struct PairsLow { static constexpr int at(int i) { return (i & 1) ? 2 * W + i / 2 : i / 2; } };
struct PairsHigh { static constexpr int at(int i) { return ((i & 1) ? 2 * W + i / 2 : i / 2) + W; } };

// r: W vectors as the rows of a W x W matrix of 32-bit words, transposed in place.
template <int H, class V> HFA_INLINE void transpose_stage(V* r) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & H)) {
      const V a = r[i], b = r[i + H];
      r[i] = shuffle<TakeLow<H>, W>(a, b);
      r[i + H] = shuffle<TakeHigh<H>, W>(a, b);
    }
}
template <class V> HFA_INLINE void transpose(V* r) {
  transpose_stage<1>(r);
  transpose_stage<2>(r);
  if constexpr (W >= 8) transpose_stage<4>(r);
  if constexpr (W >= 16) transpose_stage<8>(r);
}
// Lane i of the result is the sum of r[i]'s lanes.
template <int H> HFA_INLINE vf sum_pair(vf a, vf b) { return shuffle<Own<H>, W>(a, b) + shuffle<Other<H>, W>(a, b); }
template <int H> HFA_INLINE void sum_stage(vf* r) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 2 * H) r[i] = sum_pair<H>(r[i], r[i + H]);
}
HFA_INLINE vf sum_each(vf* r) {
  sum_stage<1>(r);
  sum_stage<2>(r);
  if constexpr (W >= 8) sum_stage<4>(r);
  if constexpr (W >= 16) sum_stage<8>(r);
  return r[0];
}
template <int H> HFA_INLINE vf swap(vf v) { return shuffle<Other<H>, W>(v, v); }  // lane i gets lane i ^ H
HFA_INLINE float sum(vf v) {
  if constexpr (W >= 16) v += swap<8>(v);
  if constexpr (W >= 8) v += swap<4>(v);
  v += swap<2>(v);
  v += swap<1>(v);
  return v[0];
}
HFA_INLINE float max_lane(vf v) {
  if constexpr (W >= 16) v = maximum(v, swap<8>(v));
  if constexpr (W >= 8) v = maximum(v, swap<4>(v));
  v = maximum(v, swap<2>(v));
  v = maximum(v, swap<1>(v));
  return v[0];
}

// ---- functions ----
// For x <= 127: relative error < 2e-7 (DEGREE 6) or 5e-6 (DEGREE 4); 0 below -126; NaN stays NaN.
template <int DEGREE = 6> HFA_INLINE vf exp2(vf x) {
  constexpr bool full = DEGREE == 6;
#if defined(HFA_AVX512)
  const __mmask16 large = _mm512_cmp_ps_mask((__m512)x, (__m512)set1(-126.f), _CMP_NLT_UQ);  // underflow takes an assist
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - n;
#else
  const vf magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const vf t = x + magic, f = x - (t - magic);
#endif
  vf p;
  if constexpr (full) {
    p = fma(set1(1.5403530e-4f), f, set1(1.33335581e-3f));
    p = fma(p, f, set1(9.61812911e-3f));
  } else {
    p = set1(9.60043e-3f);
  }
  p = fma(p, f, set1(full ? 5.55041087e-2f : 5.591708e-2f));
  p = fma(p, f, set1(full ? 2.40226507e-1f : 2.4023719e-1f));
  p = fma(p, f, set1(full ? 6.93147181e-1f : 6.9312197e-1f));
  p = fma(p, f, set1(1.f));
#if defined(HFA_AVX512)
  return (vf)_mm512_maskz_scalef_ps(large, (__m512)p, (__m512)n);
#else
  const vf e = x != x ? x : (vf)((vi)p + (vi)((vu)(vi)t << 23));
  return x < set1(-126.f) ? zero() : e;
#endif
}
HFA_INLINE vf tanh(vf x) {  // odd polynomial near 0 (Cephes), else 1 - 2/(exp(2|x|) + 1)
  const vf z = x * x, ax = x < zero() ? -x : x;
  vf p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const vf small = fma(p * z, x, x);
  const vf power = ax < set1(20.f) ? ax * set1(2.8853900817779268f) : set1(57.7f);
  const vf far = ax != ax ? ax : set1(1.f) - set1(2.f) / (exp2(power) + set1(1.f));
  const vf large = x < zero() ? -far : far;
  return ax < set1(0.625f) ? small : large;
}

// Into the second-level cache: it has more misses in flight than the first, measured 1.5 to 1.8 times the bytes per second.
HFA_INLINE void prefetch(const void* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

}  // namespace simd
}  // namespace
