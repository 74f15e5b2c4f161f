// Event products on the CPU in float32, one call for all that stands around them: event_linear.py and event_call.py hold
// the equations, rows.py the layouts.
//
// The calling thread makes the values, codes them and lists the events; then the threads share the columns of the
// weights, so that no sum is split. A thread goes through the events four at a time and streams their rows, a few vectors
// from each in turn, into sums that stay in its first cache; rows of later events are fetched ahead, which the list makes
// possible. What one output sums, and in which order, depends neither on the threads nor on the batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "exponential.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t ROWS = 4;        // events that are summed at once
constexpr int64_t BATCH = 8;       // inputs that share a list of events
constexpr int64_t SPAN = 4 * LANES;  // threads meet at multiples of it, so that no column changes its place in a vector
constexpr int64_t AHEAD = 12288;   // bytes of later rows on their way
constexpr int64_t SHARED = 65536;  // bytes of weights below which one thread is faster than waking another

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

enum Format : int64_t { FP32, BF16, INT16, INT8, INT4 };

struct Call {  // as _Call in event_linear_cpp.py
    const float *x;
    float *y;
    const void *data;
    const float *scales, *bias, *norm;
    const float *k, *zone, *magnitude;  // with k the values are coded
    float *counts, *threshold;          // without k: a given threshold, or null for values
    int64_t format, batch, inputs, outputs, group, zones, max_count;
    int64_t gated, one_plus, rectify, add, dense, by_output;
    float eps;
};

// Weights of a vector of columns; a column of int4 holds two.

Ints extended(const int16_t *p) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    return Ints{p[0], p[1], p[2], p[3]};
#endif
}

Ints extended(const int8_t *p) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return Ints{p[0], p[1], p[2], p[3]};
#endif
}

struct Fp32 {
    static constexpr bool INTEGER = false;
    typedef float Item;
    typedef Floats Wide;
    static constexpr int PARTS = 1;
    static void load(const Item *p, Wide *w) { w[0] = *(const Floats *)p; }
    static void one(const Item *p, float *w) { w[0] = *p; }
};

struct Bf16 {
    static constexpr bool INTEGER = false;
    typedef int16_t Item;
    typedef Floats Wide;
    static constexpr int PARTS = 1;
    static void load(const Item *p, Wide *w) { w[0] = (Floats)(extended(p) << 16); }
    static void one(const Item *p, float *w) {
        const uint32_t bits = (uint32_t)(uint16_t)*p << 16;
        std::memcpy(w, &bits, 4);
    }
};

template <class T>
struct Int {
    static constexpr bool INTEGER = true;
    typedef T Item;
    typedef Ints Wide;
    static constexpr int PARTS = 1;
    static void load(const Item *p, Wide *w) { w[0] = extended(p); }
    static void one(const Item *p, int32_t *w) { w[0] = *p; }
};

struct Int4 {
    static constexpr bool INTEGER = true;
    typedef int8_t Item;
    typedef Ints Wide;
    static constexpr int PARTS = 2;
    static void load(const Item *p, Wide *w) {
        const Ints both = extended(p);
        w[0] = both << 28 >> 28;
        w[1] = both >> 4;
    }
    static void one(const Item *p, int32_t *w) {
        w[0] = (int32_t)((uint32_t)(uint8_t)*p << 28) >> 28;
        w[1] = *p >> 4;
    }
};

// What a sum is held in: vector and scalar.
struct InFloat {
    typedef Floats Vector;
    typedef float Scalar;
};
struct InInt {
    typedef Ints Vector;
    typedef int32_t Scalar;
};
struct InDouble {
    typedef Doubles Vector;
    typedef double Scalar;
};

// Values, their code and their events. Kept by the calling thread from call to call.
struct Scratch {
    std::vector<float> values, fold;  // values [B][stride]: zero behind the inputs, so that vectors may read there
    std::vector<float> events;        // [events][B]
    std::vector<int32_t> indices;
    int64_t stride = 0;
    bool narrow = true;  // whether sums of counts times codes fit int32
};

