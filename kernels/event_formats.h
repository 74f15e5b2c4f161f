// Vectors, and how the formats of weight_rows.py are widened to them. Part of event_linear.cpp.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

enum Format : int64_t { FP32, BF16, INT16, INT8, INT4 };

// Weights of a vector of columns; a column of int4 holds two. `raise` makes bytes of codes unsigned by adding ZERO.

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
    typedef float Item, One;
    typedef Floats Wide;
    static constexpr int PARTS = 1;
    static void load(const Item *p, Wide *w) { w[0] = *(const Floats *)p; }
    static void one(const Item *p, float *w) { w[0] = *p; }
};

struct Bf16 {
    static constexpr bool INTEGER = false;
    typedef int16_t Item;
    typedef float One;
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
    typedef int32_t One;
    typedef Ints Wide;
    static constexpr int PARTS = 1, ZERO = 128;
    static void load(const Item *p, Wide *w) { w[0] = extended(p); }
    static void one(const Item *p, int32_t *w) { w[0] = *p; }
#if defined(__AVX512BW__)
    static void raise(__m512i codes, __m512i *to) { to[0] = _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
#endif
};

struct Int4 {
    static constexpr bool INTEGER = true;
    typedef int8_t Item;
    typedef int32_t One;
    typedef Ints Wide;
    static constexpr int PARTS = 2, ZERO = 8;
    static void load(const Item *p, Wide *w) {
        const Ints both = extended(p);
        w[0] = both << 28 >> 28;
        w[1] = both >> 4;
    }
    static void one(const Item *p, int32_t *w) {
        w[0] = (int32_t)((uint32_t)(uint8_t)*p << 28) >> 28;
        w[1] = *p >> 4;
    }
#if defined(__AVX512BW__)
    static void raise(__m512i codes, __m512i *to) {
        const __m512i low = _mm512_set1_epi8(15), raised = _mm512_xor_si512(codes, _mm512_set1_epi8(-120));
        to[0] = _mm512_and_si512(raised, low);
        to[1] = _mm512_and_si512(_mm512_srli_epi16(raised, 4), low);
    }
#endif
};

}  // namespace
