// float16 beside simd.h's float32 and bfloat16, and the gate's activations on vectors. Knows nothing of experts.
#pragma once
#include <cmath>
#include <type_traits>

#include "moe.h"
#include "simd.h"

#if defined(__AVX512F__) || defined(__F16C__) || defined(__FLT16_MAX__)
#define HFA_HALF 1
#endif

namespace hfa {
namespace moe {

using hfa::load;
using hfa::store;
using hfa::to_float;

struct half {
  uint16_t bits;
};

#if defined(HFA_HALF)
inline vfloat load(const half* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  _Float16 h[kWidth];
  vfloat v;
  std::memcpy(h, p, sizeof h);
  for (int i = 0; i < kWidth; ++i) v[i] = float(h[i]);
  return v;
#endif
}

// Round to nearest even.
inline void store(half* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  _Float16 h[kWidth];
  for (int i = 0; i < kWidth; ++i) h[i] = _Float16(v[i]);
  std::memcpy(p, h, sizeof h);
#endif
}

inline float to_float(half x) {
  half h[kWidth] = {x};
  return load(h)[0];
}

#endif

// The value a tensor of type T would hold.
template <typename T>
inline vfloat held(vfloat v) {
  if constexpr (std::is_same<T, float>::value || std::is_same<T, bf16>::value) return rounded<T>(v);
  T lanes[kWidth];
  store(lanes, v);
  return load(lanes);
}

inline vfloat sigmoid(vfloat x) { return 1.f / (1.f + exp(-x)); }

inline vfloat activate(int32_t activation, vfloat x) {
  switch (activation) {
    case HFA_MOE_SILU:
      return x / (1.f + exp(-x));
    case HFA_MOE_GELU_TANH:  // 0.5 x (1 + tanh u) = x sigmoid(2 u)
      return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case HFA_MOE_GELU:
      for (int i = 0; i < kWidth; ++i) x[i] *= 0.5f * std::erfc(-x[i] * 0.70710678118654752f);
      return x;
    default:
      return x > 0.f ? x : x * 0.f;  // a NaN stays one
  }
}

// round(round(act(gate)) * up) of values that T holds.
template <typename T>
inline vfloat gated(int32_t activation, vfloat gate, vfloat up) {
  return held<T>(held<T>(activate(activation, gate)) * up);
}

}  // namespace moe
}  // namespace hfa
