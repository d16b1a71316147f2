// Packed token masks on logits: forbidden tokens become -inf; see token_bitmask.py.
#include <cstdint>
#include <cstring>

namespace {

// Values move as bit patterns, so one template serves every dtype of a width.
template <typename Bits>
void mask_row(const Bits* from, Bits* to, int64_t vocab_size, const uint32_t* words, int64_t num_words, Bits forbidden) {
  const int64_t covered = num_words * 32 < vocab_size ? num_words * 32 : vocab_size;
  for (int64_t first = 0; first < covered; first += 32) {
    const uint32_t word = words[first / 32];
    const int64_t count = covered - first < 32 ? covered - first : 32;
    if (word == 0xFFFFFFFFu) {
      if (to != from) std::memcpy(to + first, from + first, count * sizeof(Bits));
    } else if (word == 0) {
      for (int64_t j = 0; j < count; ++j) to[first + j] = forbidden;
    } else {
      for (int64_t j = 0; j < count; ++j) to[first + j] = (word >> j) & 1 ? from[first + j] : forbidden;
    }
  }
  for (int64_t j = covered; j < vocab_size; ++j) to[j] = forbidden;
}

template <typename Bits>
void mask_rows_of(const void* from, void* to, int64_t from_stride, int64_t to_stride, int64_t num_rows, int64_t vocab_size,
                  const uint32_t* bitmask, int64_t num_words, const int32_t* mask_rows, Bits forbidden, int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t row = 0; row < num_rows; ++row) {
    const Bits* source = static_cast<const Bits*>(from) + row * from_stride;
    Bits* target = static_cast<Bits*>(to) + row * to_stride;
    const int64_t mask = mask_rows == nullptr ? row : mask_rows[row];
    if (mask >= 0) {
      mask_row(source, target, vocab_size, bitmask + mask * num_words, num_words, forbidden);
    } else if (source != target) {
      std::memcpy(target, source, vocab_size * sizeof(Bits));
    }
  }
}

}  // namespace

// `forbidden` is -inf's bit pattern in the dtype; strides are in values; `to` may be `from`.
extern "C" void hfa_token_bitmask(const void* from, void* to, int64_t from_stride, int64_t to_stride, int64_t num_rows,
                                  int64_t vocab_size, const uint32_t* bitmask, int64_t num_words, const int32_t* mask_rows,
                                  int32_t bytes_per_value, uint32_t forbidden, int32_t num_threads) {
  if (bytes_per_value == 4) {
    mask_rows_of<uint32_t>(from, to, from_stride, to_stride, num_rows, vocab_size, bitmask, num_words, mask_rows, forbidden,
                           num_threads);
  } else {
    mask_rows_of<uint16_t>(from, to, from_stride, to_stride, num_rows, vocab_size, bitmask, num_words, mask_rows,
                           static_cast<uint16_t>(forbidden), num_threads);
  }
}
