// One 64-bit fingerprint of a strided sample of many memory ranges.
#include <cstdint>
#include <cstring>

namespace {

// Offset in bytes of sample `j` of `num_samples` 8-byte words spread over `num_bytes` (at least 8): first and last included.
inline int64_t sample_offset(int64_t num_bytes, int64_t num_samples, double words_per_sample, int64_t j) {
    if (j == num_samples - 1) return num_bytes - 8;  // the last word, aligned or not
    return 8 * static_cast<int64_t>(static_cast<double>(j) * words_per_sample);
}

// Every step is a bijection of the state, so a change of one sampled word always changes the result.
inline uint64_t mix(uint64_t state, uint64_t word) {
    state = (state ^ word) * 0x9E3779B97F4A7C15ull;
    return state ^ (state >> 29);
}

}  // namespace

// ptrs, num_bytes: [n]; samples: at most so many 8-byte words of each range are read (at least 2). Where a range
// has few words, consecutive ones may overlap at its end.
extern "C" uint64_t hfa_fingerprint(const void* const* ptrs, const int64_t* num_bytes, int64_t n, int64_t samples,
                                    uint64_t seed) {
    uint64_t state = mix(seed, static_cast<uint64_t>(n));
    for (int64_t i = 0; i < n; ++i) {
        state = mix(state, static_cast<uint64_t>(num_bytes[i]));
        if (num_bytes[i] < 8) {
            uint64_t word = 0;
            if (num_bytes[i] > 0) std::memcpy(&word, ptrs[i], static_cast<size_t>(num_bytes[i]));
            state = mix(state, word);
            continue;
        }
        const char* base = static_cast<const char*>(ptrs[i]);
        const int64_t words = (num_bytes[i] + 7) / 8, count = words < samples ? words : samples;
        const double words_per_sample = count > 1 ? static_cast<double>(words - 1) / static_cast<double>(count - 1) : 0.0;
        for (int64_t j = 0; j < count; ++j) {
            uint64_t word;
            std::memcpy(&word, base + sample_offset(num_bytes[i], count, words_per_sample, j), 8);
            state = mix(state, word);
        }
    }
    return state;
}
