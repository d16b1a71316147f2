#include "gemm.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "simd.h"

using namespace hfa;

struct HfaPacked {
  int64_t num_columns, depth;  // N, K
  int64_t num_panels;
  int64_t panel_bytes;
  int32_t is_bf16;
  int64_t num_bytes;
  char* weights;
  float* bias;  // [num_panels * kPanel] or null
};

namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kActivationBytes = 384 << 10;  // of x per pass over the weights: stays in a 1 MiB L2 beside a panel
constexpr int64_t kPanelBytes = 256 << 10;       // of one panel per pass over the rows
constexpr int64_t kStreamAhead = 512;            // bytes fetched ahead when a panel is read only once

__attribute__((always_inline)) inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

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

constexpr int64_t kStepBytes = 4 * kPanel;  // of the panel, per float32 element or bfloat16 pair

// c [Rows, kPanel] (+)= a [Rows, depth] x panel part b. Lines `ahead` + [0, Lines) are fetched at each step, so that the
// panel that comes next is in L2 when its turn comes.
template <int Rows, int Lines>
void tile(const float* x, int64_t x_stride, const char* b, int64_t depth, float* c, bool add, const char* ahead,
          int64_t ahead_step) {
  const float* a[Rows];
  vfloat acc[Rows][kPanelVectors];
  for (int m = 0; m < Rows; ++m) a[m] = x + m * x_stride;
  open_tile<Rows>(acc, c, add);
  for (int64_t i = 0; i < depth; ++i, b += kStepBytes, ahead += ahead_step) {
#pragma GCC unroll 4
    for (int l = 0; l < Lines; ++l) prefetch(ahead + 64 * l);
    step<Rows>(acc, a, i, b);
  }
  close_tile<Rows>(acc, c);
}

template <int Rows, int Lines>
void tile(const bf16* x, int64_t x_stride, const char* b, int64_t depth, float* c, bool add, const char* ahead,
          int64_t ahead_step) {
  const bf16* a[Rows];
  vfloat acc[Rows][kPanelVectors];
  for (int m = 0; m < Rows; ++m) a[m] = x + m * x_stride;
  open_tile<Rows>(acc, c, add);
  uint32_t pair[Rows];
  int64_t i = 0;
  for (; i + 1 < depth; i += 2, b += kStepBytes, ahead += ahead_step) {
#pragma GCC unroll 4
    for (int l = 0; l < Lines; ++l) prefetch(ahead + 64 * l);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) std::memcpy(&pair[m], a[m] + i, 4);
    step_pair<Rows>(acc, pair, b);
  }
  if (i < depth) {
    for (int m = 0; m < Rows; ++m) pair[m] = a[m][i].bits;
    step_pair<Rows>(acc, pair, b);
  }
  close_tile<Rows>(acc, c);
}

template <typename T>
using Tile = void (*)(const T*, int64_t, const char*, int64_t, float*, bool, const char*, int64_t);

// By rows - 1, then by lines fetched a step: 1, 2, 4.
template <typename T>
const Tile<T> kTiles[kTileRows][3] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 4>}, {tile<3, 1>, tile<3, 2>, tile<3, 4>},
    {tile<4, 1>, tile<4, 2>, tile<4, 4>}, {tile<5, 1>, tile<5, 2>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 4>},
};

inline vfloat silu(vfloat x) { return x / (1.f + exp(-x)); }

// Rounded to T where storing it as Out would not.
template <typename T, typename Out>
inline vfloat rounded_for(vfloat y, bool round) {
  return round && !std::is_same<T, Out>::value ? rounded<T>(y) : y;
}

template <typename T, typename Out>
inline void finish_vector(vfloat y, const HfaLinearArgs& args, const T* residual, Out* out, int64_t column, int64_t limit) {
  float lanes[kWidth];
  if (args.scale != 1.f) y = rounded<T>(y * args.scale);
  if (column + kWidth <= limit) {
    if (residual) y += load(residual + column);
    store(out + column, rounded_for<T, Out>(y, residual != nullptr));
    return;
  }
  store(lanes, y);
  for (int i = 0; column + i < limit; ++i) {
    float value = lanes[i];
    if (residual) value = rounded<T>(value + to_float(residual[column + i]));
    from_float(value, out + column + i);
  }
}

