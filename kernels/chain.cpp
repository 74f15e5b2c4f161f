// Prepared calls, one after the other: functions (const void *call, int threads), see chain.py.

#include <cstdint>

extern "C" void chain(void (*const *functions)(const void *, int), const void *const *calls, int64_t count, int threads) {
    for (int64_t i = 0; i < count; i++) functions[i](calls[i], threads);
}