// Sum in halves, as spike_encode.py has it: the second half is added to the first until one number is left.
float fold(float *v, int64_t size) {
    while (size > 1) {
        int64_t half = 1;
        while (2 * half < size) half *= 2;
        for (int64_t i = 0; i < size - half; i++) v[i] += v[half + i];
        size = half;
    }
    return v[0];
}

// Not inlined: a product fused into the sum would round once instead of twice.
__attribute__((noinline)) void square(const float *v, float *to, int64_t size) {
    for (int64_t i = 0; i < size; i++) to[i] = v[i] * v[i];
}

__attribute__((noinline)) void normalise(const Call &c, float *v, float *buffer) {
    square(v, buffer, c.inputs);
    const float root = std::sqrt(fold(buffer, c.inputs) / (float)c.inputs + c.eps), scale = 1.0f / root;
    const float more = c.one_plus ? 1.0f : 0.0f;
    for (int64_t i = 0; i < c.inputs; i++) v[i] = v[i] * scale * (more + c.norm[i]);
}

// Counts in place of v; their threshold. The arithmetic of spike_encode_reference, operation by operation.
__attribute__((noinline)) float encode(const Call &c, float *v, float *buffer) {
    const int64_t size = c.inputs;
    if (c.rectify)
        for (int64_t i = 0; i < size; i++) v[i] = v[i] < 0.0f ? 0.0f : v[i];
    for (int64_t i = 0; i < size; i++) buffer[i] = std::fabs(v[i]);
    const float mean = c.magnitude ? *c.magnitude : fold(buffer, size) / (float)size;
    float threshold = mean / *c.k;
    threshold = threshold < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : threshold;
    threshold = threshold > std::numeric_limits<float>::max() ? std::numeric_limits<float>::max() : threshold;
    const float limit = c.max_count ? (float)c.max_count : std::numeric_limits<float>::infinity();
    const int64_t step = c.zones > 1;
    const float none = -1.0f, *zone = c.zone ? c.zone : &none;
    for (int64_t i = 0; i < size; i++) buffer[i] = zone[i * step] * mean;
    for (int64_t i = 0; i < size; i++) {
        float s = __builtin_rintf(v[i] / threshold);
        s = std::fabs(v[i]) < buffer[i] ? 0.0f : s;
        s = s < -limit ? -limit : s;
        v[i] = s > limit ? limit : s;
    }
    return threshold;
}

// Fill the scratch from rows `first` to `first + batch` of the input; thresholds of counts that meet integer weights.
template <int B>
const float *prepare(const Call &c, int64_t first, int64_t batch, Scratch &s) {
    const int64_t size = c.inputs;
    const bool counted = c.k || c.threshold, integers = counted && c.format >= INT16;
    s.stride = size + 2 * LANES;
    s.values.resize(B * s.stride), s.fold.resize(size), s.events.resize(B * size), s.indices.resize(size);
    double largest = 0.0;
    for (int64_t b = 0; b < batch; b++) {
        float *v = &s.values[b * s.stride];
        const float *x = c.x + (first + b) * size * (c.gated ? 2 : 1);
        if (c.gated)
            for (int64_t i = 0; i < size; i++) v[i] = x[i] / (1.0f + exponential(-x[i])) * x[size + i];
        else
            std::copy_n(x, size, v);
        std::fill_n(v + size, s.stride - size, 0.0f);
        if (c.norm) normalise(c, v, s.fold.data());
        if (c.k) {
            c.threshold[first + b] = encode(c, v, s.fold.data());
            std::copy_n(v, size, c.counts + (first + b) * size);
        }
        if (integers) {
            double total = 0.0;
            for (int64_t i = 0; i < size; i++) total += std::fabs((double)v[i]);
            largest = !(total <= largest) ? total : largest;  // NaN stays
        } else if (counted) {
            const float threshold = c.threshold[first + b];
            for (int64_t i = 0; i < size; i++) v[i] *= threshold;
        }
    }
    const double code = c.format == INT16 ? 32768.0 : c.format == INT8 ? 128.0 : 8.0;
    s.narrow = integers && largest * code < 2147483648.0;
    return integers ? c.threshold + first : nullptr;
}

