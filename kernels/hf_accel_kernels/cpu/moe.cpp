#include "moe.h"

#include <omp.h>

#include "moe_experts.h"
#include "moe_tile_experts.h"

using namespace hfa;
using namespace hfa::moe;

namespace {

constexpr int32_t kTileTokens = 4;

// Groups through matrix tiles, where the type and the machine have them: none here.
template <typename T>
struct Tiles {
  explicit Tiles(const Layer<T>&) {}
  int64_t num_packed() const { return 0; }
  void pack(int64_t) {}
  bool gate_up(int64_t, int64_t, const T*, const T*) { return false; }
  bool down(int64_t, int64_t, const T*, float*) { return false; }
  void release() {}
};

#if defined(HFA_TILES)
template <>
struct Tiles<bf16> {
  std::unique_ptr<TileLayer> tiles;

  explicit Tiles(const Layer<bf16>& layer) {
    if (!tiles_allowed()) return;
    tiles = std::make_unique<TileLayer>(layer, kTileTokens);
    if (!tiles->sixteens) tiles.reset();
  }
  bool takes(int64_t index) const { return tiles && tiles->starts[index] >= 0; }
  int64_t num_packed() const { return tiles ? tiles->starts.size() : 0; }
  void pack(int64_t index) {
    if (takes(index)) tiles->pack_group(index);
  }
  bool gate_up(int64_t index, int64_t row, const bf16* next_gate, const bf16* next_up) {
    if (takes(index)) gate_up_block(*tiles, index, row, next_gate, next_up);
    return takes(index);
  }
  bool down(int64_t index, int64_t row, const bf16* next, float* sums) {
    if (takes(index)) down_block(*tiles, index, row, next, sums);
    return takes(index);
  }
  void release() {
    if (tiles) _tile_release();
  }
};
#endif

struct Counters {
  std::atomic<int64_t> pack{0}, gate_up{0}, down{0};
};

template <typename T>
void gate_up_item(Layer<T>& layer, Tiles<T>& tiles, int64_t item, int64_t next) {
  const int64_t blocks = blocks_of(layer.args.intermediate_size);
  const Group &group = layer.chosen.groups[item / blocks], &next_group = layer.chosen.groups[next / blocks];
  const int64_t row = item % blocks * kBlock, next_row = next % blocks * kBlock;
  const T *next_gate = layer.gate(next_group, next_row), *next_up = layer.up(next_group, next_row);
  if (!tiles.gate_up(item / blocks, row, next_gate, next_up)) gate_up_block(layer, group, row, next_gate);
}

template <typename T>
void down_item(const Layer<T>& layer, Tiles<T>& tiles, int64_t row, int64_t next_row, float* sums) {
  const std::vector<Group>& groups = layer.chosen.groups;
  const int64_t count = groups.size();
  std::fill(sums, sums + layer.args.num_tokens * kBlock, 0.f);
  for (int64_t g = 0; g < count; ++g) {
    const T* next = g + 1 < count ? layer.down(groups[g + 1], row) : layer.down(groups[0], next_row);
    if (!tiles.down(g, row, next, sums)) down_block(layer, groups[g], row, next, sums);
  }
  store_block<T>(layer.args, row, sums);
}

template <typename T>
int32_t run(const HfaMoeArgs& args) {
  Layer<T> layer{args, {}, {}, {}, {}};
  if (!layer.chosen.fill(args)) return HFA_MOE_BAD_EXPERT;
  const int64_t pairs = layer.chosen.tokens.size();
  layer.gated_rows = allocate<T>(pairs * args.intermediate_size);
  for (int64_t i = 0; i < pairs; ++i) {
    layer.inputs.push_back(static_cast<const T*>(args.hidden) + layer.chosen.tokens[i] * args.hidden_stride);
    layer.gated.push_back(layer.gated_rows.get() + i * args.intermediate_size);
  }
  Tiles<T> tiles(layer);
  const int64_t gate_up_items = layer.chosen.groups.size() * blocks_of(args.intermediate_size);
  const int64_t down_items = blocks_of(args.hidden_size);
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(args.num_threads, down_items)));
  Buffer<float> sums = allocate<float>(threads * args.num_tokens * kBlock);
  Counters counters;
  auto work = [&](int thread, auto wait) {
    float* own = sums.get() + thread * args.num_tokens * kBlock;
    claim_items(counters.pack, tiles.num_packed(), [&](int64_t item, int64_t) { tiles.pack(item); });
    wait();
    claim_items(counters.gate_up, gate_up_items,
                [&](int64_t item, int64_t next) { gate_up_item(layer, tiles, item, next); });
    wait();
    claim_items(counters.down, down_items,
                [&](int64_t item, int64_t next) { down_item(layer, tiles, item * kBlock, next * kBlock, own); });
    tiles.release();
  };
  if (threads == 1) {
    work(0, [] {});
    return HFA_MOE_OK;
  }
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num(), [] {
#pragma omp barrier
  });
  return HFA_MOE_OK;
}

}  // namespace

extern "C" {

int32_t hfa_moe_tile_tokens(void) {
#if defined(HFA_TILES)
  return tiles_allowed() ? kTileTokens : 0;
#else
  return 0;
#endif
}

int32_t hfa_moe_experts(const HfaMoeArgs* args) {
  try {
    if (args->dtype == 0) return run<float>(*args);
    if (args->dtype == 1) return run<bf16>(*args);
#if defined(HFA_HALF)
    if (args->dtype == 2) return run<half>(*args);
#endif
    return HFA_MOE_BAD_DTYPE;
  } catch (const std::bad_alloc&) {
    return HFA_MOE_NO_MEMORY;
  }
}
}
