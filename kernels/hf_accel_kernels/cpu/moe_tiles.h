// bfloat16 products through matrix tiles (AMX): row-major weights are one operand as they lie, 16 rows x 32 columns a
// tile, and only the activations are packed (pairs along K beside each other, 16 tokens a tile). Sums come out transposed,
// [weight row][token], which is the packed order of the next product.
#pragma once
#include "moe_elements.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HFA_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

namespace hfa {
namespace moe {

constexpr int64_t kTile = 16;        // rows of weights, or tokens, of one tile
constexpr int64_t kTileDepth = 32;   // elements along K
constexpr int64_t kTileSize = 512;   // elements of a packed tile [16 pairs][16 tokens][2]

// Whether the system lets this process use the tiles (Linux asks for a permission once).
inline bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return allowed;
}

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {};
  uint8_t rows[16] = {};

  // Accumulators 0..3 and weights 4, 5 have `weight_rows` rows; activations 6, 7 have 16 pairs.
  explicit TileConfig(int64_t weight_rows) {
    for (int i = 0; i < 8; ++i) columns[i] = 64, rows[i] = uint8_t(i < 6 ? weight_rows : 16);
  }
};

inline int64_t tile_steps(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

// Lane l of out[i] is lane i of in[l], 32 bits each.
inline void transpose(__m512i (&v)[16]) {
  for (int s = 1; s < 16; s *= 2) {
    alignas(64) int32_t low[16], high[16];
    for (int l = 0; l < 16; ++l) {
      low[l] = l & s ? 16 + l - s : l;
      high[l] = l & s ? 16 + l : l + s;
    }
    const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & s) continue;
      const __m512i a = v[i], b = v[i + s];
      v[i] = _mm512_permutex2var_epi32(a, first, b);
      v[i + s] = _mm512_permutex2var_epi32(a, second, b);
    }
  }
}

// 16 activations x[m] [depth] (null: zeros) to tiles out [steps][16 pairs][16 tokens][2], zero beyond depth.
inline void pack_tokens(const bf16* const* x, int64_t depth, bf16* out) {
  for (int64_t k = 0; k < depth; k += kTileDepth, out += kTileSize) {
    const __mmask32 mask = depth - k >= kTileDepth ? ~0u : (1u << (depth - k)) - 1;
    __m512i v[16];
    for (int m = 0; m < 16; ++m) v[m] = x[m] ? _mm512_maskz_loadu_epi16(mask, x[m] + k) : _mm512_setzero_si512();
    transpose(v);
    for (int p = 0; p < 16; ++p) _mm512_storeu_si512(out + 32 * p, v[p]);
  }
}

// The last columns of `rows` rows of w, zero beyond `columns`.
inline void copy_tail(const bf16* w, int64_t stride, int64_t rows, int64_t columns, bf16* out) {
  const __mmask32 mask = (1u << columns) - 1;
  for (int64_t r = 0; r < rows; ++r)
    _mm512_storeu_si512(out + r * kTileDepth, _mm512_maskz_loadu_epi16(mask, w + r * stride));
}

// Asks for two stretches of memory that come next, evenly over the steps of the products that run meanwhile: in the order
// of the addresses, which the hardware's own prefetcher follows.
struct Fetch {
  const char *first, *second;
  int64_t period;  // steps to a kilobyte of each
  int64_t wait = 1;

  Fetch(const bf16* first, const bf16* second, int64_t period)
      : first(reinterpret_cast<const char*>(first)), second(reinterpret_cast<const char*>(second)), period(period) {}

  __attribute__((always_inline)) void step() {
    if (--wait) return;
    wait = period;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) __builtin_prefetch(first + 64 * i, 0, 2), __builtin_prefetch(second + 64 * i, 0, 2);
    first += 1024;
    second += 1024;
  }
};

// The tile loads are opaque to the compiler: whatever it holds back must be in memory first.
__attribute__((always_inline)) inline void settle_memory() { asm volatile("" ::: "memory"); }

inline void configure(int64_t weight_rows) {
  const TileConfig config(weight_rows);
  settle_memory();
  _tile_loadconfig(&config);
}

// sums[2 i + j] [16 rows][16 tokens] = weights i (16 rows at w[i], `stride` apart) times the packed token group j, for two
// of each, or one group with Both = false. `rows` <= 16 is what the tiles are configured for.
template <bool Both>
void tile_products(const bf16* const (&w)[2], int64_t stride, int64_t rows, int64_t depth, const bf16* const (&x)[2],
                   float (*sums)[256], Fetch& fetch) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const bf16 *first = x[0], *second = x[1];
  const int64_t bytes = 2 * stride;
  int64_t k = 0;
  settle_memory();
  for (; k + kTileDepth <= depth; k += kTileDepth, first += kTileSize, second += kTileSize) {
    fetch.step();
    _tile_loadd(4, w[0] + k, bytes);
    _tile_loadd(6, first, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w[1] + k, bytes);
    _tile_dpbf16ps(2, 5, 6);
    if (Both) {
      _tile_loadd(7, second, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  if (k < depth) {
    alignas(64) bf16 tail[2][kTileSize];
    for (int i = 0; i < 2; ++i) copy_tail(w[i] + k, stride, rows, depth - k, tail[i]);
    settle_memory();
    _tile_loadd(4, tail[0], 64);
    _tile_loadd(5, tail[1], 64);
    _tile_loadd(6, first, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (Both) {
      _tile_loadd(7, second, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(2, sums[2], 64);
  if (Both) {
    _tile_stored(1, sums[1], 64);
    _tile_stored(3, sums[3], 64);
  }
}

}  // namespace moe
}  // namespace hfa
#endif
