// The passes of moe_experts.h for groups of many bfloat16 tokens, through matrix tiles. The gated activations are written
// in the packed order that the down projection reads.
#pragma once
#include "moe_experts.h"
#include "moe_tiles.h"

#if defined(HFA_TILES)
namespace hfa {
namespace moe {

struct TileLayer {
  const Layer<bf16>& layer;
  std::vector<int64_t> starts;  // of each group's sixteens of tokens, by its place in Groups::groups; -1: not in tiles
  int64_t sixteens = 0;
  Buffer<bf16> inputs, gated;  // [sixteens][tile_steps(hidden_size or intermediate_size)][kTileSize]

  TileLayer(const Layer<bf16>& layer, int64_t least_tokens) : layer(layer) {
    for (const Group& group : layer.chosen.groups) {
      const bool taken = group.count >= least_tokens;
      starts.push_back(taken ? sixteens : -1);
      if (taken) sixteens += (group.count + kTile - 1) / kTile;
    }
    inputs = allocate<bf16>(sixteens * input_size());
    gated = allocate<bf16>(sixteens * gated_size());
  }
  int64_t input_size() const { return tile_steps(layer.args.hidden_size) * kTileSize; }
  int64_t gated_size() const { return tile_steps(layer.args.intermediate_size) * kTileSize; }

  void pack_group(int64_t index) {
    const Group& group = layer.chosen.groups[index];
    for (int64_t m = 0; m < group.count; m += kTile) {
      const bf16* x[kTile] = {};
      for (int64_t i = 0; i < std::min(kTile, group.count - m); ++i) x[i] = layer.inputs[group.first + m + i];
      pack_tokens(x, layer.args.hidden_size, inputs.get() + (starts[index] + m / kTile) * input_size());
    }
  }
};

// Two packed groups of tokens at `x`, `size` elements each, or one.
inline void products(const bf16* const (&w)[2], int64_t rows, int64_t depth, const bf16* x, int64_t size, bool both,
                     float (*sums)[256], Fetch& fetch) {
  const bf16* const inputs[2] = {x, x + size};
  if (both) tile_products<true>(w, depth, rows, depth, inputs, sums, fetch);
  if (!both) tile_products<false>(w, depth, rows, depth, inputs, sums, fetch);
}

// Rows [row, row + rows) of the gated activations of 16 tokens, into their packed tiles [steps][kTileSize].
inline void store_gated(const HfaMoeArgs& args, int64_t row, int64_t rows, const float* gate, const float* up, bf16* out) {
  auto value = [&](int64_t r) {
    if (r >= rows) return vuint{};
    const vfloat g = held<bf16>(load(gate + r * kTile)), u = held<bf16>(load(up + r * kTile));
    return (vuint)gated<bf16>(args.activation, g, u);
  };
  const int64_t end = row + rows == args.intermediate_size ? kTileDepth - row % kTileDepth : rows;
  out += row / kTileDepth * kTileSize + row % kTileDepth * kTile;
  for (int64_t r = 0; r < end; r += 2, out += 2 * kTile) {
    const vuint pair = (value(r) >> 16) | value(r + 1);
    std::memcpy(out, &pair, sizeof pair);
  }
}

inline void gate_up_block(TileLayer& tiles, int64_t index, int64_t row, const bf16* next_gate, const bf16* next_up) {
  const Layer<bf16>& layer = tiles.layer;
  const HfaMoeArgs& args = layer.args;
  const Group& group = layer.chosen.groups[index];
  const int64_t end = std::min(row + kBlock, args.intermediate_size);
  const int64_t sixteens = (group.count + kTile - 1) / kTile;
  const bf16* inputs = tiles.inputs.get() + tiles.starts[index] * tiles.input_size();
  bf16* out = tiles.gated.get() + tiles.starts[index] * tiles.gated_size();
  alignas(64) float sums[4][256];
  for (int64_t r = row; r < end; r += kTile) {
    const int64_t rows = std::min(kTile, end - r);
    const bool more = r + kTile < end;
    const bf16* const w[2] = {layer.gate(group, r), layer.up(group, r)};
    Fetch fetch(more ? layer.gate(group, r + kTile) : next_gate, more ? layer.up(group, r + kTile) : next_up,
                (sixteens + 1) / 2);
    configure(rows);
    for (int64_t s = 0; s < sixteens; s += 2) {
      const bool both = s + 1 < sixteens;
      const bf16* x = inputs + s * tiles.input_size();
      products(w, rows, args.hidden_size, x, tiles.input_size(), both, sums, fetch);
      for (int64_t j = 0; j < (both ? 2 : 1); ++j)
        store_gated(args, r, rows, sums[j], sums[2 + j], out + (s + j) * tiles.gated_size());
    }
  }
}

// y [16 rows][16 tokens] of the group's tokens [first, first + count), weighted, to their sums at column `column`.
inline void add_tile(const Layer<bf16>& layer, int64_t first, int64_t count, const float* y, int64_t column, float* sums) {
  __m512i v[16];
  for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(y + 16 * i);
  transpose(v);
  for (int64_t m = 0; m < count; ++m) {
    float* token_sums = sums + layer.chosen.tokens[first + m] * kBlock + column;
    add_weighted<bf16>(layer.args, layer.chosen.weights[first + m], (vfloat)v[m], token_sums);
  }
}

inline void down_block(const TileLayer& tiles, int64_t index, int64_t row, const bf16* next, float* sums) {
  const Layer<bf16>& layer = tiles.layer;
  const HfaMoeArgs& args = layer.args;
  const Group& group = layer.chosen.groups[index];
  const int64_t end = std::min(row + kBlock, args.hidden_size), depth = args.intermediate_size;
  const int64_t sixteens = (group.count + kTile - 1) / kTile;
  const bf16* inputs = tiles.gated.get() + tiles.starts[index] * tiles.gated_size();
  alignas(64) float y[4][256];
  for (int64_t r = row; r < end;) {
    const int64_t blocks = r + 2 * kTile <= end ? 2 : 1, rows = std::min(kTile, end - r);
    const bf16* const w[2] = {layer.down(group, r), layer.down(group, r + (blocks - 1) * kTile)};
    const bf16* following = r + blocks * kTile < end ? layer.down(group, r + blocks * kTile) : next;
    Fetch fetch(following, following + kTile * depth, (sixteens + 1) / 2);
    configure(rows);
    for (int64_t s = 0; s < sixteens; s += 2) {
      const bool both = s + 1 < sixteens;
      const bf16* x = inputs + s * tiles.gated_size();
      products(w, rows, depth, x, tiles.gated_size(), both, y, fetch);
      for (int64_t i = 0; i < blocks; ++i)
        for (int64_t j = 0; j < (both ? 2 : 1); ++j) {
          const int64_t m = (s + j) * kTile;
          add_tile(layer, group.first + m, std::min(kTile, group.count - m), y[2 * i + j], r - row + i * kTile, sums);
        }
    }
    r += blocks * kTile;
  }
}

}  // namespace moe
}  // namespace hfa
#endif
