// Drawing a token from logits: temperature, top-k, and noise that is a function of (seed, position, token).
#pragma once

#include <functional>
#include <vector>

#include "vectors.h"

namespace {

// Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).
inline void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ key1,
                                  uint32_t(a)};
        std::memcpy(c, next, sizeof c);
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

// Order-preserving integer of a float.
inline uint32_t ranked(float v) {
    const uint32_t w = bits<uint32_t>(v);
    return w & 0x80000000u ? ~w : w | 0x80000000u;
}

// The k-th largest of `count` values, as ranked(): a histogram of the leading bits, then a partition of one bin.
uint32_t kth_largest(const float* x, int64_t count, int64_t k, std::vector<uint32_t>& bin) {
    constexpr int SHIFT = 20;
    std::vector<int32_t> histogram(1 << (32 - SHIFT), 0);
    for (int64_t i = 0; i < count; i++) histogram[ranked(x[i]) >> SHIFT]++;
    int64_t above = 0;
    uint32_t which = uint32_t(histogram.size()) - 1;
    while (above + histogram[which] < k) above += histogram[which--];
    bin.clear();
    for (int64_t i = 0; i < count; i++)
        if (ranked(x[i]) >> SHIFT == which) bin.push_back(ranked(x[i]));
    std::nth_element(bin.begin(), bin.begin() + (k - above - 1), bin.end(), std::greater<uint32_t>());
    return bin[k - above - 1];
}

// Random words of the tokens 16 i .. 16 i + 15: four blocks of four.
inline void random_words(int64_t i, uint32_t position, uint64_t seed, uint32_t (&words)[LANES]) {
    for (int64_t block = 0; block < 4; block++) {
        uint32_t four[4] = {uint32_t(4 * i + block), position, 0, 0};
        philox(four, uint32_t(seed), uint32_t(seed >> 32));
        std::memcpy(words + 4 * block, four, sizeof four);
    }
}

// One token of `logits` (vocab,): the best, or with `seed` argmax of p / e, e exponential by (seed, position, token).
int64_t draw_row(const float* logits, int64_t vocab, float temperature, int64_t top_k, const uint64_t* seed,
                 uint32_t position, float* x, std::vector<uint32_t>& bin) {
    for (int64_t i = 0; i < vocab; i++) x[i] = logits[i] / temperature;
    const float best = largest(x, vocab);
    int64_t token = std::find(x, x + vocab, best) - x;
    if (!seed || token == vocab) return std::min(token, vocab - 1);  // all NaN: the last, rather than nowhere
    const uint32_t least = top_k > 0 && top_k < vocab ? kth_largest(x, vocab, top_k, bin) : 0;
    float winner = -1;
    int64_t drawn = -1;
    uint32_t words[LANES] = {};
    for (int64_t i = 0; i < vocab; i++) {
        if (ranked(x[i]) < least) continue;
        if (i / LANES != drawn) random_words(drawn = i / LANES, position, *seed, words);
        const float share = std::exp(x[i] - best), u = (float(words[i % LANES]) + 0.5f) * 0x1p-32f;
        if (share <= winner * u) continue;  // e = -log(1 - u) is at least u
        const float ratio = share / -std::log1p(-u);
        if (ratio > winner) winner = ratio, token = i;
    }
    return token;
}

}  // namespace
