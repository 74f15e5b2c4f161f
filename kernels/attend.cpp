// One token's softmax attention over cached keys and values, on the CPU in float32: attend.py holds the equations.
//
// A task is one key-value head and up to 256 keys: it serves all query heads of the group, so that keys and values are
// read once. Tasks keep their largest score, their sum of weights and their weighted values; these are joined in the
// order of the keys, so that no result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "exponential.h"
#include "lanes.h"

namespace {

constexpr int64_t PIECE = 256;     // keys of a task
constexpr int64_t SHARED = 16384;  // floats of keys below which one thread is faster than waking another

struct Call {  // as _Call in attend.py
    float *qkv;
    const float *cos, *sin;
    float *keys, *values, *heads;
    const int64_t *length;
    int64_t batch, queries, shared, width, turned, capacity;
    float scale;
};

void rotate(float *x, const float *cos, const float *sin, int64_t turned) {
    const int64_t half = turned / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[half + i];
        x[i] = low * cos[i] - high * sin[i];
        x[half + i] = high * cos[half + i] + low * sin[half + i];
    }
}

float dot(const float *a, const float *b, int64_t n) {
    Floats sum = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += *(const Floats *)(a + i) * *(const Floats *)(b + i);
    float all = total(sum);
    for (; i < n; i++) all += a[i] * b[i];
    return all;
}

// Keys [begin, end) of a head for each query of its group: [largest, sum, values...] in `part`.
void piece(const float *q, const float *keys, const float *values, float *part, int64_t group, int64_t width,
           int64_t begin, int64_t end, float scale) {
    float scores[PIECE];
    for (int64_t g = 0; g < group; g++, part += width + 2) {
        float largest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
        for (int64_t j = begin; j < end; j++) {
            scores[j - begin] = scale * dot(q + g * width, keys + j * width, width);
            largest = std::max(largest, scores[j - begin]);
        }
        for (int64_t j = 0; j < end - begin; j++) scores[j] = exponential(scores[j] - largest);
        for (int64_t j = 0; j < end - begin; j++) sum += scores[j];
        part[0] = largest, part[1] = sum;
        float *__restrict total = part + 2;
        std::fill_n(total, width, 0.0f);
        int64_t j = begin;
        for (; j + 4 <= end; j += 4) {
            const float *v = values + j * width, *p = scores + (j - begin);
            for (int64_t d = 0; d < width; d++)
                total[d] += (p[0] * v[d] + p[1] * v[width + d]) + (p[2] * v[2 * width + d] + p[3] * v[3 * width + d]);
        }
        for (; j < end; j++)
            for (int64_t d = 0; d < width; d++) total[d] += scores[j - begin] * values[j * width + d];
    }
}

// The pieces of one query, in order.
void join(const float *parts, int64_t pieces, int64_t stride, int64_t width, float *out) {
    float largest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
    for (int64_t i = 0; i < pieces; i++) largest = std::max(largest, parts[i * stride]);
    std::fill_n(out, width, 0.0f);
    for (int64_t i = 0; i < pieces; i++) {
        const float *part = parts + i * stride, weight = exponential(part[0] - largest);
        sum += weight * part[1];
        for (int64_t d = 0; d < width; d++) out[d] += weight * part[2 + d];
    }
    for (int64_t d = 0; d < width; d++) out[d] /= sum;
}

}  // namespace

extern "C" void attend(const Call *call, int threads) {
    const Call &c = *call;
    const int64_t group = c.queries / c.shared, row = (c.queries + 2 * c.shared) * c.width, length = *c.length, total = length + 1;
    for (int64_t b = 0; b < c.batch; b++) {
        float *q = c.qkv + b * row, *k = q + c.queries * c.width, *v = k + c.shared * c.width;
        for (int64_t h = 0; h < c.queries + c.shared; h++)
            rotate(q + h * c.width, c.cos + b * c.turned, c.sin + b * c.turned, c.turned);
        for (int64_t h = 0; h < c.shared; h++) {
            const int64_t to = ((b * c.shared + h) * c.capacity + length) * c.width;
            std::copy_n(k + h * c.width, c.width, c.keys + to);
            std::copy_n(v + h * c.width, c.width, c.values + to);
        }
    }
    const int64_t pieces = (total + PIECE - 1) / PIECE, each = group * (c.width + 2), tasks = c.batch * c.shared * pieces;
    static thread_local std::vector<float> parts;
    parts.resize(tasks * each);
    float *const begin = parts.data();
    if (c.batch * c.shared * total * c.width < SHARED) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t head = task / pieces, at = task % pieces * PIECE;
        const float *q = c.qkv + head / c.shared * row + head % c.shared * group * c.width;
        const int64_t from = head * c.capacity * c.width;
        piece(q, c.keys + from, c.values + from, begin + task * each, group, c.width, at, std::min(at + PIECE, total),
              c.scale);
    }
    for (int64_t head = 0; head < c.batch * c.shared; head++)
        for (int64_t g = 0; g < group; g++)
            join(begin + head * pieces * each + g * (c.width + 2), pieces, each, c.width,
                 c.heads + (head * group + g) * c.width);
}
