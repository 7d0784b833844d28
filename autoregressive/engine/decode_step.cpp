// One decoding step of the GPT on a CPU: all blocks and the output layer for a few rows at one position.
//
// Compiled on first use by compiler.py with -march=native; without AVX-512 BF16 or VNNI the same source uses what the
// compiler makes of its vector types. Everything is a stream of 64-byte vectors of sixteen 32-bit words: a word holds one
// float32, two bfloat16 or four int8 that lie next to each other along the axis that is summed over, and its place in
// the vector is the output (or the cached position) it belongs to. So one routine, `tile`, does every product.
//
// A result does not depend on how many rows are computed beside it, nor on the number of threads.

#include <limits>
#include <type_traits>

#include "draw.h"
#include "threads.h"
#include "vectors.h"

// ---- what Python hands over (native.py declares the same structures) -------------------------------------------------

extern "C" {

struct Matrix {           // (outputs, inputs), packed as (blocks, words, 16)
    const uint32_t* data;
    const float* scale;   // int8: (outputs,), else null
    const float* offset;  // int8: (outputs,): 128 times the sum of the weights
    int64_t blocks;       // of 16 outputs; an even number
    int64_t words;        // of one output
};

struct Layer {
    Matrix qkv, out, gate, down;  // gate: blocks of w1 and of w3 in turn
    const float* attention_norm;
    const float* ffn_norm;
};

struct Model {
    int64_t dim, layers, heads, kv_heads, head_dim, hidden, vocab;
    float eps;
    int32_t int8;     // weights and activations of the matrices are int8
    int32_t rounded;  // activations (and keys and values, unless they are int8) are bfloat16, else float32
    const Layer* layer;
    Matrix head;
    const float* norm;
    const float* rotary;  // (positions, head_dim / 2, 2): cos, sin
};

struct Step {
    int64_t rows, position, threads;
    int64_t capacity_rows, capacity_positions;  // of the caches
    int64_t width;           // of one row of `wide` and of `packed`
    int64_t bias_length;     // 0, or the columns of `bias`
    float* h;                // (rows, dim): the input, then the residual stream
    float* wide;             // (rows, width)
    uint32_t* packed;        // (rows, width): the input of the next product
    float* row_scale;        // (rows,)
    uint32_t* keys;          // (layers, rows, kv_heads, positions / 16, words of a head, 16)
    uint32_t* values;        // (layers, rows, kv_heads, words of the positions, blocks of a head, 16)
    float* key_scale;        // int8 keys: (layers, rows, kv_heads, positions), else null
    float* value_scale;      // int8 values: the same
    const float* bias;       // (rows, bias_length): 0, or -inf where a condition is padded
    float* logits;           // (rows, vocab)
};

}  // extern "C"

namespace {

// ---- the step --------------------------------------------------------------------------------------------------------

// Keys and values of one row and key head in one layer.
struct Cached {
    uint32_t *keys, *values;
    float *key_scale, *value_scale;  // (positions,) of CachedI8
};

template <class Weights, bool ROUNDED>
class Decoder {
    typedef std::conditional_t<ROUNDED, BF16, F32> Own;  // format of queries, and of keys and values that are not int8

  public:
    Decoder(const Model& model, const Step& step)
        : m(model), s(step), barrier(int(step.threads)), turns(PHASES * step_phases()) {}

    void run() {
        pool().run(int(s.threads), [this](int) { work(); });
    }

  private:
    static constexpr int PHASES = 9;
    const Model& m;
    const Step& s;
    Barrier barrier;
    std::vector<std::atomic<int64_t>> turns;  // one counter for each phase of the step

    int64_t step_phases() const { return m.layers + 1; }

    // All threads together: body(0) .. body(count - 1), whoever is free; then wait for each other.
    template <class Body>
    void each(int64_t& phase, int64_t count, const Body& body) {
        std::atomic<int64_t>& turn = turns[phase++];
        const int64_t chunk = std::max<int64_t>(1, count / (s.threads * 4));  // neighbours in memory stay together
        for (int64_t i; (i = turn.fetch_add(chunk, std::memory_order_relaxed)) < count;)
            for (int64_t j = i; j < std::min(i + chunk, count); j++) body(j);
        barrier.wait();
    }

    static inline Floats round(Floats v) { return ROUNDED ? to_bf16(v) : v; }
    static inline float round(float v) { return ROUNDED ? to_bf16(v) : v; }

