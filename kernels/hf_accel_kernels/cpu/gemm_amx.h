// The bfloat16 linear on AMX tiles, for weights packed in tiles. Rows of x are packed in tiles too, a block at a time; few
// rows stream the weights past once, more rows reuse a panel from L2 while the next one is fetched.
#pragma once
#include "gemm_finish.h"
#include "gemm_packed.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define HFA_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HFA_AMX 0
#endif

namespace hfa {
namespace amx {

constexpr int64_t kSide = 16;          // rows of a tile; columns of sums or weights
constexpr int64_t kDepth = 32;         // elements along K in a tile
constexpr int64_t kTile = 1024;        // bytes
constexpr int64_t kStrips = kPanel / kSide;

inline int64_t steps_of(int64_t depth) { return ceil_div(depth, kDepth); }

#if HFA_AMX

// Asks the kernel for the tile registers, once for the process.
inline bool available() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return granted;
}

constexpr int64_t kBlockRows = 512;          // of x in one pass over the weights
constexpr int64_t kBlockBytes = 1 << 20;     // of x in one pass: half of a 2 MiB L2
constexpr int64_t kBlockSteps = 8;           // along K: the weights of two strips stay in L1 while the rows pass

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Eight tiles for this scope; what the thread had configured before is put back (its tile contents are lost).
// Inline assembly, because GCC 12's intrinsic tells the compiler of the first 8 bytes only.
class Tiles {
 public:
  explicit Tiles(int64_t sum_rows) {
    asm volatile("sttilecfg %0" : "=m"(before_));
    TileConfig config;
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = kSide;
    for (int t = 0; t < 5; ++t) config.rows[t] = uint8_t(sum_rows < kSide ? sum_rows : kSide);
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() {
    if (before_.palette)
      asm volatile("ldtilecfg %0" : : "m"(before_));
    else
      _tile_release();
  }

 private:
  TileConfig before_;
};

// x [rows, depth] to out [rows / 16][depth / 32] tiles of [16][32], zeros beyond the rows and the depth.
inline void pack_rows(const bf16* x, int64_t x_stride, int64_t rows, int64_t depth, char* out) {
  const int64_t whole = depth / kDepth, steps = steps_of(depth);
  constexpr int64_t kRun = 8;
  for (int64_t first = 0; first < rows; first += kSide, out += steps * kTile) {
    const int64_t count = rows - first < kSide ? rows - first : kSide;
    const bf16* source = x + first * x_stride;
    for (int64_t k = 0; k < whole; k += kRun)
      for (int64_t m = 0; m < count; ++m)
        for (int64_t i = k; i < whole && i < k + kRun; ++i) {
          const bf16* p = source + m * x_stride + i * kDepth;
          prefetch(reinterpret_cast<const char*>(p + kRun * kDepth));
          std::memcpy(out + i * kTile + m * 64, p, 64);
        }
    for (int64_t m = 0; whole < steps && m < count; ++m) {
      std::memset(out + whole * kTile + m * 64, 0, 64);
      std::memcpy(out + whole * kTile + m * 64, source + m * x_stride + whole * kDepth, (depth % kDepth) * sizeof(bf16));
    }
    for (int64_t i = 0; count < kSide && i < steps; ++i) std::memset(out + i * kTile + count * 64, 0, (kSide - count) * 64);
  }
}

// Where the weights that come next lie, fetched a few lines at each step.
struct Next {
  const char* line;
  int64_t lines;

