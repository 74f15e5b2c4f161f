// The event product over some columns of the weights. Part of event_linear.cpp.
//
// A thread goes through the events four at a time and streams their rows, a few vectors from each in turn, into sums
// that stay in its first cache. Rows of later events are fetched ahead, which the list makes possible.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "event_formats.h"

namespace {

constexpr int64_t ROWS = 4;        // events that are summed at once
constexpr int64_t SPAN = 64;       // columns: blocks and threads meet at multiples of it
constexpr int64_t AHEAD = 8192;    // bytes of later rows on their way
constexpr int64_t LARGEST = 127;   // count of an event for byte products

// What meets the weights, and where it goes.
struct Product {
    const void *data;
    const float *scales, *bias;
    const int32_t *indices;   // [events], rising
    const float *events;      // [events][B]
    const float *thresholds;  // [batch] or null
    float *y;                 // [batch][outputs]
    int64_t count, batch, inputs, outputs, group;
    bool add;
};

struct Floating {
    typedef Floats Vector;
    typedef float Scalar;
};
struct Integer {
    typedef Ints Vector;
    typedef int32_t Scalar;
};
struct Double {  // integers beyond int32: exact to 2^53
    typedef Doubles Vector;
    typedef double Scalar;
};
struct Bytes : Integer {};  // integers through products of bytes; columns in the order of `place`

// sums[part][b][column] += events [ROWS][B] times rows, columns [0, n).
template <class W, class Sum, int B>
void add_rows(const typename W::Item *const *rows, const typename W::Item *const *ahead, const float *events,
              typename Sum::Scalar *sums, int64_t by_part, int64_t by_batch, int64_t n) {
    typedef typename Sum::Vector Vector;
    typedef typename Sum::Scalar Scalar;
    constexpr int SUMS = B * W::PARTS, WIDE = SUMS >= 8 ? 1 : SUMS >= 4 ? 2 : 4;
    constexpr int64_t STEP = WIDE * LANES, LINE = 64 / sizeof(typename W::Item);
    int64_t j = 0;
    for (; j + STEP <= n; j += STEP) {
        Vector sum[WIDE][W::PARTS][B];
        for (int w = 0; w < WIDE; w++)
            for (int part = 0; part < W::PARTS; part++)
                for (int b = 0; b < B; b++)
                    sum[w][part][b] = *(const Vector *)(sums + part * by_part + b * by_batch + j + w * LANES);
        for (int r = 0; r < ROWS; r++) {
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
        for (int r = 0; r < ROWS; r++) {
            typename W::One one[W::PARTS];
            W::one(rows[r] + j, one);
            for (int part = 0; part < W::PARTS; part++)
                for (int b = 0; b < B; b++)
                    sums[part * by_part + b * by_batch + j] += (Scalar)events[r * B + b] * (Scalar)one[part];
        }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr bool BYTES = true;

// Four rows at once by products of unsigned with signed bytes, four to an int32. Weights become unsigned by adding
// W::ZERO, which `columns` takes back. Bytes of a column are brought together lane by lane, which permutes columns.
template <class W, int B>
void add_bytes(const int8_t *const *rows, const int8_t *const *ahead, const int32_t *counts, int32_t *sums,
               int64_t by_part, int64_t by_batch, int64_t n) {
    for (int64_t j = 0; j < n; j += SPAN) {
        const __mmask64 mask = n - j >= SPAN ? ~0ull : (1ull << (n - j)) - 1;
        __m512i row[ROWS];
        for (int r = 0; r < ROWS; r++) {
            __builtin_prefetch(ahead[r] + j);
            row[r] = _mm512_maskz_loadu_epi8(mask, rows[r] + j);
        }
        const __m512i ab[2] = {_mm512_unpacklo_epi8(row[0], row[1]), _mm512_unpackhi_epi8(row[0], row[1])};
        const __m512i cd[2] = {_mm512_unpacklo_epi8(row[2], row[3]), _mm512_unpackhi_epi8(row[2], row[3])};
        for (int q = 0; q < 4; q++) {
            const __m512i four = q % 2 ? _mm512_unpackhi_epi16(ab[q / 2], cd[q / 2])
                                       : _mm512_unpacklo_epi16(ab[q / 2], cd[q / 2]);
            __m512i raised[W::PARTS];
            W::raise(four, raised);
            for (int part = 0; part < W::PARTS; part++)
                for (int b = 0; b < B; b++) {
                    int32_t *sum = sums + part * by_part + b * by_batch + j + 16 * q;
                    const __m512i count = _mm512_set1_epi32(counts[b]);
                    _mm512_storeu_si512(sum, _mm512_dpbusd_epi32(_mm512_loadu_si512(sum), raised[part], count));
                }
        }
    }
}
#else
constexpr bool BYTES = false;

template <class W, int B>
void add_bytes(const int8_t *const *, const int8_t *const *, const int32_t *, int32_t *, int64_t, int64_t, int64_t) {}
#endif

// Take `excess` from sums of byte products, and bring columns [0, n) into their order.
inline void restore(const int32_t *sums, int32_t excess, int32_t *to, int64_t n) {
    typedef int32_t Four __attribute__((vector_size(16), aligned(4), may_alias));
    for (int64_t j = 0; j < n; j += SPAN)
        for (int lane = 0; lane < 4; lane++)
            for (int q = 0; q < 4; q++)
                *(Four *)(to + j + 16 * lane + 4 * q) = *(const Four *)(sums + j + 16 * q + 4 * lane) - excess;
}

inline int32_t four_counts(const float *events, int64_t step) {
    uint32_t packed = 0;
    for (int r = 0; r < ROWS; r++) packed |= (uint32_t)(uint8_t)(int8_t)events[r * step] << (8 * r);
    return (int32_t)packed;
}

// Sums over events [e, end) of one group.
template <class W, class Sum, int B>
void add_group(const Product &p, int64_t e, int64_t end, int64_t at, int64_t distance, typename Sum::Scalar *sums,
               int64_t by_part, int64_t by_batch, int64_t n) {
    typedef typename W::Item Item;
    const int64_t width = (p.outputs + W::PARTS - 1) / W::PARTS;
    const auto row = [&](int64_t i) {
        return (const Item *)p.data + p.indices[std::min(i, p.count - 1)] * width + at;
    };
    for (; e < end; e += ROWS) {
        const Item *rows[ROWS], *ahead[ROWS];
        const int64_t taken = std::min(ROWS, end - e);
        for (int64_t r = 0; r < ROWS; r++) rows[r] = row(e + std::min(r, taken - 1)), ahead[r] = row(e + r + distance);
        float events[ROWS * B] = {};  // what is missing from four is the last row, zero times
        std::copy_n(p.events + e * B, taken * B, events);
        if constexpr (std::is_same_v<Sum, Bytes>) {
            int32_t counts[B];
            for (int b = 0; b < B; b++) counts[b] = four_counts(events + b, B);
            add_bytes<W, B>(rows, ahead, counts, sums, by_part, by_batch, n);
        } else {
            add_rows<W, Sum, B>(rows, ahead, events, sums, by_part, by_batch, n);
        }
    }
}

// Columns [begin, end) of the product; a column of int4 holds two outputs.
template <class W, class Sum, int B>
void columns(const Product &p, int64_t begin, int64_t end) {
    typedef typename W::Item Item;
    typedef typename Sum::Scalar Scalar;
    static thread_local std::vector<Scalar> sums, ordered;
    static thread_local std::vector<float> scaled;
    const int64_t width = (p.outputs + W::PARTS - 1) / W::PARTS;
    const int64_t block = std::max<int64_t>(512, 4096 / (B * W::PARTS));
    for (int64_t at = begin; at < end; at += block) {
        const int64_t n = std::min(block, end - at), by_batch = (n + SPAN - 1) / SPAN * SPAN, by_part = B * by_batch;
        const int64_t distance = std::clamp<int64_t>(AHEAD / (n * sizeof(Item)), 2 * ROWS, 8 * ROWS);
        sums.resize(W::PARTS * by_part), ordered.resize(by_batch);
        scaled.assign(W::PARTS * by_part, 0.0f);
        for (int64_t e = 0; e < std::min(distance, p.count); e++) {
            const Item *row = (const Item *)p.data + p.indices[e] * width + at;
            for (int64_t j = 0; j < n; j += 64 / sizeof(Item)) __builtin_prefetch(row + j);
        }
        for (int64_t e = 0, next; e < p.count; e = next) {
            const int64_t group = p.indices[e] / p.group;
            for (next = e; next < p.count && p.indices[next] / p.group == group;) next++;
            std::fill(sums.begin(), sums.end(), (Scalar)0);
            add_group<W, Sum, B>(p, e, next, at, distance, sums.data(), by_part, by_batch, n);
            for (int64_t part = 0; part < W::PARTS; part++) {
                const int64_t from = part * width + at, some = std::min(n, p.outputs - from);
                const float *scale = p.scales ? p.scales + group * p.outputs + from : nullptr;
                for (int64_t b = 0; b < p.batch; b++) {
                    const Scalar *__restrict sum = &sums[part * by_part + b * by_batch];
                    float *__restrict to = &scaled[part * by_part + b * by_batch];
                    if constexpr (std::is_same_v<Sum, Bytes>) {
                        int32_t excess = 0;
                        for (int64_t i = e; i < next; i++) excess += (int32_t)p.events[i * B + b] * W::ZERO;
                        restore(sum, excess, ordered.data(), n);
                        sum = ordered.data();
                    }
                    if (scale)
                        for (int64_t j = 0; j < some; j++) to[j] += scale[j] * (float)sum[j];
                    else
                        for (int64_t j = 0; j < some; j++) to[j] = (float)sum[j];
                }
            }
        }
        for (int64_t part = 0; part < W::PARTS; part++) {
            const int64_t from = part * width + at, some = std::min(n, p.outputs - from);
            for (int64_t b = 0; b < p.batch; b++) {
                const float *sum = &scaled[part * by_part + b * by_batch], by = p.thresholds ? p.thresholds[b] : 1.0f;
                float *y = p.y + b * p.outputs + from;
                for (int64_t j = 0; j < some; j++)
                    y[j] = (p.add ? y[j] : 0.0f) + (p.bias ? p.bias[from + j] : 0.0f) + by * sum[j];
            }
        }
    }
}

}  // namespace