    void work() {
        int64_t phase = 0;
        for (int64_t i = 0; i < m.layers; i++) {
            const Layer& layer = m.layer[i];
            each(phase, s.rows, [&](int64_t r) { normalise(r, layer.attention_norm); });
            product(phase, layer.qkv, [&](int64_t r, int64_t block, Floats a, Floats b) {
                float* out = s.wide + r * s.width + block * LANES;
                store(out, round(a)), store(out + LANES, round(b));
            });
            each(phase, s.rows * m.kv_heads, [&](int64_t item) {
                const int64_t r = item / m.kv_heads, g = item % m.kv_heads;
                if (s.key_scale) attend<CachedI8>(i, r, g);
                else attend<Own>(i, r, g);
            });
            each(phase, s.rows, [&](int64_t r) { pack(r, s.wide + r * s.width, m.heads * m.head_dim); });
            product(phase, layer.out, [&](int64_t r, int64_t b, Floats x, Floats y) { add(r, b, x, y); });
            each(phase, s.rows, [&](int64_t r) { normalise(r, layer.ffn_norm); });
            product(phase, layer.gate, [&](int64_t r, int64_t block, Floats a, Floats b) {
                a = round(a), b = round(b);
                store(s.wide + r * s.width + block / 2 * LANES, round(round(a / (1.0f + exponential(-a))) * b));
            });
            each(phase, s.rows, [&](int64_t r) { pack(r, s.wide + r * s.width, m.hidden); });
            product(phase, layer.down, [&](int64_t r, int64_t b, Floats x, Floats y) { add(r, b, x, y); });
        }
        each(phase, s.rows, [&](int64_t r) { normalise(r, m.norm); });
        product(phase, m.head, [&](int64_t r, int64_t block, Floats a, Floats b) {
            put(s.logits + r * m.vocab, block * LANES, m.vocab, round(a));
            put(s.logits + r * m.vocab, block * LANES + LANES, m.vocab, round(b));
        });
    }

    static void put(float* row, int64_t first, int64_t length, Floats v) {
        if (first + LANES <= length) return store(row + first, v);
        for (int64_t i = first; i < length; i++) row[i] = v[i - first];
    }

    void add(int64_t r, int64_t block, Floats a, Floats b) {
        float* row = s.h + r * m.dim;
        for (int half = 0; half < 2; half++) {
            const int64_t first = (block + half) * LANES;
            const Floats more = round(half ? b : a);
            if (first + LANES <= m.dim) store(row + first, round(load(row + first) + more));
            else for (int64_t i = first; i < m.dim; i++) row[i] = round(row[i] + more[i - first]);
        }
    }

    // RMSNorm of row r, packed for the next product.
    void normalise(int64_t r, const float* weight) {
        const float* h = s.h + r * m.dim;
        Floats squares{};
        int64_t i = 0;
        for (; i + LANES <= m.dim; i += LANES) squares += load(h + i) * load(h + i);
        float sum = total(squares);
        for (; i < m.dim; i++) sum += h[i] * h[i];
        const float scale = 1.0f / std::sqrt(sum / float(m.dim) + m.eps);
        float* out = s.wide + r * s.width;
        for (i = 0; i + LANES <= m.dim; i += LANES)
            store(out + i, round(round(load(h + i) * scale) * load(weight + i)));
        for (; i < m.dim; i++) out[i] = round(round(h[i] * scale) * weight[i]);
        pack(r, out, m.dim);
    }

    // Row r of the next product's input, in the format of the weights; padding words are zero.
    void pack(int64_t r, const float* x, int64_t count) {
        uint32_t* words = s.packed + r * s.width;
        if (Weights::PER == 1) {
            std::memcpy(words, x, count * sizeof(float));
        } else if (Weights::PER == 2) {
            pack_bf16(words, x, count);
        } else {
            pack_int8(r, words, x, count);
        }
    }

    static void pack_bf16(uint32_t* words, const float* x, int64_t count) {
        int64_t i = 0;
#if defined(__AVX512BF16__)
        for (; i + 2 * LANES <= count; i += 2 * LANES) {
            const __m512 low = bits<__m512>(load(x + i)), high = bits<__m512>(load(x + i + LANES));
            const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
            std::memcpy(words + i / 2, &both, sizeof both);
        }
#endif
        for (; i + 1 < count; i += 2)
            words[i / 2] = bits<uint32_t>(to_bf16(x[i])) >> 16 | bits<uint32_t>(to_bf16(x[i + 1]));
        if (count % 2) words[count / 2] = bits<uint32_t>(to_bf16(x[count - 1])) >> 16;
    }

