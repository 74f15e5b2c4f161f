// Event products on the CPU in float32, one call for all that stands around them: event_linear.py and event_call.py hold
// the equations, weight_rows.py the layouts.
//
// The calling thread makes the values, codes them and lists the events; then the threads share the columns of the
// weights (event_product.h), so that no sum is split. What one output sums, and in which order, depends neither on the
// threads nor on the batch.

#include <cmath>
#include <limits>

#include "event_formats.h"
#include "event_product.h"
#include "exponential.h"

namespace {

constexpr int64_t BATCH = 8;       // inputs that share a list of events
constexpr int64_t BLOCK = 64;      // inputs that are listed at once
constexpr int64_t SHARED = 65536;  // bytes of weights below which one thread is faster than waking another

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

// Values, their code and their events. Kept by the calling thread from call to call.
struct Scratch {
    std::vector<float> values, fold;  // values [B][stride]: zero behind the inputs, so that vectors may read there
    std::vector<float> events;        // [events][B]
    std::vector<int32_t> indices;
    int64_t stride = 0;
    enum { VALUES, BYTES_FIT, INT32_FITS, DOUBLE } sums = VALUES;  // what holds sums exactly
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

// Values of `batch` rows from `first` on, and what their products may be summed in.
template <int B>
void prepare(const Call &c, int64_t first, int64_t batch, Scratch &s) {
    const int64_t size = c.inputs;
    const bool counted = c.k || c.threshold, integers = counted && c.format >= INT16;
    s.stride = size + 2 * LANES;
    s.values.resize(B * s.stride), s.fold.resize(size);
    const double code = c.format == INT16 ? 32768.0 : c.format == INT8 ? 256.0 : 16.0, limit = 2147483648.0;
    double more = 0.0;
    bool narrow = true;
    for (int64_t b = 0; b < batch; b++) {
        float *v = &s.values[b * s.stride];
        const float *x = c.x + (first + b) * size * (c.gated ? 2 : 1);
        if (c.gated)
            for (int64_t i = 0; i < size; i++) v[i] = x[i] * sigmoid(x[i]) * x[size + i];
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
            for (int64_t i = 0; i < size; i++) {
                const double count = std::fabs((double)v[i]);
                total += count;
                more += count > LARGEST ? count / LARGEST : 0.0;
            }
            narrow &= total * code < limit;  // not for NaN
        } else if (counted) {
            const float threshold = c.threshold[first + b];
            for (int64_t i = 0; i < size; i++) v[i] *= threshold;
        }
    }
    s.sums = !integers ? Scratch::VALUES : narrow ? Scratch::INT32_FITS : Scratch::DOUBLE;
    if (BYTES && s.sums == Scratch::INT32_FITS && c.format != INT16 && more < size / 8) s.sums = Scratch::BYTES_FIT;
    s.events.resize(B * (size + size / 8) + LANES), s.indices.resize(size + size / 8 + LANES);
}

// Events of inputs [from, to) of one row, to - from a multiple of LANES; how many there are. None is above `limit`, or
// nothing is done and -1 the answer.
int64_t list_block(const float *values, int64_t from, int64_t to, float limit, bool dense, float *event, int32_t *index) {
#if defined(__AVX512F__)
    const __m512 most = _mm512_set1_ps(limit);
    __m512i at = _mm512_add_epi32(_mm512_set1_epi32((int32_t)from), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                   11, 12, 13, 14, 15));
    int64_t count = 0;
    for (int64_t i = from; i < to; i += LANES, at = _mm512_add_epi32(at, _mm512_set1_epi32(LANES))) {
        const __m512 v = _mm512_loadu_ps(values + i);
        if (_mm512_cmp_ps_mask(_mm512_abs_ps(v), most, _CMP_GT_OQ)) return -1;
        const __mmask16 active = dense ? 0xffff : _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        _mm512_storeu_ps(event + count, _mm512_maskz_compress_ps(active, v));
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(active, at));
        count += __builtin_popcount(active);
    }
    return count;
