// Rows in token automata: their masks, and where tokens lead them; see token_states.py.
#include <algorithm>
#include <cstdint>

namespace {

struct ArenaState {
  int64_t automaton, first_move, base, low, low_span, high, high_span;
};

const ArenaState& state_of(const ArenaState* arena, int64_t state) { return arena[state & 0xFFFFFFFFll]; }

int64_t clip(int64_t value, int64_t most) { return std::min(std::max<int64_t>(value, 0), most); }

}  // namespace

extern "C" void hfa_token_mask_rows(const int64_t* states, int64_t states_stride, int64_t num_rows, const void* arena,
                                    const int32_t* rows, int32_t* out) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t state = states[i * states_stride], count = state >> 32;
    if (state < 0) {
      out[i] = -1;
      continue;
    }
    const ArenaState& known = state_of(static_cast<const ArenaState*>(arena), state);
    out[i] = rows[known.base + clip(count - known.low, known.low_span) + clip(count - known.high, known.high_span)];
  }
}

extern "C" void hfa_token_advance(const int64_t* states, int64_t states_stride, const int64_t* token_ids, int64_t ids_stride,
                                  int64_t num_rows, const void* arena, const int32_t* classes, int64_t vocab_size,
                                  const int32_t* moves, int64_t* out) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t state = states[i * states_stride];
    if (state <= 0) {
      out[i] = state;
      continue;
    }
    const ArenaState& known = state_of(static_cast<const ArenaState*>(arena), state);
    const int64_t token = clip(token_ids[i * ids_stride], vocab_size - 1);
    const int32_t* move = moves + 2 * (known.first_move + classes[known.automaton * vocab_size + token]);
    const int64_t count = (move[1] & 1 ? 0 : state >> 32) + (move[1] >> 1);
    out[i] = move[0] + count * (1ll << 32);
  }
}
