// What the AMX prefill needs before its products: the permission and the shape of the tile registers, a block's buffers,
// and the packing of queries, keys and values into tiles.
#pragma once
#include "attention_tile.h"

#if defined(HFA_BF16_DOT) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HFA_AMX 1
#include <sys/syscall.h>
#include <unistd.h>


namespace {
namespace attn {

constexpr int AMX_BLOCK_ROWS = 512;
constexpr int AMX_RUN = 512;          // keys whose values are packed at once
constexpr int AMX_TILE = MAX_TILE;    // keys between two updates of the running softmax
constexpr int TILE_WORDS = 256;       // of 32 bits: 16 rows of 64 bytes
constexpr int TILE_ROW_BYTES = 64;
constexpr int VALUE_STEPS = AMX_TILE / 32;
static_assert(AMX_RUN % AMX_TILE == 0 && AMX_TILE % 32 == 0 && W == 16);

// The kernel lends the tile registers to a process that asks; 18 is XFEATURE_XTILEDATA.
inline bool amx_permitted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return permitted;
}

// All eight registers 16 x 64 bytes while it lives.
class TileConfig {
 public:
  TileConfig() {
    // Static: the intrinsic tells the compiler of 8 of the 64 bytes it reads, stores to the others could be dropped.
    static constexpr struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config{};
    _tile_loadconfig(&config);
  }
  ~TileConfig() { _tile_release(); }
};

// The tile intrinsics do not tell the compiler which memory they read.
HFA_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

struct AmxBuffers {
  int64_t q_steps;      // tiles along head_dim
  int64_t value_tiles;  // tiles along v_head_dim, even
  uint32_t* q;  // [row tiles][q_steps] tiles: 16 pairs along head_dim x 16 rows
  uint32_t* v;  // [tiles of keys][value_tiles][VALUE_STEPS] tiles: 16 columns x 16 pairs of keys
  uint32_t* k;  // [tiles of 16 keys][q_steps] tiles: 16 keys x 16 pairs along head_dim
  float* acc;   // [row tiles][value_tiles] tiles: 16 columns x 16 rows
  float* s;     // [2 units][2 row tiles][AMX_TILE][16]
  uint32_t* p;  // [2 units][2 row tiles][AMX_TILE / 2][16] pairs of keys
  int* position;  // [rows] of the row's token in its sequence
};

inline AmxBuffers take_amx_buffers(const HfaAttentionArgs& a, int64_t num_rows, Scratch& scratch) {
  AmxBuffers buf;
  const int64_t row_tiles = round_up(num_rows, 16) / 16;
  buf.q_steps = round_up(a.head_dim, 32) / 32;
  buf.value_tiles = round_up(a.v_head_dim, 32) / 16;
  buf.q = scratch.take<uint32_t>(row_tiles * buf.q_steps * TILE_WORDS);
  buf.v = scratch.take<uint32_t>(AMX_RUN / AMX_TILE * buf.value_tiles * VALUE_STEPS * TILE_WORDS);
  buf.k = scratch.take<uint32_t>(AMX_RUN / 16 * buf.q_steps * TILE_WORDS);
  buf.acc = scratch.take<float>(row_tiles * buf.value_tiles * TILE_WORDS);
  buf.s = scratch.take<float>(4 * AMX_TILE * 16);
  buf.p = scratch.take<uint32_t>(2 * AMX_TILE * 16);
  buf.position = scratch.take<int>(row_tiles * 16);
  return buf;
}

inline int64_t amx_scratch_bytes(const HfaAttentionArgs& a) {
  const int64_t rows = round_up(std::max<int64_t>(AMX_BLOCK_ROWS, a.num_heads / a.num_kv_heads), 16);
  const int64_t k_width = round_up(a.head_dim, 32), v_width = round_up(a.v_head_dim, 32);
  return (rows + AMX_RUN) * (k_width * 2 + v_width * 4) + AMX_TILE * 16 * 24 + rows * 4 + 7 * 64;
}

// Sixteen rows of bf16 -> tiles of 16 pairs x 16 rows, zeros beyond num_columns; null rows are zero.
inline void pack_pairs(const bf16* const* from, int num_columns, uint32_t* to) {
  for (int c = 0; c < num_columns; c += 32, to += TILE_WORDS) {
    vu r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = from[i] ? Bf16Pairs::load_words_n(from[i] + c, std::min(32, num_columns - c)) : vu{};
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) storeu(to + i * 16, r[i]);
  }
}

