// The packed weight as the gemm_*.h files see it, and what they share.
#pragma once
#include <omp.h>
#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "gemm.h"
#include "simd.h"

// Weights of panel p start at weights + p * panel_bytes. A panel is [K][kPanel] float32 or [K/2][kPanel][2] bfloat16, or,
// `tiled`, kPanel / 16 strips of 16 columns, each [K/32] tiles of [16][16][2] bfloat16 (pairs along K). Zeros pad both ends.
struct HfaPacked {
  int64_t num_columns, depth;  // N, K
  int64_t num_panels;
  int64_t panel_bytes;
  int32_t is_bf16;
  int32_t tiled;
  int64_t num_bytes;
  char* weights;
  float* bias;  // [num_panels * kPanel] or null
};

namespace hfa {

constexpr int64_t kStepBytes = 4 * kPanel;  // of a panel, per float32 element or bfloat16 pair

// Inlined by force: GCC drops a call to a function that does nothing but prefetch.
__attribute__((always_inline)) inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(begin, end) over [0, count), one contiguous part for each thread.
template <typename F>
void split_items(int64_t count, int32_t num_threads, F f) {
  if (num_threads <= 1 || count <= 1) {
    f(int64_t(0), count);
    return;
  }
#pragma omp parallel num_threads(int(count < num_threads ? count : num_threads))
  {
    const int64_t id = omp_get_thread_num(), threads = omp_get_num_threads();
    f(count * id / threads, count * (id + 1) / threads);
  }
}

constexpr int64_t kHugePage = 2 << 20;

// Memory of one thread that grows and is kept for the next call; what it held is lost when it grows.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  template <typename T>
  T* get(int64_t count) {
    const int64_t bytes = count * int64_t(sizeof(T)), unit = bytes < kHugePage / 4 ? 4096 : kHugePage;
    const int64_t size = ceil_div(bytes, unit) * unit;
    if (size > capacity_) {
      std::free(memory_);
      capacity_ = 0;
      memory_ = std::aligned_alloc(unit, size);
      if (!memory_) throw std::bad_alloc();
      if (unit == kHugePage) madvise(memory_, size, MADV_HUGEPAGE);
      capacity_ = size;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace hfa
