#include "packed_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>

namespace {

constexpr int64_t kPage = 4096, kHugePage = 2 << 20, kBlock = 32 << 20;

struct Block {
  int64_t size = 0, used = 0;
  int64_t live = 0;  // weights in it; the block goes back to the system with the last
};

std::mutex mutex;
std::map<char*, Block> blocks;      // by first byte
char* open_block = nullptr;         // the one that new weights go to

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Fresh zero pages, aligned to a huge page.
char* map_block(int64_t size) {
  void* raw = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(raw);
  char* start = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(begin), kHugePage));
  if (start > begin) munmap(begin, start - begin);
  if (start < begin + kHugePage) munmap(start + size, begin + kHugePage - start);
  madvise(start, size, MADV_HUGEPAGE);
  return start;
}

}  // namespace

namespace hfa {

void* weight_memory(int64_t size) {
  size = round_up(std::max<int64_t>(size, 1), kPage);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!open_block || blocks[open_block].used + size > blocks[open_block].size) {
    const int64_t block_size = round_up(std::max(size, kBlock), kHugePage);
    char* start = map_block(block_size);
    if (!start) return nullptr;
    blocks[start].size = block_size;
    open_block = start;
  }
  Block& block = blocks[open_block];
  char* memory = open_block + block.used;
  block.used += size;
  ++block.live;
  return memory;
}

void release_weight_memory(void* memory) {
  if (!memory) return;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = std::prev(blocks.upper_bound(static_cast<char*>(memory)));
  if (--found->second.live) return;
  if (found->first == open_block) open_block = nullptr;
  munmap(found->first, found->second.size);
  blocks.erase(found);
}

}  // namespace hfa
