// What this core can do at best: bytes read per second from memory, fp32 multiply-adds per second, bf16 products.
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));

extern "C" float probe_read(const float* p, int64_t n) {
  vf s[8] = {};
  for (int64_t i = 0; i + 8 * W <= n; i += 8 * W)
    for (int j = 0; j < 8; ++j) { vf x; memcpy(&x, p + i + j * W, sizeof x); s[j] += x; }
  float total = 0;
  for (int j = 0; j < 8; ++j) for (int i = 0; i < W; ++i) total += s[j][i];
  return total;
}

// Returns the floating point operations done.
extern "C" double probe_fma(int64_t rounds, float* sink) {
  vf a[12], x = vf{} + *sink, y = vf{} + 0.5f;
  for (int j = 0; j < 12; ++j) a[j] = vf{} + float(j);  // all different, or the compiler computes one for all
  for (int64_t r = 0; r < rounds; ++r) {
    for (int j = 0; j < 12; ++j) a[j] = a[j] * y + x;
    asm volatile("" : "+x"(x));
  }
  for (int j = 0; j < 12; ++j) *sink += a[j][0];
  return 2.0 * W * 12 * double(rounds);
}

// The same with bf16 tile products; 0 where there is no tile unit. The process has been lent the tile registers.
extern "C" double probe_bf16_tiles(int64_t rounds, float* sink) {
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
  alignas(64) unsigned char config[64] = {1};
  for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
  asm volatile("" : : "r"(config) : "memory");  // the intrinsic does not say that all of it is read
  _tile_loadconfig(config);
  for (int64_t r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  *sink += 1;
  return 4.0 * 2 * 16 * 16 * 32 * double(rounds);
#else
  (void)rounds; (void)sink;
  return 0;
#endif
}

// The same with bf16 pair dot products; 0 where the processor has none.
extern "C" double probe_bf16_dot(int64_t rounds, float* sink) {
#if defined(__AVX512BF16__)
  __m512 a[12];
  for (int j = 0; j < 12; ++j) a[j] = _mm512_set1_ps(float(j));
  __m512bh x = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int j = 0; j < 12; ++j) a[j] = _mm512_dpbf16_ps(a[j], x, x);
    asm volatile("" : "+x"(x));
  }
  for (int j = 0; j < 12; ++j) *sink += a[j][0];
  return 2.0 * 32 * 12 * double(rounds);
#else
  (void)rounds; (void)sink;
  return 0;
#endif
}
