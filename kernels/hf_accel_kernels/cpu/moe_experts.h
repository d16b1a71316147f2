// The two passes of a layer of experts, cut into items that threads claim: gate, up and activation by (group, rows of the
// intermediate size), then down and the weighted sum by rows of the hidden size. This form takes any type and count.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "moe_dot.h"
#include "moe_groups.h"

namespace hfa {
namespace moe {

constexpr int64_t kBlock = 64;   // rows of weights in one item
constexpr int64_t kChunk = 96;   // activations whose sums are held at once

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], FreeMemory>;

// 64-byte aligned, uninitialized.
template <typename T>
Buffer<T> allocate(int64_t count) {
  void* memory = nullptr;
  if (count && posix_memalign(&memory, 64, count * sizeof(T))) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

// Each thread knows the item after its own, so that its weights can be asked for in time.
template <typename F>
void claim_items(std::atomic<int64_t>& counter, int64_t count, F process) {
  for (int64_t item = counter++; item < count;) {
    const int64_t next = counter++;
    process(item, std::min(next, count - 1));
    item = next;
  }
}

inline int64_t blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

template <typename T>
struct Layer {
  const HfaMoeArgs& args;
  Groups chosen;
  std::vector<const T*> inputs, gated;  // rows of hidden, and of gated_rows, beside chosen.tokens
  Buffer<T> gated_rows;                 // [pairs, intermediate_size]

  const T* gate(const Group& group, int64_t row) const {
    const int64_t rows = group.expert * 2 * args.intermediate_size + row;
    return static_cast<const T*>(args.gate_up) + rows * args.hidden_size;
  }
  const T* up(const Group& group, int64_t row) const { return gate(group, args.intermediate_size + row); }
  const T* down(const Group& group, int64_t row) const {
    return static_cast<const T*>(args.down) + (group.expert * args.hidden_size + row) * args.intermediate_size;
  }
};

template <typename T>
void store_first(T* out, vfloat v, int64_t count) {
  if (count >= kWidth) return store(out, v);
  T lanes[kWidth];
  store(lanes, v);
  std::memcpy(out, lanes, count * sizeof(T));
}

template <typename T>
void gate_up_block(Layer<T>& layer, const Group& group, int64_t row, const T* next) {
  const HfaMoeArgs& args = layer.args;
  const int64_t rows = std::min(kBlock, args.intermediate_size - row);
  alignas(64) float gate[kChunk * kBlock], up[kChunk * kBlock];
  for (int64_t m = 0; m < group.count; m += kChunk) {
    const int64_t count = std::min(kChunk, group.count - m);
    const T* const* x = layer.inputs.data() + group.first + m;
    const int64_t depth = args.hidden_size;
    Dots<T>{layer.gate(group, row), rows, depth, x, count, gate, kBlock, layer.up(group, row)}.run();
    Dots<T>{layer.up(group, row), rows, depth, x, count, up, kBlock, next}.run();
    for (int64_t i = 0; i < count; ++i) {
      T* out = layer.gated_rows.get() + (group.first + m + i) * args.intermediate_size + row;
      for (int64_t r = 0; r < rows; r += kWidth) {
        const vfloat g = held<T>(load(gate + i * kBlock + r)), u = held<T>(load(up + i * kBlock + r));
        store_first(out + r, gated<T>(args.activation, g, u), rows - r);
      }
    }
  }
}

// sums [kBlock] of the token that place `place` of the groups belongs to: += y, an expert's output, times its weight.
template <typename T>
inline void add_weighted(const HfaMoeArgs& args, float weight, vfloat y, float* sums) {
  y = held<T>(y) * weight;
  store(sums, load(sums) + (args.round_weighted ? held<T>(y) : y));
}

// sums [num_tokens, kBlock] += the group's output rows [row, row + kBlock), weighted.
template <typename T>
void down_block(const Layer<T>& layer, const Group& group, int64_t row, const T* next, float* sums) {
  const HfaMoeArgs& args = layer.args;
  const int64_t rows = std::min(kBlock, args.hidden_size - row);
  alignas(64) float y[kChunk * kBlock];
  for (int64_t m = 0; m < group.count; m += kChunk) {
    const int64_t count = std::min(kChunk, group.count - m), first = group.first + m;
    const T* const* x = layer.gated.data() + first;
    Dots<T>{layer.down(group, row), rows, args.intermediate_size, x, count, y, kBlock, next}.run();
    for (int64_t i = 0; i < count; ++i) {
      float* token_sums = sums + layer.chosen.tokens[first + i] * kBlock;
      const float weight = layer.chosen.weights[first + i];
      for (int64_t r = 0; r < rows; r += kWidth)
        add_weighted<T>(args, weight, load(y + i * kBlock + r), token_sums + r);
    }
  }
}

template <typename T>
void store_block(const HfaMoeArgs& args, int64_t row, const float* sums) {
  const int64_t rows = std::min(kBlock, args.hidden_size - row);
  for (int64_t t = 0; t < args.num_tokens; ++t, sums += kBlock)
    for (int64_t r = 0; r < rows; r += kWidth)
      store_first(static_cast<T*>(args.out) + t * args.out_stride + row + r, load(sums + r), rows - r);
}

}  // namespace moe
}  // namespace hfa
