// The floats of a vector register of this machine, as GCC's vector extensions name them. Used by the .cpp files here.

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
