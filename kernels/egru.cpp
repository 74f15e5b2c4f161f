// The event-based GRU on the CPU in float32: egru.py holds the equations, segments.py how tokens stand in rows.
//
// A task is one head and some tiles of four segments; it keeps the weights of its head and the states of a tile in its
// caches for all steps. Blocks of a head are padded to whole vectors of 16. Backward, gates are computed anew step by
// step; the gradient of the weights takes eight steps at once. Sums do not depend on the number of threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "exponential.h"

namespace {

constexpr int64_t ROWS = 4, STEPS = 8, VECTOR = 16;  // rows of a tile, steps per product for the weights' gradient

struct Problem {
    const float *a, *weight, *bias, *threshold, *first, *mask;  // mask may be null: then `keep` everywhere
    const int64_t *offsets, *tokens, *previous;                // rows of step t: offsets[t] to offsets[t + 1]
    int64_t segments, steps, heads, width, groups, evnn;
    float keep;

    int64_t padded() const { return (width + VECTOR - 1) / VECTOR * VECTOR; }
    int64_t channels() const { return heads * width; }
    int64_t running(int64_t t, int64_t tile) const {
        return std::clamp<int64_t>(offsets[t + 1] - offsets[t] - tile * ROWS, 0, ROWS);
    }
    int64_t row(int64_t t, int64_t tile) const { return offsets[t] + tile * ROWS; }
    int64_t steps_of(int64_t tile) const {
        int64_t t = 0;
        while (t < steps && running(t, tile)) t++;
        return t;
    }
};

using Buffer = std::vector<float>;

float tanh_of(float x) { return 2.0f / (1.0f + exponential(-2.0f * x)) - 1.0f; }

// to[4][columns] += left[4][inner] right[inner][columns]; element (r, k) of left at r * by_row + k * by_inner.
void multiply(float *to, int64_t to_row, const float *left, int64_t by_row, int64_t by_inner, const float *right,
              int64_t right_row, int64_t inner, int64_t columns) {
    typedef float Vector __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
    for (int64_t j = 0; j < columns; j += 2 * VECTOR) {
        const int64_t second = j + VECTOR < columns ? VECTOR : 0;  // an odd last vector is computed twice
        Vector sums[ROWS][2];
        for (int r = 0; r < ROWS; r++) {
            sums[r][0] = *(const Vector *)(to + r * to_row + j);
            sums[r][1] = *(const Vector *)(to + r * to_row + j + second);
        }
        for (int64_t k = 0; k < inner; k++) {
            const Vector one = *(const Vector *)(right + k * right_row + j);
            const Vector two = *(const Vector *)(right + k * right_row + j + second);
            for (int r = 0; r < ROWS; r++) {
                const float x = left[r * by_row + k * by_inner];
                sums[r][0] += x * one;
                sums[r][1] += x * two;
            }
        }
        for (int r = 0; r < ROWS; r++) {
            *(Vector *)(to + r * to_row + j) = sums[r][0];
            *(Vector *)(to + r * to_row + j + second) = sums[r][1];
        }
    }
}

// Weights of a head [D][3 blocks of padded width].
Buffer pack(const Problem &p, int64_t head) {
    const int64_t D = p.width, P = p.padded();
    Buffer packed(D * 3 * P, 0.0f);
    for (int64_t i = 0; i < 3 * D; i++)
        std::copy_n(p.weight + (head * 3 * D + i) * D, D, packed.data() + i * P);
    return packed;
}

// The same transposed [3 blocks of D][padded width].
Buffer pack_transposed(const Problem &p, int64_t head) {
    const int64_t D = p.width, P = p.padded();
    Buffer packed(3 * D * P, 0.0f);
    for (int64_t i = 0; i < D; i++)
        for (int64_t j = 0; j < 3 * D; j++) packed[j * P + i] = p.weight[(head * D + i) * 3 * D + j];
    return packed;
}

void fill_bias(const Problem &p, int64_t head, float *q) {
    for (int64_t i = 0; i < ROWS * 3; i++)
        std::copy_n(p.bias + (head * 3 + i % 3) * p.width, p.width, q + i * p.padded());
}

const float *mask_of(const Problem &p, int64_t token, int64_t head, const Buffer &constant) {
    return p.mask ? p.mask + token * p.channels() + head * p.width : constant.data();
}

template <bool EVNN>
void forward_tile(const Problem &p, int64_t head, int64_t tile, const float *weight, float *events, float *before,
                  float *ends) {
    const int64_t D = p.width, P = p.padded(), H = p.channels(), from = head * D;
    const float *threshold = p.threshold + from;
    Buffer c(ROWS * P), y(ROWS * P), q(ROWS * 3 * P), seen(ROWS * P), constant(D, p.keep);
    const int64_t count = std::min(ROWS, p.segments - tile * ROWS);
    for (int64_t b = 0; b < count; b++) {
        const float *states = p.first + (tile * ROWS + b) * 2 * H + from;
        std::copy_n(states, D, &c[b * P]);
        std::copy_n(states + H, D, &y[b * P]);
    }
    for (int64_t t = 0, n; t < p.steps && (n = p.running(t, tile)); t++) {
        if (EVNN) {
            fill_bias(p, head, q.data());
            multiply(q.data(), 3 * P, y.data(), P, 1, weight, 3 * P, D, 3 * P);
        } else {
            std::fill(q.begin(), q.end(), 0.0f);
            multiply(q.data(), 3 * P, y.data(), P, 1, weight, 3 * P, D, 2 * P);
            for (int64_t b = 0; b < n; b++) {
                const float *a = p.a + p.tokens[p.row(t, tile) + b] * 3 * H + 3 * from + D;
#pragma GCC ivdep
                for (int64_t j = 0; j < D; j++) seen[b * P + j] = y[b * P + j] * sigmoid(a[j] + q[b * 3 * P + P + j]);
            }
            multiply(q.data() + 2 * P, 3 * P, seen.data(), P, 1, weight + 2 * P, 3 * P, D, P);
        }
        for (int64_t b = 0; b < n; b++) {
            const int64_t token = p.tokens[p.row(t, tile) + b];
            const float *a = p.a + token * 3 * H + 3 * from, *m = mask_of(p, token, head, constant);
            const float *__restrict q_b = &q[b * 3 * P];
            float *__restrict c_b = &c[b * P], *__restrict y_b = &y[b * P];
            float *__restrict p_b = before + token * H + from, *__restrict out = events + token * H + from;
#pragma GCC ivdep
            for (int64_t j = 0; j < D; j++) {
                const float one = sigmoid(a[j] + q_b[j]);
                float fresh;
                if (EVNN) {
                    const float r = sigmoid(a[D + j] + q_b[P + j]), g = tanh_of(a[2 * D + j] + r * q_b[2 * P + j]);
                    fresh = one * c_b[j] + (1.0f - one) * g;
                } else {
                    fresh = one * tanh_of(a[2 * D + j] + q_b[2 * P + j]) + (1.0f - one) * c_b[j] - y_b[j];
                }
                const float state = (1.0f - m[j]) * c_b[j] + m[j] * fresh;
                const bool fired = state > threshold[j];
                p_b[j] = state;
                out[j] = y_b[j] = fired ? state : 0.0f;
                c_b[j] = EVNN && fired ? state - threshold[j] : state;
            }
        }
    }
    for (int64_t b = 0; b < count; b++) {
        float *states = ends + (tile * ROWS + b) * 2 * H + from;
        std::copy_n(&c[b * P], D, states);
        std::copy_n(&y[b * P], D, states + H);
    }
}

struct Gradients {
    const float *dy, *dends, *before;  // dy may be null
    float *da, *dfirst;
    float *dweight, *dthreshold, *dbias;  // [groups][...]: one part per task, zero at first
    float dampening, support;
};

// What the backward pass of a task works on; rows of `y`, `seen` and `dq` are kept for STEPS steps.
struct Scratch {
    Buffer y, seen, dq, q, c, carried, dc, dseen, new_carried, dweight, dthreshold, constant;
    explicit Scratch(const Problem &p) {
        const int64_t P = p.padded(), kept = STEPS * ROWS;
        y.resize(kept * P), seen.resize(kept * P), dq.resize(kept * 3 * P), q.resize(ROWS * 3 * P);
        for (Buffer *x : {&c, &carried, &dc, &dseen, &new_carried}) x->resize(ROWS * P);
        dweight.resize(P * 3 * P), dthreshold.resize(P), constant.assign(p.width, p.keep);
    }
};

// States in front of the step, from those before the reset.
template <bool EVNN>
void load_previous(const Problem &p, const Gradients &g, int64_t head, int64_t tile, int64_t t, int64_t n, float *y,
                   Scratch &s) {
    const int64_t D = p.width, P = p.padded(), H = p.channels(), from = head * D;
    const float *threshold = p.threshold + from;
    for (int64_t b = 0; b < n; b++) {
        float *__restrict y_b = y + b * P, *__restrict c_b = &s.c[b * P];
        if (t == 0) {
            const float *states = p.first + (tile * ROWS + b) * 2 * H + from;
            std::copy_n(states, D, c_b);
            std::copy_n(states + H, D, y_b);
            continue;
        }
        const float *state = g.before + p.previous[p.row(t, tile) + b] * H + from;
#pragma GCC ivdep
        for (int64_t j = 0; j < D; j++) {
            const bool fired = state[j] > threshold[j];
            y_b[j] = fired ? state[j] : 0.0f;
            c_b[j] = EVNN && fired ? state[j] - threshold[j] : state[j];
        }
    }
}

// One row of one step: gradient dp of the state before the reset, the threshold's, and what goes to c_{t-1}. In: the
// share `fresh` that the new state has. Inlined, so that whoever asks for it runs in vectors.
template <bool EVNN>
inline float arrive(float dampening, float support, float state, float threshold, float dy, float dc, float &dthreshold) {
    const bool fired = state > threshold;
    float slope = 1.0f - support * std::abs(state - threshold);
    slope = dampening * (slope > 0.0f ? slope : 0.0f);
    const float by_reset = EVNN ? threshold * dc : 0.0f;
    const float by_event = slope * (state * dy - by_reset);
    dthreshold -= by_event + (EVNN && fired ? dc : 0.0f);
    return dc + (fired ? dy : 0.0f) + by_event;
}

void backward_evnn(const Problem &p, const Gradients &g, int64_t head, int64_t tile, int64_t t, int64_t n,
                   const float *weight, const float *transposed, const float *y, float *dq, Scratch &s) {
    const int64_t D = p.width, P = p.padded(), H = p.channels(), from = head * D;
    fill_bias(p, head, s.q.data());
    multiply(s.q.data(), 3 * P, y, P, 1, weight, 3 * P, D, 3 * P);
    for (int64_t b = 0; b < n; b++) {
        const int64_t token = p.tokens[p.row(t, tile) + b];
        const float *a = p.a + token * 3 * H + 3 * from, *m = mask_of(p, token, head, s.constant);
        const float *state = g.before + token * H + from, *dy = g.dy ? g.dy + token * H + from : nullptr;
        const float *threshold = p.threshold + from, *q = &s.q[b * 3 * P], *c = &s.c[b * P];
        float *__restrict da = g.da + token * 3 * H + 3 * from, *__restrict dq_b = dq + b * 3 * P;
        float *__restrict dc = &s.dc[b * P], *__restrict carried = &s.carried[b * P];
        float *__restrict dthreshold = s.dthreshold.data();
        const float dampening = g.dampening, support = g.support;
        if (dy)
            for (int64_t j = 0; j < D; j++) carried[j] += dy[j];
#pragma GCC ivdep
        for (int64_t j = 0; j < D; j++) {
            const float dp = arrive<true>(dampening, support, state[j], threshold[j], carried[j], dc[j], dthreshold[j]);
            const float z = sigmoid(a[j] + q[j]), r = sigmoid(a[D + j] + q[P + j]), q_g = q[2 * P + j];
            const float gate = tanh_of(a[2 * D + j] + r * q_g), fresh = (1.0f - z) * m[j];
            const float dg = dp * fresh * (1.0f - gate * gate);
            dc[j] = dp * (1.0f - fresh);
            da[j] = dq_b[j] = dp * m[j] * (c[j] - gate) * z * (1.0f - z);
            da[D + j] = dq_b[P + j] = dg * q_g * r * (1.0f - r);
            da[2 * D + j] = dg;
            dq_b[2 * P + j] = dg * r;
        }
    }
    std::fill(s.new_carried.begin(), s.new_carried.end(), 0.0f);
    for (int64_t block = 0; block < 3; block++)
        multiply(s.new_carried.data(), P, dq + block * P, 3 * P, 1, transposed + block * D * P, P, D, P);
    std::copy_n(s.new_carried.data(), n * P, s.carried.data());
}

void backward_paper(const Problem &p, const Gradients &g, int64_t head, int64_t tile, int64_t t, int64_t n,
                    const float *weight, const float *transposed, const float *y, float *seen, float *dq, Scratch &s) {
    const int64_t D = p.width, P = p.padded(), H = p.channels(), from = head * D;
    std::fill(s.q.begin(), s.q.end(), 0.0f);
    multiply(s.q.data(), 3 * P, y, P, 1, weight, 3 * P, D, 2 * P);
    for (int64_t b = 0; b < n; b++) {
        const float *a = p.a + p.tokens[p.row(t, tile) + b] * 3 * H + 3 * from;
        float *__restrict q = &s.q[b * 3 * P], *__restrict seen_b = seen + b * P;
#pragma GCC ivdep
        for (int64_t j = 0; j < D; j++) {
            q[P + j] = sigmoid(a[D + j] + q[P + j]);
            seen_b[j] = q[P + j] * y[b * P + j];
        }
    }
    multiply(s.q.data() + 2 * P, 3 * P, seen, P, 1, weight + 2 * P, 3 * P, D, P);
    std::fill(s.new_carried.begin(), s.new_carried.end(), 0.0f);
    std::fill(s.dseen.begin(), s.dseen.end(), 0.0f);
    for (int64_t b = 0; b < n; b++) {
        const int64_t token = p.tokens[p.row(t, tile) + b];
        const float *a = p.a + token * 3 * H + 3 * from, *m = mask_of(p, token, head, s.constant);
        const float *state = g.before + token * H + from, *dy = g.dy ? g.dy + token * H + from : nullptr;
        const float *threshold = p.threshold + from, *q = &s.q[b * 3 * P], *c = &s.c[b * P];
        float *__restrict da = g.da + token * 3 * H + 3 * from, *__restrict dq_b = dq + b * 3 * P;
        float *__restrict dc = &s.dc[b * P], *__restrict carried = &s.carried[b * P];
        float *__restrict next = &s.new_carried[b * P], *__restrict dthreshold = s.dthreshold.data();
        const float dampening = g.dampening, support = g.support;
        if (dy)
            for (int64_t j = 0; j < D; j++) carried[j] += dy[j];
#pragma GCC ivdep
        for (int64_t j = 0; j < D; j++) {
            const float dp = arrive<false>(dampening, support, state[j], threshold[j], carried[j], dc[j], dthreshold[j]);
            const float u = sigmoid(a[j] + q[j]), z = tanh_of(a[2 * D + j] + q[2 * P + j]), fresh = u * m[j];
            dc[j] = dp * (1.0f - fresh);
            da[j] = dq_b[j] = dp * m[j] * (z - c[j]) * u * (1.0f - u);
            da[2 * D + j] = dq_b[2 * P + j] = dp * fresh * (1.0f - z * z);
            next[j] = -dp * m[j];
        }
    }
    multiply(s.dseen.data(), P, dq + 2 * P, 3 * P, 1, transposed + 2 * D * P, P, D, P);
    for (int64_t b = 0; b < n; b++) {
        float *da = g.da + p.tokens[p.row(t, tile) + b] * 3 * H + 3 * from + D;
        const float *r = &s.q[b * 3 * P + P], *dseen = &s.dseen[b * P];
#pragma GCC ivdep
        for (int64_t j = 0; j < D; j++) {
            da[j] = dq[b * 3 * P + P + j] = dseen[j] * seen[b * P + j] * (1.0f - r[j]);
            s.new_carried[b * P + j] += r[j] * dseen[j];
        }
    }
    for (int64_t block = 0; block < 2; block++)
        multiply(s.new_carried.data(), P, dq + block * P, 3 * P, 1, transposed + block * D * P, P, D, P);
    std::copy_n(s.new_carried.data(), n * P, s.carried.data());
}

// Add what the kept rows give to weights, thresholds and bias.
void flush(const Problem &p, const Gradients &g, int64_t head, int64_t group, int64_t rows, Scratch &s) {
    const int64_t D = p.width, P = p.padded(), part = group * p.heads + head;
    const int64_t outer = p.evnn ? 3 * P : 2 * P;
    for (int64_t i = 0; i < D; i += ROWS) {
        float *to = &s.dweight[i * 3 * P];
        multiply(to, 3 * P, &s.y[i], 1, P, s.dq.data(), 3 * P, rows, outer);
        if (!p.evnn) multiply(to + outer, 3 * P, &s.seen[i], 1, P, s.dq.data() + outer, 3 * P, rows, P);
    }
    for (int64_t block = 0; block < 3 && p.evnn; block++) {
        std::fill(s.dseen.begin(), s.dseen.end(), 0.0f);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t j = 0; j < P; j++) s.dseen[j] += s.dq[(row * 3 + block) * P + j];
        for (int64_t j = 0; j < D; j++) g.dbias[(part * 3 + block) * D + j] += s.dseen[j];
    }
    for (int64_t j = 0; j < D; j++) g.dthreshold[part * D + j] += s.dthreshold[j];
    for (Buffer *x : {&s.y, &s.seen, &s.dq, &s.dthreshold}) std::fill(x->begin(), x->end(), 0.0f);
}