inline void pack_amx_queries(const HfaAttentionArgs& a, const Block& b, int num_rows, AmxBuffers& buf) {
  const int group = a.num_heads / a.num_kv_heads;
  for (int r0 = 0; r0 < num_rows; r0 += 16) {
    const bf16* from[16];
    for (int i = 0; i < 16; ++i) {
      const int r = r0 + i;
      from[i] = r >= num_rows ? nullptr
                              : static_cast<const bf16*>(a.q) + (b.first_token + r / group) * a.q_token_stride +
                                    (int64_t(b.kv_head) * group + r % group) * a.q_head_stride;
      buf.position[r] = b.first_position + std::min(r, num_rows - 1) / group;
    }
    pack_pairs(from, a.head_dim, buf.q + r0 / 16 * buf.q_steps * TILE_WORDS);
  }
}

// A tile of values -> tiles of 16 columns x 16 pairs of keys. Keys beyond the last are zero: 0 * NaN would be one.
inline void pack_amx_values(const Rows<bf16>& rows, int v_head_dim, uint32_t* tile) {
  for (int step = 0; step * 32 < rows.count; ++step)
    for (int c = 0; c < v_head_dim; c += 32) {
      const int num_columns = std::min(32, v_head_dim - c);
      const auto row = [&](int t) {
        return t < rows.count ? Bf16Pairs::load_words_n(rows.v[t] + c, num_columns) : vu{};
      };
      for (int half = 0; half < 2; ++half) {  // columns 8*(j/4) + 4*half + j%4
        vu r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const __m512i even = (__m512i)row(step * 32 + 2 * i), odd = (__m512i)row(step * 32 + 2 * i + 1);
          r[i] = (vu)(half ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd));
        }
        transpose(r);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          const int column = 8 * (j / 4) + 4 * half + j % 4;
          storeu(tile + ((c / 16 + column / 16) * VALUE_STEPS + step) * TILE_WORDS + column % 16 * 16, r[j]);
        }
      }
    }
}

// A tile of keys -> tiles of 16 keys x 16 pairs: a product that streams them finds them side by side.
inline void pack_amx_keys(const Rows<bf16>& rows, int head_dim, int64_t q_steps, uint32_t* to) {
  for (int t = 0; t < round_up(rows.count, 16); ++t)
    for (int c = 0; c < head_dim; c += 32)
      storeu(to + (t / 16 * q_steps + c / 32) * TILE_WORDS + t % 16 * 16,
             Bf16Pairs::load_words_n(rows.k[t] + c, std::min(32, head_dim - c)));
}

// Fetches the keys and values of a sequence's first block ahead of their packing, row by row; later blocks find them near.
class Fetcher {
 public:
  Fetcher(const HfaAttentionArgs& a, const Block& b)
      : a_(a), b_(b), next_(b.first_token == a.query_start_loc[b.seq] ? b.key_begin : b.key_end), tile_(next_) {}
  int next() const { return next_; }
  void until(int key) {
    for (key = std::min(key, b_.key_end); next_ < key; ++next_) {
      if (next_ >= tile_ + rows_.count) {
        tile_ = next_;
        rows_.resolve(a_, b_, tile_, std::min(b_.key_end, tile_ + AMX_TILE));
      }
      prefetch(rows_.k[next_ - tile_], a_.head_dim * 2);
      prefetch(rows_.v[next_ - tile_], a_.v_head_dim * 2);
    }
  }

 private:
  const HfaAttentionArgs& a_;
  const Block& b_;
  int next_, tile_;
  Rows<bf16> rows_;
};

// Keys and values [begin, end) of a run.
inline void pack_run(const HfaAttentionArgs& a, const Block& b, int begin, int end, AmxBuffers& buf, Fetcher& fetcher) {
  Rows<bf16> rows;
  for (int t = 0; begin + t < end; t += AMX_TILE) {
    fetcher.until(begin + t + 2 * AMX_TILE);
    rows.resolve(a, b, begin + t, std::min(end, begin + t + AMX_TILE));
    pack_amx_keys(rows, a.head_dim, buf.q_steps, buf.k + t / 16 * buf.q_steps * TILE_WORDS);
    pack_amx_values(rows, a.v_head_dim, buf.v + t / AMX_TILE * buf.value_tiles * VALUE_STEPS * TILE_WORDS);
  }
}

}  // namespace attn
}  // namespace
#endif