    void pack_int8(int64_t r, uint32_t* words, const float* x, int64_t count) {
        const float size = largest_size(x, count), inverse = size > 0 ? 127.0f / size : 0.0f;
        s.row_scale[r] = size / 127.0f;
        uint8_t* bytes = reinterpret_cast<uint8_t*>(words);
        for (int64_t i = 0; i < count; i++) bytes[i] = uint8_t(int32_t(x[i] * inverse + 128.5f));
        for (int64_t i = count; i % 4; i++) bytes[i] = 128;  // the weights there are zero
    }

    // outputs of `matrix` for all rows: done(row, block, values of the block, values of the next block).
    template <class Done>
    void product(int64_t& phase, const Matrix& matrix, const Done& done) {
        each(phase, matrix.blocks / 2, [&](int64_t pair) {
            for (int64_t r = 0; r < s.rows;) {
                const int64_t left = s.rows - r;
                // 9 .. 15 rows are split evenly rather than into 8 and a rest
                const int64_t take = left >= 16 || left <= 8 ? std::min<int64_t>(left, 8) : (left + 1) / 2;
                switch (take) {
                    case 8: rows<8>(matrix, pair * 2, r, done); break;
                    case 7: rows<7>(matrix, pair * 2, r, done); break;
                    case 6: rows<6>(matrix, pair * 2, r, done); break;
                    case 5: rows<5>(matrix, pair * 2, r, done); break;
                    case 4: rows<4>(matrix, pair * 2, r, done); break;
                    case 3: rows<3>(matrix, pair * 2, r, done); break;
                    case 2: rows<2>(matrix, pair * 2, r, done); break;
                    default: rows<1>(matrix, pair * 2, r, done);
                }
                r += take;
            }
        });
    }

    template <int M, class Done>
    void rows(const Matrix& matrix, int64_t block, int64_t first, const Done& done) {
        typename Weights::Sum sums[M][2] = {};
        const int64_t size = matrix.words * LANES;
        const uint32_t *x = s.packed + first * s.width, *w = matrix.data + block * size;
        if (first == 0) tile<Weights, M, 2, true>(sums, x, s.width, w, size, LANES, matrix.words, 2 * size);
        else tile<Weights, M, 2>(sums, x, s.width, w, size, LANES, matrix.words);
        for (int i = 0; i < M; i++)
            done(first + i, block, value(sums[i][0], matrix, first + i, block),
                 value(sums[i][1], matrix, first + i, block + 1));
    }

    Floats value(Floats sum, const Matrix&, int64_t, int64_t) const { return sum; }
    Floats value(Ints sum, const Matrix& matrix, int64_t r, int64_t block) const {
        const Floats exact = __builtin_convertvector(sum, Floats) - load(matrix.offset + block * LANES);
        return exact * load(matrix.scale + block * LANES) * s.row_scale[r];
    }

    // Rotate `x` (head_dim,) by the angles of the position: pairs of bfloat16 for a cache of them, else float32.
    template <class Cache>
    void rotate(const float* x, uint32_t* words) const {
        const float* angle = m.rotary + s.position * m.head_dim;
        for (int64_t i = 0; i < m.head_dim; i += 2) {
            const float even = round(x[i] * angle[i] - x[i + 1] * angle[i + 1]);
            const float odd = round(x[i + 1] * angle[i] + x[i] * angle[i + 1]);
            if (Cache::PER == 2) {
                words[i / 2] = bits<uint32_t>(even) >> 16 | bits<uint32_t>(odd);
            } else {
                words[i] = bits<uint32_t>(even), words[i + 1] = bits<uint32_t>(odd);
            }
        }
    }

    // Where keys and values of row `r` and key head `g` are.
    template <class Cache>
    Cached cached(int64_t layer, int64_t r, int64_t g) const {
        const int64_t item = (layer * s.capacity_rows + r) * m.kv_heads + g, spots = s.capacity_positions;
        uint32_t* keys = s.keys + item * spots * (m.head_dim / Cache::PER);
        uint32_t* values = s.values + item * (spots / Cache::PER) * head_blocks() * LANES;
        if (!s.key_scale) return {keys, values, nullptr, nullptr};
        return {keys, values, s.key_scale + item * spots, s.value_scale + item * spots};
    }

    int64_t head_blocks() const { return (m.head_dim + LANES - 1) / LANES; }