void backward_task(const Problem &p, const Gradients &g, int64_t head, int64_t group) {
    const int64_t D = p.width, P = p.padded(), H = p.channels(), from = head * D;
    const Buffer weight = pack(p, head), transposed = pack_transposed(p, head);
    Scratch s(p);
    for (int64_t tile = group; tile * ROWS < p.segments; tile += p.groups) {
        const int64_t count = std::min(ROWS, p.segments - tile * ROWS);
        for (int64_t b = 0; b < count; b++) {
            const float *states = g.dends + (tile * ROWS + b) * 2 * H + from;
            std::copy_n(states, D, &s.dc[b * P]);
            std::copy_n(states + H, D, &s.carried[b * P]);
        }
        int64_t kept = 0;
        for (int64_t t = p.steps_of(tile) - 1; t >= 0; t--) {
            const int64_t n = p.running(t, tile);
            float *y = &s.y[kept * P], *seen = &s.seen[kept * P], *dq = &s.dq[kept * 3 * P];
            if (p.evnn) {
                load_previous<true>(p, g, head, tile, t, n, y, s);
                backward_evnn(p, g, head, tile, t, n, weight.data(), transposed.data(), y, dq, s);
            } else {
                load_previous<false>(p, g, head, tile, t, n, y, s);
                backward_paper(p, g, head, tile, t, n, weight.data(), transposed.data(), y, seen, dq, s);
            }
            kept += ROWS;
            if (kept == STEPS * ROWS || t == 0) flush(p, g, head, group, kept, s), kept = 0;
        }
        for (int64_t b = 0; b < count; b++) {
            float *states = g.dfirst + (tile * ROWS + b) * 2 * H + from;
            std::copy_n(&s.dc[b * P], D, states);
            std::copy_n(&s.carried[b * P], D, states + H);
        }
    }
    for (int64_t i = 0; i < 3 * D; i++)
        std::copy_n(&s.dweight[i * P], D, g.dweight + ((group * p.heads + head) * 3 * D + i) * D);
}

template <class Task>
void run(const Problem &p, int64_t threads, Task task) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t i; (i = next++) < p.heads * p.groups;) task(i % p.heads, i / p.heads);
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < std::min(threads, p.heads * p.groups); i++) others.emplace_back(work);
    } catch (const std::system_error &) {  // no more threads to be had: those that there are do the work
    }
    work();
    for (auto &other : others) other.join();
}

}  // namespace

extern "C" void egru_forward(const Problem *problem, float *events, float *before, float *ends, int64_t threads) {
    const Problem &p = *problem;
    run(p, threads, [&](int64_t head, int64_t group) {
        const Buffer weight = pack(p, head);
        for (int64_t tile = group; tile * ROWS < p.segments; tile += p.groups)
            (p.evnn ? forward_tile<true> : forward_tile<false>)(p, head, tile, weight.data(), events, before, ends);
    });
}

extern "C" void egru_backward(const Problem *problem, const Gradients *gradients, int64_t threads) {
    run(*problem, threads, [&](int64_t head, int64_t group) { backward_task(*problem, *gradients, head, group); });
}