// Rows [first, first + rows) of panel `panel`, from the accumulators c [rows, kPanel] to the output.
template <typename T, typename Out>
void finish(const HfaPacked& w, const HfaLinearArgs& args, int64_t panel, int64_t first, int64_t rows, float* c) {
  const float* bias = w.bias ? w.bias + panel * kPanel : nullptr;
  // The store into a T rounds by itself; before another operation, or a store into a float32, it is done here.
  const bool round = args.out_float32 ? !args.keep_float32
                                      : args.residual || args.scale != 1.f || args.epilogue != HFA_PLAIN;
  for (int64_t m = 0; m < rows; ++m, c += kPanel) {
    Out* out = static_cast<Out*>(args.out) + (first + m) * args.out_stride;
    const T* residual = static_cast<const T*>(args.residual);
    if (residual) residual += (first + m) * args.residual_stride;
    vfloat y[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) {
      y[v] = load(c + v * kWidth);
      if (bias) y[v] += load(bias + v * kWidth);
      if (round) y[v] = rounded<T>(y[v]);
    }
    if (args.epilogue == HFA_SILU_MUL) {
      constexpr int kHalf = kPanelVectors / 2;
      for (int v = 0; v < kHalf; ++v) {
        vfloat z = rounded<T>(silu(y[v])) * y[v + kHalf];
        if (args.residual || args.scale != 1.f || args.out_float32) z = rounded<T>(z);
        finish_vector<T, Out>(z, args, residual, out, panel * (kPanel / 2) + v * kWidth, w.num_columns / 2);
      }
    } else {
      for (int v = 0; v < kPanelVectors; ++v)
        finish_vector<T, Out>(y[v], args, residual, out, panel * kPanel + v * kWidth, w.num_columns);
    }
  }
}

// Asks for the output lines of a tile before its sums are known: stores that wait for memory would hold up the loads of
// the next tile. Inlined by force: GCC drops a call to a function that does nothing but prefetch.
template <typename T>
__attribute__((always_inline)) inline void fetch_output(const HfaPacked& w, const HfaLinearArgs& args, int64_t panel, int64_t first, int64_t rows) {
  const int64_t size = args.out_float32 ? 4 : sizeof(T);
  const bool halves = args.epilogue == HFA_SILU_MUL;
  const int64_t columns = halves ? kPanel / 2 : kPanel, total = halves ? w.num_columns / 2 : w.num_columns;
  const int64_t bytes = std::min(columns, total - panel * columns) * size;
  const char* out = static_cast<const char*>(args.out) + (first * args.out_stride + panel * columns) * size;
  for (int64_t m = 0; m < rows; ++m, out += args.out_stride * size)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(out + i, 1, 3);
}

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
  const int lines = tiles == 1 ? 2 : tiles <= 3 ? 1 : 0;
  const T* x = static_cast<const T*>(args.x) + first * args.x_stride;
  const char* weights = w.weights + panel * w.panel_bytes;
  const int64_t row_bytes = sizeof(T) * kPanel;
  for (int64_t k = 0; k < w.depth; k += blocking.depth) {
    const int64_t depth = std::min(blocking.depth, w.depth - k);
    const char* b = weights + k * row_bytes;
    // One tile alone streams; with more, each fetches its share of the next part.
    const int64_t part = depth * row_bytes;
    const char* next = tiles == 1 ? b + kStreamAhead : b + part;
    const bool last = k + depth == w.depth, only = last && k == 0;
    for (int64_t t = 0, m = 0; t < tiles; ++t) {
      const int64_t count = rows / tiles + (t < rows % tiles);
      float* sums = only ? c : c + m * kPanel;
      if (last) fetch_output<T>(w, args, panel, first + m, count);
      kTiles<T>[count - 1][lines](x + m * args.x_stride + k, args.x_stride, b, depth, sums, k > 0,
                                  next + t * (part / tiles), kStepBytes / tiles);
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
  const int64_t blocks = (args.num_rows + blocking.rows - 1) / blocking.rows;
  const int64_t items = blocks * w.num_panels;
  const int64_t threads = std::min<int64_t>(std::max(args.num_threads, 1), items);
  if (threads <= 1) {
    run_items<T>(w, args, blocking, 0, items);
    return;
  }
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
    run_items<T>(w, args, blocking, items * id / count, items * (id + 1) / count);
  }
}

