// Memory for packed weights: side by side in blocks of huge pages, so that reading a model end to end misses few TLB entries
// even where a single weight is smaller than a huge page.
#pragma once
#include <cstdint>

namespace hfa {

// `size` bytes of zeros, aligned to 4096; null when memory is short. Any thread.
void* weight_memory(int64_t size);

// Gives back what weight_memory returned (null: nothing to do).
void release_weight_memory(void* memory);

}  // namespace hfa
