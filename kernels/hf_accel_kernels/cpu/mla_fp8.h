// float8_e4m3fn (4 exponent bits, 3 of mantissa, no infinity) to and from fp32, as torch converts it.
#pragma once
#include "attention_simd.h"

namespace {
namespace mla {
using namespace simd;

// W values. The bits are those of an fp16 of 2^-8 the value, but for NaN.
HFA_INLINE vf load_fp8(const uint8_t* p) {
  uint16_t half[W];
  for (int i = 0; i < W; ++i) half[i] = uint16_t((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7);
  const vf x = load(reinterpret_cast<const fp16*>(half)) * set1(256.f);
  const vf nan = set1(__builtin_nanf(""));
  return ((x == set1(480.f)) | (x == set1(-480.f))) ? nan : x;
}

HFA_INLINE float fp8_to_float(uint8_t x) {
  if ((x & 0x7f) == 0x7f) return __builtin_nanf("");
  return to_float(fp16{uint16_t((x & 0x80) << 8 | (x & 0x7f) << 7)}) * 256.f;
}

// Round to nearest even; beyond 464 in magnitude (where the next value would be 480) and for NaN: NaN.
inline uint8_t float_to_fp8(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint8_t sign = uint8_t(u >> 24 & 0x80);
  u &= 0x7fffffff;
  if (u > 0x43e80000) return sign | 0x7f;
  if (u < 0x3c800000) {  // below 2^-6: let the adder round to multiples of 2^-9
    float f;
    memcpy(&f, &u, 4);
    f += 16384.f;
    memcpy(&u, &f, 4);
    return uint8_t(sign | (u - 0x46800000));
  }
  return uint8_t(sign | ((u - 0x3c000000 + 0x7ffff + (u >> 20 & 1)) >> 20));
}

}  // namespace mla
}  // namespace