constexpr int kPackRows = 16;  // rows copied together: their columns are neighbours, so whole cache lines are written

// Element (float32, or bfloat16 pair) i of source row j goes to dst[j] + i * kPanel.
void copy_rows(const HfaPacked& w, const char* const* src, uint32_t* const* dst, int64_t count) {
  const int64_t steps = w.is_bf16 ? w.depth / 2 : w.depth;
  for (int64_t i = 0; i < steps; ++i)
    for (int64_t j = 0; j < count; ++j) std::memcpy(dst[j] + i * kPanel, src[j] + 4 * i, 4);
  if (w.is_bf16 && w.depth % 2)
    for (int64_t j = 0; j < count; ++j) std::memcpy(dst[j] + steps * kPanel, src[j] + 4 * steps, 2);
}

}  // namespace

extern "C" {

int32_t hfa_panel_columns(void) { return kPanel; }

HfaPacked* hfa_packed_create(int64_t num_columns, int64_t depth, int32_t dtype, int32_t with_bias) {
  const int64_t panels = (num_columns + kPanel - 1) / kPanel;
  const int64_t steps = dtype ? (depth + 1) / 2 : depth;
  const int64_t panel_bytes = steps * kStepBytes;
  const int64_t size = panels * panel_bytes + (with_bias ? panels * kPanel * 4 : 0);
  const int64_t rounded_size = (size + kHugePage - 1) / kHugePage * kHugePage;
  // Huge pages from the kernel where it gives them: fewer TLB misses on a weight that is read end to end.
  const int64_t align = size >= kHugePage ? kHugePage : 4096;
  void* memory = nullptr;
  if (posix_memalign(&memory, align, align == kHugePage ? rounded_size : size)) return nullptr;
  if (align == kHugePage) madvise(memory, rounded_size, MADV_HUGEPAGE);
  std::memset(memory, 0, size);
  auto* w = new HfaPacked{num_columns, depth, panels, panel_bytes, dtype, size, static_cast<char*>(memory), nullptr};
  if (with_bias) w->bias = reinterpret_cast<float*>(w->weights + panels * panel_bytes);
  return w;
}

void hfa_packed_destroy(HfaPacked* packed) {
  if (!packed) return;
  std::free(packed->weights);
  delete packed;
}

int64_t hfa_packed_bytes(const HfaPacked* packed) { return packed->num_bytes; }

void hfa_pack_weight(HfaPacked* packed, const void* weight, int64_t stride, int64_t rows, int64_t first, int64_t group,
                     int64_t group_stride, const void* bias, int32_t num_threads) {
  const int64_t size = packed->is_bf16 ? 2 : 4;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t block = 0; block < (rows + kPackRows - 1) / kPackRows; ++block) {
    const char* src[kPackRows];
    uint32_t* dst[kPackRows];
    const int64_t count = std::min<int64_t>(kPackRows, rows - block * kPackRows);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t r = block * kPackRows + j, column = first + r / group * group_stride + r % group;
      src[j] = static_cast<const char*>(weight) + r * stride * size;
      dst[j] = reinterpret_cast<uint32_t*>(packed->weights + column / kPanel * packed->panel_bytes) + column % kPanel;
      if (bias && packed->bias)
        packed->bias[column] = packed->is_bf16 ? to_float(static_cast<const bf16*>(bias)[r]) : static_cast<const float*>(bias)[r];
    }
    copy_rows(*packed, src, dst, count);
  }
}

void hfa_packed_linear(const HfaPacked* packed, const HfaLinearArgs* args) {
  if (args->num_rows <= 0 || packed->num_columns <= 0) return;
  if (packed->is_bf16)
    run<bf16>(*packed, *args);
  else
    run<float>(*packed, *args);
}
}