  __attribute__((always_inline)) inline void fetch() {
    for (int64_t l = 0; l < lines; ++l, line += 64) prefetch(line);
  }
};

__attribute__((always_inline)) inline void fetch_tile(const char* p) {
#pragma GCC unroll 16
  for (int l = 0; l < 16; ++l) prefetch(p + 64 * l);
}

// Four sums in tiles 0-3: the first `columns` of them side by side in c [., kPanel], the others 16 rows below.
template <int Columns>
inline void open_sums(const float* c, bool add) {
  constexpr int64_t kRow = kPanel * 4, kBelow = Columns == 4 ? 32 : kSide * kPanel;
  if (!add) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, c, kRow);
  _tile_loadd(1, c + 16, kRow);
  _tile_loadd(2, c + kBelow, kRow);
  _tile_loadd(3, c + kBelow + 16, kRow);
}

template <int Columns>
inline void close_sums(float* c) {
  constexpr int64_t kRow = kPanel * 4, kBelow = Columns == 4 ? 32 : kSide * kPanel;
  _tile_stored(0, c, kRow);
  _tile_stored(1, c + 16, kRow);
  _tile_stored(2, c + kBelow, kRow);
  _tile_stored(3, c + kBelow + 16, kRow);
}

// Bytes from a step's tile to the one `tiles` ahead: in the same strip, or `jump` further on, in the next panel's.
__attribute__((always_inline)) inline int64_t ahead(int64_t step, int64_t steps, int64_t tiles, int64_t jump) {
  return tiles * kTile + (step + tiles < steps ? 0 : jump);
}

// c [16, 64] (+)= rows a x four strips, `strip` bytes apart, over `steps` tiles. Stream: the weights come from memory.
template <bool Stream>
void wide(const char* a, const char* b, int64_t strip, int64_t steps, float* c, bool add, Next& next) {
  open_sums<4>(c, add);
  for (int64_t i = 0; i < steps; ++i, a += kTile, b += kTile) {
    const int64_t d = Stream ? ahead(i, steps, 1, 3 * strip) : 0;
    if (!Stream) next.fetch();
    _tile_loadd(4, a, 64);
    if (Stream) fetch_tile(b + d);
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (Stream) fetch_tile(b + strip + d);
    _tile_loadd(6, b + strip, 64);
    _tile_dpbf16ps(1, 4, 6);
    if (Stream) fetch_tile(b + 2 * strip + d);
    _tile_loadd(7, b + 2 * strip, 64);
    _tile_dpbf16ps(2, 4, 7);
    if (Stream) fetch_tile(b + 3 * strip + d);
    _tile_loadd(5, b + 3 * strip, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  close_sums<4>(c);
}

// c [32, 32 of 64] (+)= two tiles of rows, `rows` bytes apart, x two strips.
template <bool Stream>
void square(const char* a, int64_t rows, const char* b, int64_t strip, int64_t steps, float* c, bool add, Next& next) {
  open_sums<2>(c, add);
  for (int64_t i = 0; i < steps; ++i, a += kTile, b += kTile) {
    const int64_t d = Stream ? ahead(i, steps, 2, strip) : 0;
    if (!Stream) next.fetch();
    _tile_loadd(4, a, 64);
    if (Stream) fetch_tile(b + d);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (Stream) fetch_tile(b + strip + d);
    _tile_loadd(7, b + strip, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + rows, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  close_sums<2>(c);
}

inline void finish_rows(const HfaPacked& w, const HfaLinearArgs& args, int64_t panel, int64_t first, int64_t rows, float* c) {
  if (args.out_float32)
    finish<bf16, float>(w, args, panel, first, rows, c);
  else
    finish<bf16, bf16>(w, args, panel, first, rows, c);
}

// Few rows: each strip passes all of them once, whole, while what follows it in memory is fetched.
inline void stream_panel(const HfaPacked& w, const HfaLinearArgs& args, int64_t panel, int64_t first, int64_t rows,
                         const char* a, float* c) {
  const int64_t steps = steps_of(w.depth), strip = steps * kTile;
  const char* b = w.weights + panel * w.panel_bytes;
  Next none = {nullptr, 0};
  fetch_output<bf16>(w, args, panel, first, rows);
  if (rows <= kSide) {
    wide<true>(a, b, strip, steps, c, false, none);
  } else {
    for (int64_t half = 0; half < 2; ++half, b += 2 * strip)
      for (int64_t m = 0; m < rows; m += 2 * kSide)
        (m ? square<false> : square<true>)(a + m / kSide * strip, strip, b, strip, steps, c + m * kPanel + 32 * half, false, none);
  }
  finish_rows(w, args, panel, first, rows, c);
}

// More rows: part by part along K, two strips pass all the rows; meanwhile the next panel is fetched.
inline void block_panel(const HfaPacked& w, const HfaLinearArgs& args, int64_t panel, int64_t first, int64_t rows,
                        const char* a, float* c) {
  const int64_t steps = steps_of(w.depth), strip = steps * kTile, tiles = ceil_div(rows, kSide);
  const char* b = w.weights + panel * w.panel_bytes;
  Next next = {b + w.panel_bytes, ceil_div(16 * kStrips, tiles / 2 * 2 + tiles % 2)};
  for (int64_t k = 0; k < steps; k += kBlockSteps) {
    const int64_t count = steps - k < kBlockSteps ? steps - k : kBlockSteps;
    const char *ak = a + k * kTile, *bk = b + k * kTile;
    const bool last = k + count == steps;
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t t = 0; t < tiles; t += 2) {
        float* sums = c + t * kSide * kPanel;
        const int64_t m = t * kSide, height = rows - m < 2 * kSide ? rows - m : 2 * kSide;
        if (t + 1 < tiles)
          square<false>(ak + t * strip, strip, bk + 2 * half * strip, strip, count, sums + 32 * half, k > 0, next);
        else if (half)
          wide<false>(ak + t * strip, bk, strip, count, sums, k > 0, next);
        if (last && half) finish_rows(w, args, panel, first + m, height, sums);
      }
  }
}

// Measured: above, the next panel has to be fetched while this one is in use; long strips do not stay in L1 either way.
inline bool streams(int64_t rows, int64_t depth) { return rows <= 64 || (rows <= 192 && depth > 1536); }

inline int64_t choose_block(int64_t num_rows, int64_t depth) {
  int64_t limit = kBlockBytes / (steps_of(depth) * kTile) * kSide;
  limit = limit < 4 * kSide ? 4 * kSide : limit > kBlockRows ? kBlockRows : limit;
  const int64_t blocks = ceil_div(num_rows, limit);
  return ceil_div(ceil_div(num_rows, blocks), 2 * kSide) * 2 * kSide;
}

// Items are (block of rows, panel), rows outermost. One thread packs each block before it is used; several pack all first.
inline void run(const HfaPacked& w, const HfaLinearArgs& args) {
  static thread_local Scratch row_scratch;
  const bf16* x = static_cast<const bf16*>(args.x);
  const int64_t block = choose_block(args.num_rows, w.depth), tile_row = steps_of(w.depth) * kTile;
  const int64_t items = ceil_div(args.num_rows, block) * w.num_panels;
  const bool together = args.num_threads > 1 && items > 1;
  const auto pack_tiles = [&](int64_t first, int64_t end, char* out) {
    const int64_t rows = (end < args.num_rows ? end : args.num_rows) - first;
    pack_rows(x + first * args.x_stride, args.x_stride, rows, w.depth, out);
    asm volatile("" : : : "memory");  // the tile loads do not tell the compiler that they read this
  };
  char* packed = row_scratch.get<char>((together ? ceil_div(args.num_rows, 2 * kSide) * 2 : block / kSide) * tile_row);
  if (together)
    split_items(ceil_div(args.num_rows, kSide), args.num_rows > 64 ? args.num_threads : 1, [&](int64_t begin, int64_t end) {
      pack_tiles(begin * kSide, end * kSide, packed + begin * tile_row);
    });
  split_items(items, args.num_threads, [&](int64_t begin, int64_t end) {
    static thread_local Scratch sum_scratch;
    const Tiles tiles(args.num_rows);
    float* sums = sum_scratch.get<float>(block * kPanel);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item % w.num_panels, first = (item - panel) / w.num_panels * block;
      const int64_t rows = args.num_rows - first < block ? args.num_rows - first : block;
      if (!together && panel == 0) pack_tiles(first, first + rows, packed);
      const char* a = together ? packed + first / kSide * tile_row : packed;
      (streams(rows, w.depth) ? stream_panel : block_panel)(w, args, panel, first, rows, a, sums);
    }
  });
}

#else

inline bool available() { return false; }
inline void run(const HfaPacked&, const HfaLinearArgs&) {}

#endif

}  // namespace amx
}  // namespace hfa