template <int B>
void list_events(const Call &c, int64_t batch, Scratch &s) {
    float *event = s.events.data();
    int32_t *index = s.indices.data();
    for (int64_t i = 0; i < c.inputs; i++) {
        bool active = c.dense;
        for (int64_t b = 0; b < B; b++) {
            const float v = b < batch ? s.values[b * s.stride + i] : 0.0f;
            event[b] = v;
            active |= v != 0.0f;
        }
        *index = i;
        event += active ? B : 0;
        index += active;
    }
    s.indices.resize(index - s.indices.data());
}

// Sums of one group of inputs over columns [0, n): sums[part][b][column] += events [count][B] times rows.
template <class W, class Acc, int B, int R>
void add_rows(const typename W::Item *const *rows, const typename W::Item *const *ahead, const float *events,
              typename Acc::Scalar *sums, int64_t by_part, int64_t by_batch, int64_t n) {
    typedef typename Acc::Vector Vector;
    typedef typename Acc::Scalar Scalar;
    constexpr int SUMS = B * W::PARTS, WIDE = SUMS >= 8 ? 1 : SUMS >= 4 ? 2 : 4;
    constexpr int64_t STEP = WIDE * LANES, LINE = 64 / sizeof(typename W::Item);
    int64_t j = 0;
    for (; j + STEP <= n; j += STEP) {
        Vector sum[WIDE][W::PARTS][B];
        for (int w = 0; w < WIDE; w++)
            for (int part = 0; part < W::PARTS; part++)
                for (int b = 0; b < B; b++)
                    sum[w][part][b] = *(const Vector *)(sums + part * by_part + b * by_batch + j + w * LANES);
        for (int r = 0; r < R; r++) {
            for (int64_t line = 0; line < STEP; line += LINE) __builtin_prefetch(ahead[r] + j + line);
            for (int w = 0; w < WIDE; w++) {
                typename W::Wide wide[W::PARTS];
                W::load(rows[r] + j + w * LANES, wide);
                for (int part = 0; part < W::PARTS; part++)
                    for (int b = 0; b < B; b++)
                        sum[w][part][b] += (Scalar)events[r * B + b] * __builtin_convertvector(wide[part], Vector);
            }
        }
        for (int w = 0; w < WIDE; w++)
            for (int part = 0; part < W::PARTS; part++)
                for (int b = 0; b < B; b++)
                    *(Vector *)(sums + part * by_part + b * by_batch + j + w * LANES) = sum[w][part][b];
    }
    for (; j < n; j++)
        for (int r = 0; r < R; r++) {
            std::remove_reference_t<decltype(typename W::Wide{}[0])> one[W::PARTS];
            W::one(rows[r] + j, one);
            for (int part = 0; part < W::PARTS; part++)
                for (int b = 0; b < B; b++)
                    sums[part * by_part + b * by_batch + j] += (Scalar)events[r * B + b] * (Scalar)one[part];
        }
}

