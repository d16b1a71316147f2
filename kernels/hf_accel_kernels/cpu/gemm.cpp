#include "gemm.h"

#include <algorithm>
#include <atomic>

#include "gemm_amx.h"
#include "gemm_packed.h"
#include "gemm_tile.h"
#include "packed_memory.h"

using namespace hfa;

namespace {

std::atomic<bool> amx_wanted{true};

bool use_amx() { return amx_wanted && amx::available(); }

constexpr int kPackRows = 16;  // rows copied together: their columns are neighbours, so whole cache lines are written

// Element (float32, or bfloat16 pair) i of source row j goes to dst[j] + i * width.
void copy_rows(const HfaPacked& w, const char* const* src, uint32_t* const* dst, int64_t width, int64_t count) {
  const int64_t steps = w.is_bf16 ? w.depth / 2 : w.depth;
  for (int64_t i = 0; i < steps; ++i)
    for (int64_t j = 0; j < count; ++j) std::memcpy(dst[j] + i * width, src[j] + 4 * i, 4);
  if (w.is_bf16 && w.depth % 2)
    for (int64_t j = 0; j < count; ++j) std::memcpy(dst[j] + steps * width, src[j] + 4 * steps, 2);
}

// Where the first element (or pair) of a column lies.
uint32_t* column_start(const HfaPacked& w, int64_t column) {
  char* panel = w.weights + column / kPanel * w.panel_bytes;
  if (!w.tiled) return reinterpret_cast<uint32_t*>(panel) + column % kPanel;
  const int64_t strip = column % kPanel / amx::kSide;
  return reinterpret_cast<uint32_t*>(panel + strip * (w.panel_bytes / amx::kStrips)) + column % amx::kSide;
}

}  // namespace

extern "C" {

int32_t hfa_panel_columns(void) { return kPanel; }

int32_t hfa_amx(int32_t wanted) {
  amx_wanted = wanted != 0;
  return use_amx();
}

HfaPacked* hfa_packed_create(int64_t num_columns, int64_t depth, int32_t dtype, int32_t with_bias) {
  const bool tiled = dtype && use_amx();
  const int64_t panels = ceil_div(num_columns, kPanel);
  const int64_t steps = !dtype ? depth : tiled ? amx::steps_of(depth) * (amx::kDepth / 2) : ceil_div(depth, 2);
  const int64_t panel_bytes = steps * kStepBytes;
  const int64_t size = panels * panel_bytes + (with_bias ? panels * kPanel * 4 : 0);
  void* memory = weight_memory(size);
  if (!memory) return nullptr;
  char* weights = static_cast<char*>(memory);
  float* bias = with_bias ? reinterpret_cast<float*>(weights + panels * panel_bytes) : nullptr;
  return new HfaPacked{num_columns, depth, panels, panel_bytes, dtype, tiled, size, weights, bias};
}

void hfa_packed_destroy(HfaPacked* packed) {
  if (!packed) return;
  release_weight_memory(packed->weights);
  delete packed;
}

int64_t hfa_packed_bytes(const HfaPacked* packed) { return packed->num_bytes; }

void hfa_pack_weight(HfaPacked* packed, const void* weight, int64_t stride, int64_t rows, int64_t first, int64_t group,
                     int64_t group_stride, const void* bias, int32_t num_threads) {
  const int64_t size = packed->is_bf16 ? 2 : 4, width = packed->tiled ? amx::kSide : kPanel;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t block = 0; block < ceil_div(rows, kPackRows); ++block) {
    const char* src[kPackRows];
    uint32_t* dst[kPackRows];
    const int64_t count = std::min<int64_t>(kPackRows, rows - block * kPackRows);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t r = block * kPackRows + j, column = first + r / group * group_stride + r % group;
      src[j] = static_cast<const char*>(weight) + r * stride * size;
      dst[j] = column_start(*packed, column);
      if (bias && packed->bias)
        packed->bias[column] = packed->is_bf16 ? to_float(static_cast<const bf16*>(bias)[r]) : static_cast<const float*>(bias)[r];
    }
    copy_rows(*packed, src, dst, width, count);
  }
}

void hfa_packed_linear(const HfaPacked* packed, const HfaLinearArgs* args) {
  if (args->num_rows <= 0 || packed->num_columns <= 0) return;
  if (packed->tiled)
    amx::run(*packed, *args);
  else if (packed->is_bf16)
    run<bf16>(*packed, *args);
  else
    run<float>(*packed, *args);
}
}