    // Attention of the query heads that share key head `g` in row `r`; the result replaces their queries.
    template <class Cache>
    void attend(int64_t layer, int64_t r, int64_t g) {
        const int64_t group = m.heads / m.kv_heads;
        const Cached cache = cached<Cache>(layer, r, g);
        float* row = s.wide + r * s.width;
        remember<Cache>(row, g, cache);

        const int64_t length = s.position + 1, padded = (length + LANES - 1) / LANES * LANES;
        static thread_local std::vector<uint32_t> scratch;
        scratch.resize(m.head_dim + padded * 2);
        uint32_t* packed = scratch.data() + m.head_dim;  // probabilities, as what is multiplied with the values
        float* scores = reinterpret_cast<float*>(packed + padded);
        for (int64_t head = g * group; head < (g + 1) * group; head++) {
            rotate<Cache>(row + head * m.head_dim, scratch.data());
            score<Cache>(scratch.data(), cache, padded, scores);
            const float sum = soften(scores, length, padded, r);
            weigh<Cache>(scores, cache, length, padded, packed);
            mix<Cache>(packed, cache, (length + Cache::PER - 1) / Cache::PER, 1.0f / sum, row + head * m.head_dim);
        }
    }

    // Store key and value of this position.
    template <class Cache>
    void remember(const float* row, int64_t g, const Cached& cache) const {
        const float* key = row + (m.heads + g) * m.head_dim;
        const float* value = row + (m.heads + m.kv_heads + g) * m.head_dim;
        const int64_t words = m.head_dim / Cache::PER;
        static thread_local std::vector<uint32_t> rotated;
        rotated.resize(m.head_dim);
        rotate<Cache>(key, rotated.data());
        uint32_t* column = cache.keys + s.position / LANES * words * LANES + s.position % LANES;
        uint32_t* slot = cache.values + s.position / Cache::PER * head_blocks() * LANES;
        if constexpr (Cache::PER == 4) return remember_int8(rotated.data(), value, cache, column, slot);
        for (int64_t i = 0; i < words; i++) column[i * LANES] = rotated[i];
        for (int64_t i = 0; i < m.head_dim; i++) {
            const uint32_t word = bits<uint32_t>(value[i]);
            if (!ROUNDED) slot[i] = word;
            else if (s.position % 2) slot[i] = (slot[i] & 0xffffu) | word;
            else slot[i] = word >> 16;  // and nothing in the other half, whatever stood there
        }
    }

    // The same, rounded to int8: a byte for each channel, four channels of the key to a word of `column`.
    void remember_int8(const uint32_t* rotated, const float* value, const Cached& cache, uint32_t* column,
                       uint32_t* slot) const {
        static thread_local std::vector<float> key;
        static thread_local std::vector<uint8_t> bytes;
        key.resize(m.head_dim), bytes.resize(m.head_dim);
        std::memcpy(key.data(), rotated, m.head_dim * sizeof(float));
        cache.key_scale[s.position] = quantize(key.data(), m.head_dim, bytes.data());
        for (int64_t i = 0; i < m.head_dim; i += 4) std::memcpy(column + i / 4 * LANES, bytes.data() + i, 4);
        cache.value_scale[s.position] = quantize(value, m.head_dim, bytes.data());
        uint8_t* place = reinterpret_cast<uint8_t*>(slot) + s.position % 4;
        for (int64_t i = 0; i < m.head_dim; i++) place[i * 4] = bytes[i];
    }

    template <class Cache>
    void score(const uint32_t* query, const Cached& cache, int64_t padded, float* scores) const {
        int64_t block = 0;
        for (; block + 4 <= padded / LANES; block += 4) score_blocks<Cache, 4>(query, cache, block, scores);
        for (; block < padded / LANES; block++) score_blocks<Cache, 1>(query, cache, block, scores);
    }

    template <class Cache, int N>
    void score_blocks(const uint32_t* query, const Cached& cache, int64_t block, float* scores) const {
        const float scale = 1.0f / std::sqrt(float(m.head_dim)) / Cache::UNIT;
        const int64_t words = m.head_dim / Cache::PER, size = words * LANES;
        const auto* x = reinterpret_cast<const typename Cache::Input*>(query);
        Floats sums[1][N] = {};
        // N streams that end after one block: the processor does not fetch the next ones by itself
        tile<Cache, 1, N, true>(sums, x, 0, cache.keys + block * size, size, LANES, words, N * size);
        for (int n = 0; n < N; n++) {
            const int64_t first = (block + n) * LANES;
            const Floats scaled = sums[0][n] * scale;
            store(scores + first, Cache::PER == 4 ? scaled * load(cache.key_scale + first) : scaled);
        }
    }