// Columns [begin, end) of the product for `batch` rows of the output.
template <class W, class Acc, int B>
void columns(const Call &c, const Scratch &s, const float *thresholds, int64_t first, int64_t batch, int64_t begin,
             int64_t end) {
    typedef typename W::Item Item;
    typedef typename Acc::Scalar Scalar;
    static thread_local std::vector<Scalar> sums;
    static thread_local std::vector<float> scaled;
    const int64_t width = (c.outputs + W::PARTS - 1) / W::PARTS, count = s.indices.size();
    const int64_t block = std::max<int64_t>(SPAN, 4096 / (B * W::PARTS) / SPAN * SPAN);
    const int64_t by_batch = block, by_part = B * block, all = W::PARTS * by_part;
    sums.resize(all), scaled.resize(all);
    const Item *data = (const Item *)c.data;
    for (int64_t at = begin; at < end; at += block) {
        const int64_t n = std::min(block, end - at);
        const int64_t distance = std::clamp<int64_t>(AHEAD / (n * (int64_t)sizeof(Item)), ROWS, 32);
        const auto row = [&](int64_t e) { return data + s.indices[std::min(e, count - 1)] * width + at; };
        std::fill(scaled.begin(), scaled.end(), 0.0f);
        for (int64_t e = 0; e < count;) {
            const int64_t group = s.indices[e] / c.group, bound = (group + 1) * c.group;
            std::fill(sums.begin(), sums.end(), (Scalar)0);
            const Item *rows[ROWS], *ahead[ROWS];
            while (e < count && s.indices[e] < bound) {
                int64_t taken = 0;
                for (; taken < ROWS && e + taken < count && s.indices[e + taken] < bound; taken++) {
                    rows[taken] = row(e + taken);
                    ahead[taken] = row(e + taken + distance);
                }
                const float *events = s.events.data() + e * B;
                if (taken == ROWS)
                    add_rows<W, Acc, B, ROWS>(rows, ahead, events, sums.data(), by_part, by_batch, n);
                else
                    for (int64_t r = 0; r < taken; r++)
                        add_rows<W, Acc, B, 1>(rows + r, ahead + r, events + r * B, sums.data(), by_part, by_batch, n);
                e += taken;
            }
            for (int64_t part = 0; part < W::PARTS; part++) {
                const int64_t from = part * width + at, some = std::min(n, c.outputs - from);
                const float *scale = c.scales ? c.scales + group * c.outputs + from : nullptr;
                for (int64_t b = 0; b < batch; b++) {
                    const Scalar *__restrict sum = &sums[part * by_part + b * by_batch];
                    float *__restrict to = &scaled[part * by_part + b * by_batch];
                    if (scale)
                        for (int64_t j = 0; j < some; j++) to[j] += scale[j] * (float)sum[j];
                    else
                        for (int64_t j = 0; j < some; j++) to[j] = (float)sum[j];
                }
            }
        }
        for (int64_t part = 0; part < W::PARTS; part++) {
            const int64_t from = part * width + at, some = std::min(n, c.outputs - from);
            for (int64_t b = 0; b < batch; b++) {
                const float *sum = &scaled[part * by_part + b * by_batch], by = thresholds ? thresholds[b] : 1.0f;
                float *y = c.y + (first + b) * c.outputs + from;
                for (int64_t j = 0; j < some; j++)
                    y[j] = (c.add ? y[j] : 0.0f) + (c.bias ? c.bias[from + j] : 0.0f) + by * sum[j];
            }
        }
    }
}

