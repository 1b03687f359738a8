// One token of every row through a Doge, on a CPU: what model.py computes, as loops over memory.
//
// nanodoge/cpp_step.py compiles this file and calls `step`. To read it, loops and structs are enough. All threads run
// `forward` together; `#pragma omp for` divides the rounds of a loop among them, and waits until all are done.
//
// Why it is fast. A token needs every weight once, so it takes at least the time of reading them from memory. Little
// else takes time: intermediate results stay in the CPU's cache, and no operation is launched one by one from Python. A
// product reads STREAMS rows side by side, because a core fetches several streams of memory faster than one. int8
// weights are multiplied by int8 inputs: each BLOCK of inputs is divided by a scale of its own and rounded.
//
// Shapes as in model.py: n tokens, C hidden size, M intermediate size, H attention heads, K key/value heads, D head
// size, V vocabulary, G = H / K. N slots of a cache, of which the last is a spare (see Cache in nanodoge/attention.py).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

using std::vector;

constexpr int STREAMS = 4, BLOCK = 256;           // BLOCK as in nanodoge/onnx_step.py
constexpr float NEVER = -1e30f, LARGEST = 80.0f;  // as in nanodoge/attention.py

// ---- What cpp_step.py passes: it has the same structs

struct Matrix {  // values (rows, columns); of int8 also scale (rows) and the sums of each block (rows, blocks)
    const void* values;
    const float* scale;
    const int32_t* sums;
    int rows, columns;
};

struct Layer {
    const float *norm1, *norm2, *residual1, *residual2;  // (C)
    const float *dt, *A, *heads;                         // (K, K D), (K), (H + K, D): the norms of queries and keys
    Matrix qkv, out, gate_up, down, router;              // router (2 keys, C) fp32
    const void *down_embed, *up_embed;                   // (E, C)
};

struct Model {
    int layers, C, M, H, K, D, keys, top_k, qk_norm;  // keys = sqrt(E), 0 without experts
    float eps;
    const Layer* layer;
    const void* embedding;  // (V, C)
    const float* norm;      // (C)
    Matrix head;            // (V, C)
};

struct Slots {
    void *k, *v;        // (B, K, N, D)
    float* s;           // (B, K, N)
    int64_t* position;  // (B, K, N)
};

struct Tokens {
    int n, N, wanted, stride;         // tokens; slots; how many of them, the last ones, get logits; see frequencies
    const int64_t *id, *row, *place;  // (n): of each its row in the cache, and how many tokens are before it
    const float* frequencies;         // of the rotary embedding: D / 2 numbers, of token i from i * stride on
    const Slots* slots;               // of each layer
};

// ---- Numbers. A model and its cache are of type F, float or bfloat16; its matrices of type W, or int8_t.

struct bfloat16 {
    uint16_t bits;  // the upper half of a float
};

inline float number(float x) { return x; }