    // Scores to exponentials relative to the best one, zero from `length` on; returns their sum.
    float soften(float* scores, int64_t length, int64_t padded, int64_t r) const {
        for (int64_t i = 0; i < std::min(length, s.bias_length); i++) scores[i] += s.bias[r * s.bias_length + i];
        for (int64_t i = length; i < padded; i++) scores[i] = -std::numeric_limits<float>::infinity();
        const float best = largest(scores, padded);
        Floats sum{};
        for (int64_t i = 0; i < padded; i += LANES) {
            const Floats e = exponential(load(scores + i) - best);
            sum += e;
            store(scores + i, e);
        }
        return total(sum);
    }

    // Exponentials as what is multiplied with the values: with their scales, zero from `length` on.
    template <class Cache>
    void weigh(const float* e, const Cached& cache, int64_t length, int64_t padded, uint32_t* packed) const {
        if (Cache::PER == 2) return pack_bf16(packed, e, padded);
        if (Cache::PER == 1) return void(std::memcpy(packed, e, padded * sizeof(float)));
        for (int64_t i = 0; i < padded; i += LANES)
            store(reinterpret_cast<float*>(packed + i), load(e + i) * load(cache.value_scale + i));
        std::fill(packed + length, packed + padded, 0u);  // whatever scale stood there
    }

    // out (head_dim,) = the values weighted with `packed`, times `scale`.
    template <class Cache>
    void mix(const uint32_t* packed, const Cached& cache, int64_t count, float scale, float* out) const {
        int64_t block = 0;
        for (; block + 4 <= head_blocks(); block += 4) mix_blocks<Cache, 4>(packed, cache, count, block, scale, out);
        for (; block < head_blocks(); block++) mix_blocks<Cache, 1>(packed, cache, count, block, scale, out);
    }

    template <class Cache, int N>
    void mix_blocks(const uint32_t* packed, const Cached& cache, int64_t count, int64_t block, float scale,
                    float* out) const {
        const auto* x = reinterpret_cast<const typename Cache::Input*>(packed);
        Floats sums[1][N] = {};
        tile<Cache, 1, N>(sums, x, 0, cache.values + block * LANES, LANES, head_blocks() * LANES, count);
        for (int n = 0; n < N; n++)
            put(out, (block + n) * LANES, m.head_dim, round(sums[0][n] * (scale / Cache::UNIT)));
    }
};

}  // namespace

extern "C" {

void decode_step(const Model* model, const Step* step) {
    if (model->int8) {
        if (model->rounded) Decoder<I8, true>(*model, *step).run();
        else Decoder<I8, false>(*model, *step).run();
    } else if (model->rounded) {
        Decoder<BF16, true>(*model, *step).run();
    } else {
        Decoder<F32, false>(*model, *step).run();
    }
}

// tokens (rows,) of logits (rows, vocab); seeds (rows,) or null for the best token.
void draw_tokens(const float* logits, int64_t rows, int64_t vocab, float temperature, int64_t top_k,
                 const uint64_t* seeds, int64_t position, int64_t threads, int64_t* tokens) {
    std::atomic<int64_t> turn{0};
    pool().run(int(std::min(threads, rows)), [&](int) {
        std::vector<float> x(vocab);
        std::vector<uint32_t> bin;
        for (int64_t r; (r = turn.fetch_add(1)) < rows;)
            tokens[r] = draw_row(logits + r * vocab, vocab, temperature, top_k, seeds ? seeds + r : nullptr,
                                 uint32_t(position), x.data(), bin);
    });
}

// out (n,) = uncond + scale * (cond - uncond)
void guide(const float* cond, const float* uncond, float scale, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = uncond[i] + scale * (cond[i] - uncond[i]);
}

// What the compiler was allowed to use: 1 AVX-512 BF16, 2 AVX-512 VNNI, 4 AVX-512, 8 AVX2.
int32_t instruction_sets() {
    int32_t sets = 0;
#if defined(__AVX512BF16__)
    sets |= 1;
#endif
#if defined(__AVX512VNNI__)
    sets |= 2;
#endif
#if defined(__AVX512F__)
    sets |= 4;
#endif
#if defined(__AVX2__)
    sets |= 8;
#endif
    return sets;
}

}  // extern "C"
