// The linear on vector registers: float32 everywhere, bfloat16 where there are no AMX tiles.
#pragma once
#include <algorithm>

#include "gemm_finish.h"
#include "gemm_packed.h"

namespace hfa {

constexpr int64_t kActivationBytes = 384 << 10;  // of x per pass over the weights: stays in a 1 MiB L2 beside a panel
constexpr int64_t kPanelBytes = 256 << 10;       // of one panel per pass over the rows
constexpr int64_t kStreamAhead = 1024;           // bytes fetched ahead in each stream when a panel is read only once
constexpr int64_t kStreams = 2;
constexpr int64_t kFewTiles = 3;
constexpr int kStreaming = kStepBytes / 64;      // lines of a step

// One step along K: a row of the panel times one element (or pair) of each of Rows activations.
template <int Rows>
inline void step(vfloat (&acc)[Rows][kPanelVectors], const float* const* a, int64_t i, const char* b) {
  vfloat w[kPanelVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kPanelVectors; ++v) w[v] = load(reinterpret_cast<const float*>(b) + v * kWidth);
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
    vfloat x = splat(a[m][i]);
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) acc[m][v] += x * w[v];
  }
}

template <int Rows>
inline void step_pair(vfloat (&acc)[Rows][kPanelVectors], const uint32_t (&pair)[Rows], const char* b) {
  const char* p = b;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  __m512bh w[kPanelVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kPanelVectors; ++v) w[v] = (__m512bh)_mm512_loadu_si512(p + 64 * v);
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
    __m512bh x = (__m512bh)_mm512_set1_epi32(int(pair[m]));
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) acc[m][v] = (vfloat)_mm512_dpbf16_ps((__m512)acc[m][v], w[v], x);
  }
#else
  vfloat even[kPanelVectors], odd[kPanelVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kPanelVectors; ++v) {
    vuint w = *reinterpret_cast<const vuint*>(p + 4 * kWidth * v);
    even[v] = (vfloat)(w << 16);
    odd[v] = (vfloat)(w & 0xFFFF0000u);
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
    vuint x = pair[m] + vuint{};
    vfloat x0 = (vfloat)(x << 16), x1 = (vfloat)(x & 0xFFFF0000u);
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) acc[m][v] += x0 * even[v];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) acc[m][v] += x1 * odd[v];
  }
#endif
}

template <int Rows>
inline void open_tile(vfloat (&acc)[Rows][kPanelVectors], const float* c, bool add) {
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) acc[m][v] = vfloat{};
  if (!add) return;
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) acc[m][v] = load(c + m * kPanel + v * kWidth);
}

template <int Rows>
inline void close_tile(const vfloat (&acc)[Rows][kPanelVectors], float* c) {
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) store(c + m * kPanel + v * kWidth, acc[m][v]);
}

// Lines to fetch at each step along K: `lines` of them, at `at` and `step` bytes further each time. Streaming (a panel that
// is read once): the lines some way after those being read, and at the end of a stream its successor's, `jump` further on.
struct Ahead {
  const char* at;
  int64_t step, jump;
};

// f(k, b) over `steps` steps along K of a panel part, in kStreams places in turn: the processor's prefetchers follow each
// within its page, so several get more from memory than one. The order is the same for any number of rows, so are the sums.
template <int Lines, typename F>
inline void walk(const char* b, int64_t steps, Ahead ahead, F f) {
  const int64_t length = steps / kStreams;
  for (int64_t i = 0; i < length; ++i) {
    const int64_t distance = kStreamAhead + (i + kStreamAhead / kStepBytes < length ? 0 : ahead.jump);
    for (int64_t s = 0, k = i; s < kStreams; ++s, k += length) {
      const char* p = b + k * kStepBytes;
#pragma GCC unroll 4
      for (int l = 0; l < Lines; ++l) prefetch((Lines == kStreaming ? p + distance : ahead.at) + 64 * l);
      ahead.at += ahead.step;
      f(k, p);
    }
  }
  for (int64_t k = length * kStreams; k < steps; ++k) f(k, b + k * kStepBytes);
}

// c [Rows, kPanel] (+)= a [Rows, depth] x panel part b.
template <int Rows, int Lines>
void tile(const float* x, int64_t x_stride, const char* b, int64_t depth, float* c, bool add, Ahead ahead) {
  const float* a[Rows];
  vfloat acc[Rows][kPanelVectors];
  for (int m = 0; m < Rows; ++m) a[m] = x + m * x_stride;
  open_tile<Rows>(acc, c, add);
  walk<Lines>(b, depth, ahead, [&](int64_t k, const char* p) { step<Rows>(acc, a, k, p); });
  close_tile<Rows>(acc, c);
}

