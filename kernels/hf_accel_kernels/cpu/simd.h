// Vectors of a compile-time width and bfloat16 conversions, for all CPU kernels of this folder. GCC lowers the generic
// form to whatever the target has; intrinsics appear only where the generic form is slow, under #ifdef.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hfa {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a vector
constexpr int kPanelVectors = 4;
constexpr int kTileRows = 6;  // 6 x 4 accumulators, 4 weights, 1 activation: 29 of 32 registers
#else
constexpr int kWidth = 8;
constexpr int kPanelVectors = 2;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 weights, 1 activation: 15 of 16 registers
#endif
constexpr int kPanel = kWidth * kPanelVectors;  // columns of one packed panel

typedef float vfloat __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t vuint __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint16_t vhalf __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat*>(p); }
inline void store(float* p, vfloat v) { *reinterpret_cast<vfloat*>(p) = v; }
inline vfloat splat(float x) { return x - vfloat{}; }

inline vfloat load(const bf16* p) {
  vhalf h = *reinterpret_cast<const vhalf*>(p);
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}

// Round to nearest even; a NaN stays a NaN.
inline void store(bf16* p, vfloat v) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  vuint u = (vuint)v;
  vuint rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  vuint nan = (vuint)(v != v);
  rounded = (rounded & ~nan) | (((u >> 16) | 0x40) & nan);
  *reinterpret_cast<vhalf*>(p) = __builtin_convertvector(rounded, vhalf);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  out->bits = x != x ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

// The value a tensor of type T would hold.
template <typename T>
inline vfloat rounded(vfloat v);
template <>
inline vfloat rounded<float>(vfloat v) {
  return v;
}
template <>
inline vfloat rounded<bf16>(vfloat v) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)), 16);
#endif
  vuint u = (vuint)v;
  vuint r = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000u;
  vuint nan = (vuint)(v != v);
  return (vfloat)((r & ~nan) | (u & nan));
}

template <typename T>
inline float rounded(float x) {
  T y;
  from_float(x, &y);
  return to_float(y);
}

inline float sum(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < kWidth; ++i) s += v[i];
  return s;
#endif
}

// exp(x), relative error below 2e-7 for |x| <= 87; clamped beyond (no infinities).
inline vfloat exp(vfloat x) {
  vfloat low = splat(-87.3f), high = splat(88.3f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  vfloat t = x * 1.44269504088896341f;
  vint n = __builtin_convertvector(t + (t < 0.f ? splat(-0.5f) : splat(0.5f)), vint);
  vfloat fn = __builtin_convertvector(n, vfloat);
  vfloat r = x - fn * 0.693359375f + fn * 2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return (vfloat)((vint)p + (n << 23));
}

}  // namespace hfa
