// Row-wise pieces of a decoder: RMSNorm and rotary embedding, rounded step by step as the tensor operations they replace.
#pragma once
#include <omp.h>

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace hfa {

// f(begin, end) over [0, count), on several threads when there is enough work (`width` elements each).
template <typename F>
void parallel_rows(int64_t count, int64_t width, int num_threads, F f) {
  if (num_threads <= 1 || count < 2 || count * width < (1 << 15)) {
    f(int64_t(0), count);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t id = omp_get_thread_num(), threads = omp_get_num_threads();
    f(count * id / threads, count * (id + 1) / threads);
  }
}

// out = weight * round(x / sqrt(mean(x^2) + eps)); out may be x.
template <typename T>
void rms_norm_row(const T* x, const T* weight, int64_t size, float eps, T* out) {
  vfloat squares = {};
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    vfloat v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (int64_t j = i; j < size; ++j) total += to_float(x[j]) * to_float(x[j]);
  const float inverse = 1.f / std::sqrt(total / float(size) + eps);
  for (i = 0; i + kWidth <= size; i += kWidth) store(out + i, rounded<T>(load(x + i) * inverse) * load(weight + i));
  for (; i < size; ++i) from_float(rounded<T>(to_float(x[i]) * inverse) * to_float(weight[i]), out + i);
}

// Rotates the first `rotary_dim` elements of x in place: x * cos + rotate_half(x) * sin.
template <typename T>
void rope_row(T* x, const float* cos, const float* sin, int64_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const vfloat a = load(x + i), b = load(x + half + i);
    store(x + i, rounded<T>(a * load(cos + i)) - rounded<T>(b * load(sin + i)));
    store(x + half + i, rounded<T>(b * load(cos + half + i)) + rounded<T>(a * load(sin + half + i)));
  }
  for (; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[half + i]);
    from_float(rounded<T>(a * cos[i]) - rounded<T>(b * sin[i]), x + i);
    from_float(rounded<T>(b * cos[half + i]) + rounded<T>(a * sin[half + i]), x + half + i);
  }
}

}  // namespace hfa