inline float number(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline void store(float& y, float x) { y = x; }

inline void store(bfloat16& y, float x) {  // the nearest, of two the even one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    y.bits = uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float silu(float x) { return x / (1 + std::exp(-x)); }

// ---- Products

struct Rows {  // n rows of inputs. rounded, scale: for int8 weights, 128 + x / scale
    int columns = 0, blocks = 0;
    vector<float> x, scale;
    vector<uint8_t> rounded;

    void resize(int n, int width) {
        columns = width, blocks = (width + BLOCK - 1) / BLOCK;
        x.resize(size_t(n) * columns), rounded.resize(size_t(n) * columns), scale.resize(size_t(n) * blocks);
    }

    void round(int i) {
        for (int b = 0; b < blocks; b++) {
            size_t begin = size_t(i) * columns + b * BLOCK;
            size_t end = std::min(begin + BLOCK, size_t(i + 1) * columns);
            float largest = 1e-12f, lost = 0;  // lost: nan if one of them is inf or nan, which has no rounded form
            for (size_t j = begin; j < end; j++) largest = std::max(largest, std::fabs(x[j])), lost += 0 * x[j];
            for (size_t j = begin; j < end; j++) rounded[j] = uint8_t(int(x[j] * (127 / largest) + 128.5f));
            scale[size_t(i) * blocks + b] = largest / 127 + lost;
        }
    }
};

// sum[a] += x . (row a of R rows), for one block of inputs. The rows are `apart` numbers apart.
template <int R, class W>
inline void dot(const float* x, const W* w, size_t apart, int n, float* sum) {
    float total[R] = {};
    for (int j = 0; j < n; j++)
        for (int a = 0; a < R; a++) total[a] += x[j] * number(w[a * apart + j]);
    for (int a = 0; a < R; a++) sum[a] += total[a];
}

template <int R>
inline void dot(const uint8_t* x, const int8_t* w, size_t apart, int n, int* total) {
    for (int a = 0; a < R; a++) total[a] = 0;
    for (int j = 0; j < n; j++)
        for (int a = 0; a < R; a++) total[a] += int(x[j]) * int(w[a * apart + j]);
}

// y (end - begin, rows) = inputs begin ... end - 1 times the rows of m, R of them read side by side.
template <int R, class W>
void multiply(const Matrix& m, const Rows& in, int begin, int end, float* y) {
    int apart = m.rows / R;
#pragma omp for schedule(static)
    for (int r = 0; r < apart; r++)
        for (int i = begin; i < end; i++) {
            float sum[R] = {};
            for (int b = 0; b < in.blocks; b++) {
                int column = b * BLOCK, size = std::min(BLOCK, m.columns - column);
                const W* w = (const W*)m.values + size_t(r) * m.columns + column;
                size_t distance = size_t(apart) * m.columns, at = size_t(i) * m.columns + column;
                if constexpr (sizeof(W) > 1) {
                    dot<R>(&in.x[at], w, distance, size, sum);
                } else {
                    int total[R];
                    dot<R>(&in.rounded[at], w, distance, size, total);
                    for (int a = 0; a < R; a++) {
                        int zero = 128 * m.sums[size_t(r + a * apart) * in.blocks + b];  // of the 128 in `rounded`
                        sum[a] += float(total[a] - zero) * in.scale[size_t(i) * in.blocks + b];
                    }
                }
            }
            for (int a = 0; a < R; a++) {
                int row = r + a * apart;
                y[size_t(i - begin) * m.rows + row] = m.scale ? sum[a] * m.scale[row] : sum[a];
            }
        }
}

template <class W>
void product(const Matrix& m, const Rows& in, int begin, int end, float* y) {
    (m.rows % STREAMS ? multiply<1, W> : multiply<STREAMS, W>)(m, in, begin, end, y);
}

// ---- The parts of a layer. All threads call them, and share what they write.

struct Work {
    Rows h, found, hidden;                 // inputs of products: (n, C), (n, H D), (n, M)
    vector<float> x, y, qkv, both, p;      // (n, C) twice, (n, (H + 2 K) D), (n, 2 M), (n, H, N)
    vector<float> cos, sin;                // (n, D / 2)
    vector<float> routes, weight, active;  // (n, 2 keys), (n, top_k) twice
    vector<int> expert;                    // (n, top_k)
};

inline float inverse_norm(const float* x, int size, float eps) {
    float sum = 0;
    for (int j = 0; j < size; j++) sum += x[j] * x[j];
    return 1 / std::sqrt(sum / size + eps);
}

// h of token i = RMSNorm of its x.
template <class W>
inline void normalise(const float* weight, float eps, int i, Work& work) {
    int C = work.h.columns;
    const float* x = &work.x[size_t(i) * C];
    float scale = inverse_norm(x, C, eps);
    for (int j = 0; j < C; j++) work.h.x[size_t(i) * C + j] = x[j] * scale * weight[j];
    if (sizeof(W) == 1) work.h.round(i);
}

// x = residual x + y, and h = RMSNorm(x).
template <class W>
void add(const float* residual, const float* weight, float eps, int n, Work& work) {
    int C = work.h.columns;
#pragma omp for
    for (int i = 0; i < n; i++) {
        float *x = &work.x[size_t(i) * C], *y = &work.y[size_t(i) * C];
        for (int j = 0; j < C; j++) x[j] = residual[j] * x[j] + y[j];
        normalise<W>(weight, eps, i, work);
    }
}

// A query or a key (D), normalised and rotated in place.
inline void rotate(float* x, const float* weight, const float* cos, const float* sin, const Model& m) {
    float scale = m.qk_norm ? inverse_norm(x, m.D, m.eps) : 1;
    for (int d = 0, half = m.D / 2; d < half; d++) {
        float a = x[d] * scale * weight[d], b = x[d + half] * scale * weight[d + half];
        x[d] = a * cos[d] - b * sin[d], x[d + half] = b * cos[d] + a * sin[d];
    }
}

// The slot of a new key with score s: that of its position while there is room, then that of the weakest key, of equal
// ones the oldest. A key that is weaker than all goes to the spare slot, with score NEVER.
inline int choose_slot(const float* scores, const int64_t* positions, int spare, int64_t place, float& s) {
    if (place < spare) return int(place);
    int weakest = 0;
    for (int j = 1; j < spare; j++) {
        bool is_older = positions[j] < positions[weakest];
        if (scores[j] < scores[weakest] || (scores[j] == scores[weakest] && is_older)) weakest = j;
    }
    if (s >= scores[weakest]) return weakest;
    s = NEVER;
    return spare;
}

// Rotates queries and keys, and puts each key with its value and score into its slot.
template <class F>
void remember(const Model& m, const Layer& layer, const Tokens& t, const Slots& slots, Work& work) {
    int G = m.H / m.K, D = m.D;
#pragma omp for collapse(2)
    for (int i = 0; i < t.n; i++)
        for (int head = 0; head < m.K; head++) {
            float* q = &work.qkv[size_t(i) * (m.H + 2 * m.K) * D];
            const float *cos = &work.cos[size_t(i) * D / 2], *sin = &work.sin[size_t(i) * D / 2];
            for (int g = head * G; g < (head + 1) * G; g++) rotate(q + g * D, layer.heads + g * D, cos, sin, m);
            float *k = q + (m.H + head) * D, *values = q + (m.H + m.K) * D, dt = 0;
            rotate(k, layer.heads + (m.H + head) * D, cos, sin, m);
            for (int j = 0; j < m.K * D; j++) dt += layer.dt[head * m.K * D + j] * values[j];
            float softplus = dt > 20 ? dt : std::log1p(std::exp(dt));
            float s = std::exp(std::min(layer.A[head] * softplus, LARGEST));

            size_t first = (size_t(t.row[i]) * m.K + head) * t.N;
            size_t slot = first + choose_slot(slots.s + first, slots.position + first, t.N - 1, t.place[i], s);
            slots.s[slot] = s, slots.position[slot] = t.place[i];
            for (int d = 0; d < D; d++) {
                store(((F*)slots.k)[slot * D + d], k[d]);
                store(((F*)slots.v)[slot * D + d], values[head * D + d]);
            }
        }
}

// found = softmax(q k / sqrt(D) + s) v over the slots in use. (1 / sqrt(D) is in the norms of the queries.)
template <class F, class W>
void attend(const Model& m, const Tokens& t, const Slots& slots, Work& work) {
    int G = m.H / m.K, D = m.D;
#pragma omp for collapse(2)
    for (int i = 0; i < t.n; i++)
        for (int head = 0; head < m.H; head++) {
            const float* q = &work.qkv[(size_t(i) * (m.H + 2 * m.K) + head) * D];
            size_t first = (size_t(t.row[i]) * m.K + head / G) * t.N;
            const F *k = (F*)slots.k + first * D, *v = (F*)slots.v + first * D;
            int used = int(std::min<int64_t>(t.place[i] + 1, t.N - 1));
            float *p = &work.p[(size_t(i) * m.H + head) * t.N], largest = NEVER, total = 0;
            for (int j = 0; j < used; j++) {
                float sum = 0;
                for (int d = 0; d < D; d++) sum += q[d] * number(k[size_t(j) * D + d]);
                p[j] = sum + slots.s[first + j];
                largest = std::max(largest, p[j]);
            }
            float* found = &work.found.x[(size_t(i) * m.H + head) * D];
            std::fill(found, found + D, 0.0f);
            for (int j = 0; j < used; j++) {
                float weight = std::exp(p[j] - largest);
                total += weight;
                for (int d = 0; d < D; d++) found[d] += weight * number(v[size_t(j) * D + d]);
            }
            for (int d = 0; d < D; d++) found[d] /= total;
        }
    if (sizeof(W) == 1) {
#pragma omp for
        for (int i = 0; i < t.n; i++) work.found.round(i);
    }
}

// y = the shared MLP of every token.
template <class W>
void feed_forward(const Model& m, const Layer& layer, int n, Work& work) {
    product<W>(layer.gate_up, work.h, 0, n, work.both.data());
#pragma omp for
    for (int i = 0; i < n; i++) {
        const float *gate = &work.both[size_t(i) * 2 * m.M], *up = gate + m.M;
        for (int j = 0; j < m.M; j++) work.hidden.x[size_t(i) * m.M + j] = silu(gate[j]) * up[j];
        if (sizeof(W) == 1) work.hidden.round(i);
    }
    product<W>(layer.down, work.hidden, 0, n, work.y.data());
}

// The top_k experts of token i, and the softmax of their scores: see CDMoE.route in model.py.
inline void route(const Model& m, int i, Work& work) {
    int k = std::min(m.top_k, m.keys);
    vector<int> best[2];
    for (int half = 0; half < 2; half++) {
        const float* scores = &work.routes[(size_t(i) * 2 + half) * m.keys];
        best[half].resize(m.keys);
        std::iota(best[half].begin(), best[half].end(), 0);
        auto above = [&](int a, int b) { return scores[a] > scores[b]; };
        std::partial_sort(best[half].begin(), best[half].begin() + k, best[half].end(), above);
    }
    vector<std::pair<float, int>> sums;  // of the pairs that can be among the top_k, with their experts
    const float *rows = &work.routes[size_t(i) * 2 * m.keys], *columns = rows + m.keys;
    for (int a = 0; a < k; a++)
        for (int b = 0; b < k && (a + 1) * (b + 1) <= m.top_k; b++)
            sums.push_back({rows[best[0][a]] + columns[best[1][b]], best[0][a] * m.keys + best[1][b]});
    auto above = [](const auto& a, const auto& b) { return a.first > b.first; };
    std::partial_sort(sums.begin(), sums.begin() + m.top_k, sums.end(), above);
    float total = 0;
    for (int j = 0; j < m.top_k; j++) total += std::exp(sums[j].first - sums[0].first);
    for (int j = 0; j < m.top_k; j++) {
        work.weight[size_t(i) * m.top_k + j] = std::exp(sums[j].first - sums[0].first) / total;
        work.expert[size_t(i) * m.top_k + j] = sums[j].second;
    }
}

// y += sum over a token's experts of  weight * silu(down_embed . h) * up_embed.
template <class F>
void add_experts(const Model& m, const Layer& layer, int n, Work& work) {
    product<float>(layer.router, work.h, 0, n, work.routes.data());
#pragma omp for
    for (int i = 0; i < n; i++) route(m, i, work);
#pragma omp for
    for (int slot = 0; slot < n * m.top_k; slot++) {
        const F* down = (F*)layer.down_embed + size_t(work.expert[slot]) * m.C;
        const float* h = &work.h.x[size_t(slot / m.top_k) * m.C];
        float sum = 0;
        for (int j = 0; j < m.C; j++) sum += h[j] * number(down[j]);
        work.active[slot] = silu(sum) * work.weight[slot];
    }
    int piece = std::min(m.C, BLOCK);
#pragma omp for collapse(2)
    for (int i = 0; i < n; i++)
        for (int begin = 0; begin < m.C; begin += piece)
            for (int slot = i * m.top_k; slot < (i + 1) * m.top_k; slot++) {
                const F* up = (F*)layer.up_embed + size_t(work.expert[slot]) * m.C;
                for (int j = begin; j < std::min(m.C, begin + piece); j++)
                    work.y[size_t(i) * m.C + j] += work.active[slot] * number(up[j]);
            }
}

// ---- The model

template <class F, class W>
void forward(const Model& m, const Tokens& t, float* logits, Work& work) {
    int n = t.n, half = m.D / 2;
#pragma omp for
    for (int i = 0; i < n; i++) {
        const F* embedding = (F*)m.embedding + size_t(t.id[i]) * m.C;
        for (int j = 0; j < m.C; j++) work.x[size_t(i) * m.C + j] = number(embedding[j]);
        for (int d = 0; d < half; d++) {
            float angle = float(t.place[i]) * t.frequencies[size_t(i) * t.stride + d];
            work.cos[size_t(i) * half + d] = std::cos(angle), work.sin[size_t(i) * half + d] = std::sin(angle);
        }
        normalise<W>(m.layer[0].norm1, m.eps, i, work);
    }
    for (int l = 0; l < m.layers; l++) {
        const Layer& layer = m.layer[l];
        product<W>(layer.qkv, work.h, 0, n, work.qkv.data());
        remember<F>(m, layer, t, t.slots[l], work);
        attend<F, W>(m, t, t.slots[l], work);
        product<W>(layer.out, work.found, 0, n, work.y.data());
        add<W>(layer.residual1, layer.norm2, m.eps, n, work);
        feed_forward<W>(m, layer, n, work);
        if (m.keys) add_experts<F>(m, layer, n, work);
        add<W>(layer.residual2, l + 1 < m.layers ? m.layer[l + 1].norm1 : m.norm, m.eps, n, work);
    }
    product<W>(m.head, work.h, n - t.wanted, n, logits);
}

// Adds the tokens to the cache; logits (wanted, V) fp32. is_bfloat16: F; bytes: of W. False, and nothing is done, if
// there is no such token.
extern "C" bool step(const Model* model, const Tokens* tokens, float* logits, int is_bfloat16, int bytes, int threads) {
    static thread_local Work work;
    const Model& m = *model;
    size_t n = size_t(tokens->n);
    for (size_t i = 0; i < n; i++)
        if (tokens->id[i] < 0 || tokens->id[i] >= m.head.rows) return false;
    work.h.resize(n, m.C), work.found.resize(n, m.H * m.D), work.hidden.resize(n, m.M);
    work.x.resize(n * m.C), work.y.resize(n * m.C), work.qkv.resize(n * (m.H + 2 * m.K) * m.D);
    work.both.resize(n * 2 * m.M), work.p.resize(n * m.H * tokens->N);
    work.cos.resize(n * m.D / 2), work.sin.resize(n * m.D / 2);
    work.routes.resize(n * 2 * m.keys), work.weight.resize(n * m.top_k), work.active.resize(n * m.top_k);
    work.expert.resize(n * m.top_k);
    Work& shared = work;  // thread_local: the other threads are given this one
    auto run = bytes == 1 ? (is_bfloat16 ? forward<bfloat16, int8_t> : forward<float, int8_t>)
               : bytes == 2 ? (is_bfloat16 ? forward<bfloat16, bfloat16> : forward<float, bfloat16>)
                            : forward<float, float>;
#pragma omp parallel num_threads(threads)
    run(m, *tokens, logits, shared);
    return true;
}
