// The store of new tokens' latents and rotary keys into their slots, as they are or in fp8 with a scale for each part.
#include <omp.h>

#include "attention_simd.h"
#include "mla_attention.h"
#include "mla_fp8.h"

namespace {
using namespace simd;

template <class T> float quantize(const T* x, int n, uint8_t* out) {
  vf tops = zero(), nans = zero();
  int i = 0;
  for (; i < n; i += W) {
    const vf v = load_n(x + i, n - i), magnitude = v < zero() ? -v : v;
    tops = maximum(magnitude, tops);
    nans += v - v;  // NaN for NaN and infinity
  }
  const float bad = sum(nans);
  float scale = max_lane(tops) / 448.f;
  if (scale == 0) scale = 1;
  if (bad != bad) {
    scale = 0;
    for (i = 0; i < n; ++i) {
      const float a = std::fabs(to_float(x[i]));
      scale = a != a || scale != scale ? bad : std::max(scale, a / 448.f);
    }
  }
  for (i = 0; i < n; ++i) out[i] = mla::float_to_fp8(to_float(x[i]) / scale);
  return scale;
}

template <class T> void store(const HfaMlaStoreArgs& a) {
  const int64_t width = int64_t(a.rank) + a.rope;
  const auto token = [&](int i) {
    const int64_t slot = a.slot_mapping[i];
    if (slot < 0) return;
    const T* latent = static_cast<const T*>(a.latent) + i * a.latent_stride;
    const T* rope_key = static_cast<const T*>(a.rope_key) + i * a.rope_key_stride;
    if (a.scales) {
      uint8_t* to = static_cast<uint8_t*>(a.pages) + slot * width;
      a.scales[2 * slot] = quantize(latent, a.rank, to);
      a.scales[2 * slot + 1] = quantize(rope_key, a.rope, to + a.rank);
      return;
    }
    T* to = static_cast<T*>(a.pages) + slot * width;
    memcpy(to, latent, size_t(a.rank) * sizeof(T));
    memcpy(to + a.rank, rope_key, size_t(a.rope) * sizeof(T));
  };
  if (a.num_threads <= 1 || a.num_tokens < 64) {
    for (int i = 0; i < a.num_tokens; ++i) token(i);
    return;
  }
#pragma omp parallel for num_threads(a.num_threads)
  for (int i = 0; i < a.num_tokens; ++i) token(i);
}

}  // namespace

extern "C" int hfa_mla_store(const HfaMlaStoreArgs* args) {
  if (args->page_size <= 0 || args->rank <= 0 || args->rope < 0) return 1;
  switch (args->dtype) {
    case HFA_FLOAT32: store<float>(*args); return 0;
    case HFA_BFLOAT16: store<bf16>(*args); return 0;
    case HFA_FLOAT16: store<fp16>(*args); return 0;
    default: return 1;
  }
}
