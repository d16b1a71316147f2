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

// Scales a vector, adds the residual and stores it; only `count` columns when that is less than a vector.
template <typename T, typename Out>
inline void finish_vector(vfloat y, float scale, const T* residual, Out* out, int64_t count) {
  if (scale != 1.f) y = rounded<T>(y * scale);
  if (count >= kWidth) {
    if (residual) y += load(residual);
    store(out, rounded_for<T, Out>(y, residual != nullptr));
    return;
  }
  float lanes[kWidth];
  store(lanes, y);
  for (int64_t i = 0; i < count; ++i) {
    float value = lanes[i];
    if (residual) value = rounded<T>(value + to_float(residual[i]));
    from_float(value, out + i);
  }
}

// Rows of sums c [rows, kPanel], to the columns of `out` (and `residual`) from `column` on, `limit` in all.
template <typename T, typename Out, bool SiluMul>
void finish_panel(const float* bias, const HfaLinearArgs args, int64_t first, int64_t rows, int64_t column, int64_t limit,
                  const float* c) {
  constexpr int kVectors = SiluMul ? kPanelVectors / 2 : kPanelVectors;
  // The store into a T rounds by itself; before another operation, or a store into a float32, it is done here.
  const bool more = args.residual || args.scale != 1.f || args.out_float32;
  const bool round = args.out_float32 ? !args.keep_float32 : more || SiluMul;
  Out* out = static_cast<Out*>(args.out) + first * args.out_stride + column;
  const T* residual = static_cast<const T*>(args.residual);
  if (residual) residual += first * args.residual_stride + column;
  for (int64_t m = 0; m < rows; ++m, c += kPanel, out += args.out_stride) {
    vfloat y[kPanelVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) {
      y[v] = load(c + v * kWidth);
      if (bias) y[v] += load(bias + v * kWidth);
      if (round) y[v] = rounded<T>(y[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (SiluMul) {
        y[v] = rounded<T>(silu(y[v])) * y[v + kVectors];
        if (more) y[v] = rounded<T>(y[v]);
      }
      finish_vector<T, Out>(y[v], args.scale, residual ? residual + v * kWidth : nullptr, out + v * kWidth,
                            limit - column - v * kWidth);
    }
    if (residual) residual += args.residual_stride;
  }
}

// Rows [first, first + rows) of panel `panel`, from the sums c [rows, kPanel] to the output.
template <typename T, typename Out>
void finish(const HfaPacked& w, const HfaLinearArgs& args, int64_t panel, int64_t first, int64_t rows, const float* c) {
  const float* bias = w.bias ? w.bias + panel * kPanel : nullptr;
  if (args.epilogue == HFA_SILU_MUL)
    finish_panel<T, Out, true>(bias, args, first, rows, panel * (kPanel / 2), w.num_columns / 2, c);
  else
    finish_panel<T, Out, false>(bias, args, first, rows, panel * kPanel, w.num_columns, c);
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
