// The floats of a vector register of this machine, as GCC's vector extensions name them, and their sum. Used by the .cpp
// files here.

#pragma once

#include <cstdint>

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// In halves: the second is added to the first until one number is left. Short chains, so that sums overlap.
inline float total(Floats v) {
    float part[LANES];
    for (int64_t i = 0; i < LANES / 2; i++) part[i] = v[i] + v[LANES / 2 + i];
    for (int64_t half = LANES / 4; half; half /= 2)
        for (int64_t i = 0; i < half; i++) part[i] += part[half + i];
    return part[0];
}
