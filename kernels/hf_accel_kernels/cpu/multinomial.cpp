// One draw per row of a probability matrix, as torch.multinomial makes it from the CPU generator's Mersenne twister:
// every element takes two words, q = -log1p(-u) of their low 53 bits, and the first largest p / q of a row wins.
// Elements of probability 0 still take their words, but need no logarithm.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int kWords = 624, kMiddle = 397;

// The head of torch's serialized CPU generator; the cached normals behind it are left as they are.
struct GeneratorState {
    uint64_t seed;
    int32_t left, seeded;
    uint64_t next;
    uint64_t words[kWords];
};

inline uint32_t twist(uint32_t upper, uint32_t lower) {
    const uint32_t mixed = (upper & 0x80000000u) | (lower & 0x7fffffffu);
    return (mixed >> 1) ^ ((0u - (lower & 1u)) & 0x9908b0dfu);
}

// A bijection that keeps 0.
inline uint32_t temper(uint32_t y) {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

void refill(uint32_t* words) {
    for (int i = 0; i < kWords - kMiddle; ++i) words[i] = words[i + kMiddle] ^ twist(words[i], words[i + 1]);
    for (int i = kWords - kMiddle; i < kWords - 1; ++i)
        words[i] = words[i + kMiddle - kWords] ^ twist(words[i], words[i + 1]);
    words[kWords - 1] = words[kMiddle - 1] ^ twist(words[kWords - 1], words[0]);
}

// The first largest p / q of one row so far; a NaN counts as largest. Quotients are never negative.
struct Winner {
    int64_t index = 0;
    float value = 0.0f;
    bool is_nan = false;

    void offer(int64_t i, float p, uint32_t high, uint32_t low) {
        const uint64_t bits = (static_cast<uint64_t>(temper(high)) << 32 | temper(low)) & ((1ull << 53) - 1);
        const double u = static_cast<double>(bits) * 0x1p-53;
        // q >= u: an element with p / u below the largest so far cannot win; the margin covers the rounding of q.
        if (u * static_cast<double>(value) > static_cast<double>(p) * (1.0 + 1e-6)) return;
        const float quotient = p / static_cast<float>(-std::log1p(-u));
        if (is_nan || !(std::isnan(quotient) || quotient > value)) return;
        index = i;
        value = quotient;
        is_nan = std::isnan(quotient);
    }
};

inline bool any_nonzero(const float* p, int64_t n) {
    int found = 0;
    for (int64_t i = 0; i < n; ++i) found |= p[i] != 0.0f;
    return found != 0;
}

// p: [n], elements `first` to `first + n` of a row; words: [2 * n], untempered.
void offer_all(const float* p, int64_t n, const uint32_t* words, int64_t first, Winner& winner) {
    int zero_word = 0;
    for (int64_t i = 0; i < 2 * n; ++i) zero_word |= words[i] == 0;
    if (zero_word) {  // u may be 0, and 0 / 0 wins
        for (int64_t i = 0; i < n; ++i) winner.offer(first + i, p[i], words[2 * i], words[2 * i + 1]);
        return;
    }
    constexpr int64_t kChunk = 32;
    for (int64_t start = 0; start < n; start += kChunk) {
        const int64_t stop = std::min(n, start + kChunk);
        if (!(stop - start == kChunk ? any_nonzero(p + start, kChunk) : any_nonzero(p + start, stop - start))) continue;
        for (int64_t i = start; i < stop; ++i)
            if (p[i] != 0.0f) winner.offer(first + i, p[i], words[2 * i], words[2 * i + 1]);
    }
}

// Whether torch.multinomial takes the rows: finite, not negative, none without a positive element.
bool valid_rows(const float* probs, int64_t num_rows, int64_t vocab_size) {
    for (int64_t row = 0; row < num_rows; ++row) {
        const float* p = probs + row * vocab_size;
        int bad = 0, positive = 0;
        for (int64_t i = 0; i < vocab_size; ++i) {
            bad |= !(p[i] >= 0.0f) | !(p[i] < std::numeric_limits<float>::infinity());
            positive |= p[i] > 0.0f;
        }
        if (bad || !positive) return false;
    }
    return true;
}

}  // namespace

// probs: [num_rows, vocab_size]; state: a GeneratorState, advanced in place; out: [num_rows]. Returns 1, or 0 with
// nothing changed where the rows or the state are not what torch's generator and multinomial work on.
extern "C" int32_t hfa_multinomial(const float* probs, int64_t num_rows, int64_t vocab_size, void* state, int64_t* out) {
    GeneratorState generator;
    std::memcpy(&generator, state, sizeof generator);
    const bool exhausted = generator.left == 1;
    const bool consistent = generator.left > 1 && generator.left <= kWords &&
                            generator.next == static_cast<uint64_t>(kWords + 1 - generator.left);
    if (generator.seeded != 1 || !(exhausted || consistent)) return 0;
    if (num_rows < 1 || vocab_size < 1 || !valid_rows(probs, num_rows, vocab_size)) return 0;
    uint32_t words[kWords];
    for (int i = 0; i < kWords; ++i) words[i] = static_cast<uint32_t>(generator.words[i]);
    int64_t next = exhausted ? kWords : static_cast<int64_t>(generator.next);
    for (int64_t row = 0; row < num_rows; ++row) {
        const float* p = probs + row * vocab_size;
        Winner winner;
        for (int64_t i = 0; i < vocab_size;) {
            if (next == kWords) {
                refill(words);
                next = 0;
            }
            if (next == kWords - 1) {  // the element's two words lie in two blocks
                uint32_t pair[2] = {words[next], 0};
                refill(words);
                pair[1] = words[0];
                offer_all(p + i, 1, pair, i, winner);
                next = 1, i += 1;
                continue;
            }
            const int64_t n = std::min((kWords - next) / 2, vocab_size - i);
            offer_all(p + i, n, words + next, i, winner);
            next += 2 * n, i += n;
        }
        out[row] = winner.index;
    }
    for (int i = 0; i < kWords; ++i) generator.words[i] = words[i];
    generator.next = static_cast<uint64_t>(next);
    generator.left = static_cast<int32_t>(kWords + 1 - next);
    std::memcpy(state, &generator, sizeof generator);
    return 1;
}
