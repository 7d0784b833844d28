// Vectors of sixteen 32-bit words, the number formats that a word can hold, and the one routine that multiplies.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));

template <class To, class From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Floats all(float value) { return value - Floats{}; }

inline float total(Floats v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

// The nearest bfloat16, ties to even, as a float32.
inline Floats to_bf16(Floats v) {
    Words w = bits<Words>(v);
    return bits<Floats>((w + 0x7fffu + ((w >> 16) & 1u)) & 0xffff0000u);
}
inline float to_bf16(float v) {
    uint32_t w = bits<uint32_t>(v);
    return bits<float>((w + 0x7fffu + ((w >> 16) & 1u)) & 0xffff0000u);
}

inline float largest(const float* x, int64_t count) {
    float best = x[0];
    int64_t i = 0;
    if (count >= LANES) {
        Floats most = load(x);
        for (i = LANES; i + LANES <= count; i += LANES) most = load(x + i) > most ? load(x + i) : most;
        for (int lane = 0; lane < LANES; lane++) best = std::max(best, most[lane]);
    }
    for (; i < count; i++) best = std::max(best, x[i]);
    return best;
}

inline float largest_size(const float* x, int64_t count) {
    Floats most{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats size = bits<Floats>(bits<Words>(load(x + i)) & 0x7fffffffu);
        most = size > most ? size : most;
    }
    float best = 0;
    for (int lane = 0; lane < LANES; lane++) best = std::max(best, most[lane]);
    for (; i < count; i++) best = std::max(best, std::fabs(x[i]));
    return best;
}

constexpr float MAGIC = 12582912.0f;  // adding it to a small number rounds to an integer, ties to even

// x = out (int8) times the returned scale, to the nearest of 255 levels: quantize_rows of packing.py, bit for bit.
inline float quantize(const float* x, int64_t count, uint8_t* out) {
    const float scale = std::max(largest_size(x, count), 1e-12f) / 127.0f;
    for (int64_t i = 0; i < count; i++) out[i] = uint8_t(int32_t((x[i] / scale + MAGIC) - MAGIC));
    return scale;
}

// e^x to about one unit in the last place; 0 below -87.
inline Floats exponential(Floats x) {
    Floats bounded = x > 88.0f ? all(88.0f) : x;
    bounded = bounded < -87.0f ? all(-87.0f) : bounded;
    Floats n = (bounded * 1.44269504f + MAGIC) - MAGIC;
    Floats r = bounded - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats result = p * bits<Floats>(power);
    return x < -87.0f ? Floats{} : result;
}

// ---- number formats: `PER` values in a word; `dot` adds their products with the broadcast input `x`, times `UNIT` ------

struct F32 {
    static constexpr int PER = 1;
    static constexpr float UNIT = 1;
    typedef uint32_t Input;
    typedef Floats Sum;
    static inline Sum dot(Sum sum, Words w, uint32_t x) { return sum + bits<Floats>(w) * bits<float>(x); }
};

struct BF16 {
    static constexpr int PER = 2;
    static constexpr float UNIT = 1;
    typedef uint32_t Input;
    typedef Floats Sum;
    static inline Sum dot(Sum sum, Words w, uint32_t x) {
#if defined(__AVX512BF16__)
        return bits<Floats>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(w), bits<__m512bh>(_mm512_set1_epi32(x))));
#else
        sum += bits<Floats>(w << 16) * bits<float>(x << 16);
        return sum + bits<Floats>(w & 0xffff0000u) * bits<float>(x & 0xffff0000u);
#endif
    }
};

struct I8 {  // weights are signed; activations are unsigned with 128 for zero, which Matrix::offset takes back
    static constexpr int PER = 4;
    typedef uint32_t Input;
    typedef Ints Sum;
    static inline Sum dot(Sum sum, Words w, uint32_t x) {
#if defined(__AVX512VNNI__)
        return bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sum), _mm512_set1_epi32(x), bits<__m512i>(w)));
#else
        Ints s = bits<Ints>(w);
        sum += ((s << 24) >> 24) * int32_t(x & 255u);
        sum += ((s << 16) >> 24) * int32_t((x >> 8) & 255u);
        sum += ((s << 8) >> 24) * int32_t((x >> 16) & 255u);
        return sum + (s >> 24) * int32_t(x >> 24);
#endif
    }
};

struct CachedI8 {  // int8 keys and values with float32 activations; who calls multiplies with their scales
    static constexpr int PER = 4;
    static constexpr float UNIT = 0x1p24f;  // a byte is converted where it is worth most: one operation less
    struct Input {
        uint32_t x[PER];
    };
    typedef Floats Sum;
    static inline Sum dot(Sum sum, Words w, Input input) {
        sum += __builtin_convertvector(bits<Ints>(w << 24), Floats) * bits<float>(input.x[0]);
        sum += __builtin_convertvector(bits<Ints>((w << 16) & 0xff000000u), Floats) * bits<float>(input.x[1]);
        sum += __builtin_convertvector(bits<Ints>((w << 8) & 0xff000000u), Floats) * bits<float>(input.x[2]);
        return sum + __builtin_convertvector(bits<Ints>(w & 0xff000000u), Floats) * bits<float>(input.x[3]);
    }
};

// sums[m][n] += over `words` steps: weight vector n (at w + n * block, advancing by `stride`) times input of row m.
// With AHEAD the vectors that many words further on are fetched into the cache meanwhile.
template <class Format, int M, int N, bool AHEAD = false>
inline void tile(typename Format::Sum (&sums)[M][N], const typename Format::Input* x, int64_t row, const uint32_t* w,
                 int64_t block, int64_t stride, int64_t words, int64_t ahead = 0) {
    typename Format::Sum own[M][N];  // registers: the compiler cannot know that `sums` is apart from the weights
    std::memcpy(&own, &sums, sizeof own);
    for (int64_t k = 0; k < words; k++) {
        Words weights[N];
        if (AHEAD)
            for (int n = 0; n < N; n++) __builtin_prefetch(w + n * block + k * stride + ahead, 0, 2);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) weights[n] = *reinterpret_cast<const Words*>(w + n * block + k * stride);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const typename Format::Input input = x[m * row + k];
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) own[m][n] = Format::dot(own[m][n], weights[n], input);
        }
    }
    std::memcpy(&sums, &own, sizeof own);
}

}  // namespace
