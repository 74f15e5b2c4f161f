// exp in float32 without a call, so that loops around it run in vectors. Used by the .cpp files of this folder.

#pragma once

#include <cstdint>
#include <cstring>

static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // rounds x / log 2 to a whole number n
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float e = 1.9875691e-4f;
    e = e * r + 1.3981999e-3f;
    e = e * r + 8.3334519e-3f;
    e = e * r + 4.1665796e-2f;
    e = e * r + 1.6666665e-1f;
    e = e * r + 0.5f;
    e = e * r * r + r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;  // 2^n: the low bits of `shifted` hold n
    float power;
    std::memcpy(&power, &bits, 4);
    return e * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