#else
    return -1;
#endif
}

// Inputs that are not silent in all rows. For byte products a larger count becomes several events.
template <int B>
void list_events(const Call &c, int64_t batch, Scratch &s) {
    float *event = s.events.data();
    int32_t *index = s.indices.data();
    const float limit = s.sums == Scratch::BYTES_FIT ? LARGEST : std::numeric_limits<float>::infinity();
    for (int64_t from = 0; from < c.inputs; from += BLOCK) {
        const int64_t to = std::min(from + BLOCK, c.inputs);
        if (B == 1 && to - from == BLOCK) {
            const int64_t listed = list_block(s.values.data(), from, to, limit, c.dense, event, index);
            if (listed >= 0) {
                event += listed, index += listed;
                continue;
            }
        }
        for (int64_t i = from; i < to; i++) {
            bool active = c.dense, more = false;
            float *rest = &s.values[i];
            for (int64_t b = 0; b < B; b++) {
                const float v = b < batch ? rest[b * s.stride] : 0.0f;
                event[b] = v;
                active |= v != 0.0f;
                more |= std::fabs(v) > limit;
            }
            while (more) {
                more = false;
                for (int64_t b = 0; b < B; b++) {
                    const float v = b < batch ? rest[b * s.stride] : 0.0f;
                    event[b] = std::clamp(v, -limit, limit);
                    if (b < batch) rest[b * s.stride] = v - event[b];
                    more |= v != event[b];
                }
                *index++ = i;
                event += B;
                active = false;
            }
            *index = i;
            event += active ? B : 0;
            index += active;
        }
    }
    s.indices.resize(index - s.indices.data());
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
                typename W::One one[W::PARTS];
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
void share(const Call &c, const Scratch &s, int64_t first, int64_t batch, int threads) {
    const int64_t width = c.by_output ? c.outputs : (c.outputs + W::PARTS - 1) / W::PARTS;
    const int64_t read = c.by_output ? c.inputs / W::PARTS : (int64_t)s.indices.size();
    if (read * width * (int64_t)sizeof(typename W::Item) < SHARED) threads = 1;
    const float *thresholds = s.sums == Scratch::VALUES ? nullptr : c.threshold + first;
    const Product p{c.data, c.scales, c.bias, s.indices.data(), s.events.data(), thresholds,
                    c.y + first * c.outputs, (int64_t)s.indices.size(), batch, c.inputs, c.outputs, c.group, c.add != 0};
    const auto work = [&](int64_t begin, int64_t end) {
        if (c.by_output) return outputs<W, B>(c, s, first, batch, begin, end);
        if constexpr (W::INTEGER) {
            if (s.sums == Scratch::INT32_FITS) return columns<W, Integer, B>(p, begin, end);
            if constexpr (BYTES && sizeof(typename W::Item) == 1)
                if (s.sums == Scratch::BYTES_FIT) return columns<W, Bytes, B>(p, begin, end);
            if constexpr (B == 1)
                if (s.sums == Scratch::DOUBLE) return columns<W, Double, B>(p, begin, end);
        }
        columns<W, Floating, B>(p, begin, end);
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
    prepare<B>(c, first, batch, scratch);
    if constexpr (B > 1)
        if (scratch.sums == Scratch::DOUBLE) {  // rare, and not worth a loop of its own
            for (int64_t b = 0; b < batch; b++) run<1>(c, first + b, 1, threads);
            return;
        }
    if (!c.by_output) list_events<B>(c, batch, scratch);
    switch (c.format) {
        case FP32: return share<Fp32, B>(c, scratch, first, batch, threads);
        case BF16: return share<Bf16, B>(c, scratch, first, batch, threads);
        case INT16: return share<Int<int16_t>, B>(c, scratch, first, batch, threads);
        case INT8: return share<Int<int8_t>, B>(c, scratch, first, batch, threads);
        default: return share<Int4, B>(c, scratch, first, batch, threads);
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