template <int Rows, int Lines>
void tile(const bf16* x, int64_t x_stride, const char* b, int64_t depth, float* c, bool add, Ahead ahead) {
  const bf16* a[Rows];
  vfloat acc[Rows][kPanelVectors];
  for (int m = 0; m < Rows; ++m) a[m] = x + m * x_stride;
  open_tile<Rows>(acc, c, add);
  uint32_t pair[Rows];
  walk<Lines>(b, depth / 2, ahead, [&](int64_t k, const char* p) {
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) std::memcpy(&pair[m], a[m] + 2 * k, 4);
    step_pair<Rows>(acc, pair, p);
  });
  if (depth % 2) {
    for (int m = 0; m < Rows; ++m) pair[m] = a[m][depth - 1].bits;
    step_pair<Rows>(acc, pair, b + depth / 2 * kStepBytes);
  }
  close_tile<Rows>(acc, c);
}

template <typename T>
using Tile = void (*)(const T*, int64_t, const char*, int64_t, float*, bool, Ahead);

// By rows - 1, then by lines fetched a step: 0, 1, kStreaming.
template <typename T>
const Tile<T> kTiles[kTileRows][3] = {
    {tile<1, 0>, tile<1, 1>, tile<1, kStreaming>}, {tile<2, 0>, tile<2, 1>, tile<2, kStreaming>}, {tile<3, 0>, tile<3, 1>, tile<3, kStreaming>},
    {tile<4, 0>, tile<4, 1>, tile<4, kStreaming>}, {tile<5, 0>, tile<5, 1>, tile<5, kStreaming>}, {tile<6, 0>, tile<6, 1>, tile<6, kStreaming>},
};

struct Blocking {
  int64_t rows;   // of x in one pass
  int64_t depth;  // of K in one pass, even
};

// Blocks of about equal height: a short last one would read all the weights for few rows.
template <typename T>
Blocking choose_blocking(int64_t num_rows, int64_t depth) {
  Blocking b;
  const int64_t fit = std::max<int64_t>(8 * kTileRows, kActivationBytes / int64_t(sizeof(T)) / depth);
  const int64_t blocks = std::max<int64_t>(1, (num_rows + fit / 2) / fit);
  b.rows = (num_rows + blocks - 1) / blocks;
  int64_t limit = kPanelBytes / kPanel / int64_t(sizeof(T));
  int64_t parts = (depth + limit - 1) / limit;
  b.depth = ((depth + parts - 1) / parts + 1) & ~int64_t(1);
  return b;
}

// Rows [first, first + rows) times one panel; c is scratch [rows, kPanel].
template <typename T>
void panel_block(const HfaPacked& w, const HfaLinearArgs& args, const Blocking& blocking, int64_t panel, int64_t first,
                 int64_t rows, float* c) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const T* x = static_cast<const T*>(args.x) + first * args.x_stride;
  const char* weights = w.weights + panel * w.panel_bytes;
  const int64_t row_bytes = sizeof(T) * kPanel;
  for (int64_t k = 0; k < w.depth; k += blocking.depth) {
    const int64_t depth = std::min(blocking.depth, w.depth - k);
    const char* b = weights + k * row_bytes;
    // The first of few tiles streams, the others find the panel in L2; of many, each fetches its share of the next part.
    const int64_t part = depth * row_bytes, jump = part - part / kStreams;
    const bool last = k + depth == w.depth, only = last && k == 0;
    for (int64_t t = 0, m = 0; t < tiles; ++t) {
      const int64_t count = rows / tiles + (t < rows % tiles);
      float* sums = only ? c : c + m * kPanel;
      const int lines = tiles > kFewTiles ? 1 : t == 0 ? 2 : 0;
      if (last) fetch_output<T>(w, args, panel, first + m, count);
      kTiles<T>[count - 1][lines](x + m * args.x_stride + k, args.x_stride, b, depth, sums, k > 0,
                                  Ahead{b + part + t * (part / tiles), kStepBytes / tiles, jump});
      if (last && args.out_float32) finish<T, float>(w, args, panel, first + m, count, sums);
      if (last && !args.out_float32) finish<T, T>(w, args, panel, first + m, count, sums);
      m += count;
    }
  }
}

// Items are (block of rows, panel), rows outermost: a block of rows stays in L2 while the panels stream past.
template <typename T>
void run_items(const HfaPacked& w, const HfaLinearArgs& args, const Blocking& blocking, int64_t begin, int64_t end) {
  alignas(64) float stack[64 * kPanel];
  float* heap = nullptr;
  const int64_t block = std::min(blocking.rows, args.num_rows);
  if (block > 64) heap = static_cast<float*>(std::aligned_alloc(64, block * kPanel * sizeof(float)));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / w.num_panels * blocking.rows;
    const int64_t rows = std::min(blocking.rows, args.num_rows - first);
    panel_block<T>(w, args, blocking, item % w.num_panels, first, rows, heap ? heap : stack);
  }
  std::free(heap);
}

template <typename T>
void run(const HfaPacked& w, const HfaLinearArgs& args) {
  const Blocking blocking = choose_blocking<T>(args.num_rows, w.depth);
  const int64_t items = ceil_div(args.num_rows, blocking.rows) * w.num_panels;
  split_items(items, args.num_threads,
              [&](int64_t begin, int64_t end) { run_items<T>(w, args, blocking, begin, end); });
}

}  // namespace hfa