float total(Floats v) {
    float sum = 0.0f;
    for (int64_t i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

// Outputs [begin, end) of a table: a weight row times every value row.
template <class W, int B>
void outputs(const Call &c, const Scratch &s, int64_t first, int64_t batch, int64_t begin, int64_t end) {
    typedef typename W::Item Item;
    constexpr int WIDE = B >= 4 ? 1 : 4 / B;
    int64_t width = 0;  // items of a row: every group fills whole bytes
    for (int64_t i = 0; i < c.inputs; i += c.group) width += (std::min(c.group, c.inputs - i) + W::PARTS - 1) / W::PARTS;
    for (int64_t o = begin; o < end; o++) {
        const Item *weights = (const Item *)c.data + o * width;
        const float *scale = c.scales ? c.scales + o * ((c.inputs + c.group - 1) / c.group) : nullptr;
        Floats whole[B] = {};
        float rest[B] = {};
        for (int64_t i = 0; i < c.inputs; i += c.group) {
            const int64_t half = (std::min(c.group, c.inputs - i) + W::PARTS - 1) / W::PARTS;
            const float *x = s.values.data() + i, by = scale ? *scale++ : 1.0f;
            Floats sum[WIDE][B] = {};
            float tail[B] = {};
            int64_t j = 0;
            const auto add = [&](int64_t at, int w) {
                typename W::Wide wide[W::PARTS];
                W::load(weights + at, wide);
                for (int part = 0; part < W::PARTS; part++)
                    for (int b = 0; b < B; b++)
                        sum[w][b] += *(const Floats *)(x + b * s.stride + part * half + at) *
                                     __builtin_convertvector(wide[part], Floats);
            };
            for (; j + WIDE * LANES <= half; j += WIDE * LANES) {
                __builtin_prefetch(weights + j + 4096 / sizeof(Item));
                for (int w = 0; w < WIDE; w++) add(j + w * LANES, w);
            }
            for (; j + LANES <= half; j += LANES) add(j, 0);
            for (; j < half; j++) {
                std::remove_reference_t<decltype(typename W::Wide{}[0])> one[W::PARTS];
                W::one(weights + j, one);
                for (int part = 0; part < W::PARTS; part++)
                    for (int b = 0; b < B; b++) tail[b] += x[b * s.stride + part * half + j] * (float)one[part];
            }
            weights += half;
            for (int b = 0; b < B; b++) {
                for (int w = 1; w < WIDE; w++) sum[0][b] += sum[w][b];
                whole[b] += by * sum[0][b];
                rest[b] += by * tail[b];
            }
        }
        for (int64_t b = 0; b < batch; b++) {
            float *y = c.y + (first + b) * c.outputs + o;
            *y = (c.add ? *y : 0.0f) + (c.bias ? c.bias[o] : 0.0f) + (total(whole[b]) + rest[b]);
        }
    }
}

template <class W, int B>
void share(const Call &c, const Scratch &s, const float *thresholds, int64_t first, int64_t batch, int threads) {
    const int64_t width = c.by_output ? c.outputs : (c.outputs + W::PARTS - 1) / W::PARTS;
    const int64_t read = c.by_output ? c.inputs / W::PARTS : (int64_t)s.indices.size();
    if (read * width * (int64_t)sizeof(typename W::Item) < SHARED) threads = 1;
    const auto work = [&](int64_t begin, int64_t end) {
        if (c.by_output)
            outputs<W, B>(c, s, first, batch, begin, end);
        else if constexpr (W::INTEGER) {
            if (!thresholds)
                columns<W, InFloat, B>(c, s, thresholds, first, batch, begin, end);
            else if (s.narrow)
                columns<W, InInt, B>(c, s, thresholds, first, batch, begin, end);
            else if constexpr (B == 1)
                columns<W, InDouble, B>(c, s, thresholds, first, batch, begin, end);
        } else
            columns<W, InFloat, B>(c, s, thresholds, first, batch, begin, end);
    };
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int i = 0; i < threads; i++) {
        const auto bound = [&](int64_t n) { return n == threads ? width : width * n / threads / SPAN * SPAN; };
        work(bound(i), bound(i + 1));
    }
}

template <int B>
void run(const Call &c, int64_t first, int64_t batch, int threads) {
    static thread_local Scratch scratch;
    const float *thresholds = prepare<B>(c, first, batch, scratch);
    if constexpr (B > 1)
        if (thresholds && !scratch.narrow) {  // rare, and not worth a loop of its own
            for (int64_t b = 0; b < batch; b++) run<1>(c, first + b, 1, threads);
            return;
        }
    if (!c.by_output) list_events<B>(c, batch, scratch);
    switch (c.format) {
        case FP32: return share<Fp32, B>(c, scratch, thresholds, first, batch, threads);
        case BF16: return share<Bf16, B>(c, scratch, thresholds, first, batch, threads);
        case INT16: return share<Int<int16_t>, B>(c, scratch, thresholds, first, batch, threads);
        case INT8: return share<Int<int8_t>, B>(c, scratch, thresholds, first, batch, threads);
        default: return share<Int4, B>(c, scratch, thresholds, first, batch, threads);
    }
}

}  // namespace

extern "C" void event_linear(const Call *call, int threads) {
    const Call &c = *call;
    for (int64_t first = 0; first < c.batch; first += BATCH) {
        const int64_t batch = std::min(BATCH, c.batch - first);
        (batch == 1 ? run<1> : batch == 2 ? run<2> : batch <= 4 ? run<4> : run<8>)(c, first, batch, threads);
    }
}
