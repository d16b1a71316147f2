// What follows the sums of a linear: bias, silu * up, scale, residual, each rounded to the weight's type on the way.
#pragma once
#include <algorithm>
#include <type_traits>

#include "gemm_packed.h"

namespace hfa {

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

}  // namespace hfa
