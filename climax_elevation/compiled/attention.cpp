// Attention of a tile of queries and keys, whose bias is given, and its gradient: attention/tile.py says what each
// function computes. Products go to a BLAS; between them each number is passed over once, while it is in the cache.

#include "wide.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t QUERIES = 256, KEYS = 512; // at once: two buffers of their pairs stay in the second cache

template <class T>
using Gemm = void (*)(const char *, const char *, const int *, const int *, const int *, const T *, const T *,
                      const int *, const T *, const int *, const T *, T *, const int *);
Gemm<float> sgemm;
Gemm<double> dgemm;
template <class T> Gemm<T> gemm();
template <> Gemm<float> gemm() { return sgemm; }
template <> Gemm<double> gemm() { return dgemm; }

template <class T> struct Matrix { // rows of consecutive numbers
    T *data;
    int64_t row;
    bool turned = false;
    Matrix t() const { return {data, row, !turned}; }
};

// c[m, n] = alpha a[m, k] b[k, n] + beta c. BLAS has columns for rows, so it is told c^T = b^T a^T.
template <class T>
void product(int64_t m, int64_t n, int64_t k, T alpha, Matrix<T> a, Matrix<T> b, T beta, Matrix<T> c) {
    const int size[] = {int(m), int(n), int(k)}, step[] = {int(a.row), int(b.row), int(c.row)};
    gemm<T>()(b.turned ? "T" : "N", a.turned ? "T" : "N", &size[1], &size[0], &size[2], &alpha, b.data, &step[1],
              a.data, &step[0], &beta, c.data, &step[2]);
}

// s becomes the weights e^(s + b - highest); what was gathered under a lower highest logit is put under the new one.
template <class T>
void gather(T *s, const T *b, int64_t columns, T &highest, T &sum, T *out, int64_t width) {
    const T lowest = -std::numeric_limits<T>::infinity();
    Wide<T> high[] = {all(lowest), all(lowest)}, weights_sum[2] = {};
    across<T>(columns, [&](auto read, auto, int turn) {
        high[turn] = larger(high[turn], read(s, lowest) + read(b, T(0)));
    });
    const T before = highest;
    highest = larger(before, largest<T>(larger(high[0], high[1])));
    across<T>(columns, [&](auto read, auto write, int turn) {
        const Wide<T> weights = exponential(read(s, lowest) + read(b, T(0)) - highest);
        weights_sum[turn] += weights;
        write(s, weights);
    });
    if (highest != before) {
        const T share = std::exp(before - highest);
        sum *= share;
        across<T>(width, [&](auto read, auto write, int) { write(out, read(out, T(0)) * share); });
    }
    sum += total<T>(weights_sum[0] + weights_sum[1]);
}

// s becomes the probabilities e^(s + b - logsumexp).
template <class T> void normalise(T *s, const T *b, int64_t columns, T logsumexp) {
    across<T>(columns, [&](auto read, auto write, int) {
        write(s, exponential(read(s, T(0)) + (read(b, T(0)) - logsumexp)));
    });
}

// dp becomes ds = p (dp - delta), which db takes too.
template <class T> void differentiate(T *dp, const T *p, T *db, int64_t columns, T delta) {
    across<T>(columns, [&](auto read, auto write, int) {
        const Wide<T> ds = read(p, T(0)) * (read(dp, T(0)) - delta);
        write(dp, ds);
        write(db, read(db, T(0)) + ds);
    });
}

template <class T> T *buffer(int which, int64_t numbers) {
    thread_local std::vector<T> kept[2]; // new memory costs more than what is computed in it
    if (int64_t(kept[which].size()) < numbers) kept[which].resize(numbers);
    return kept[which].data();
}

// Calls body(sample, head, queries from, how many, keys from, how many).
template <class Body> void in_blocks(int64_t samples, int64_t heads, int64_t rows, int64_t columns, Body body) {
    for (int64_t sample = 0; sample < samples; sample++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t at = 0; at < columns; at += KEYS)
                for (int64_t top = 0; top < rows; top += QUERIES)
                    body(sample, head, top, std::min(QUERIES, rows - top), at, std::min(KEYS, columns - at));
}

template <class T>
void attend(const View<T> &q, const View<T> &k, const View<T> &v, const View<T> &b, const View<T> &highest,
            const View<T> &sums, const View<T> &out, double scale, int64_t samples, int64_t heads, int64_t rows,
            int64_t columns, int64_t width, int64_t width_v) {
    in_blocks(samples, heads, rows, columns, [&](auto sample, auto head, auto top, auto some, auto at, auto keys) {
        const auto of = [&](auto &view, int64_t row) { return Matrix<T>{view.at(sample, head, row), view.row}; };
        const Matrix<T> weights{buffer<T>(0, QUERIES * KEYS), keys};
        product<T>(some, keys, width, scale, of(q, top), of(k, at).t(), 0, weights);
        for (int64_t row = 0; row < some; row++)
            gather(weights.data + row * keys, b.at(0, head, top + row) + at, keys, *highest.at(sample, head, top + row),
                   *sums.at(sample, head, top + row), out.at(sample, head, top + row), width_v);
        product<T>(some, width_v, keys, 1, weights, of(v, at), 1, of(out, top));
    });
}

template <class T>
void differentiate(const View<T> &q, const View<T> &k, const View<T> &v, const View<T> &grad, const View<T> &logsumexp,
                   const View<T> &delta, const View<T> &b, const View<T> &dq, const View<T> &dk, const View<T> &dv,
                   const View<T> &db, double scale, int64_t samples, int64_t heads, int64_t rows, int64_t columns,
                   int64_t width, int64_t width_v) {
    in_blocks(samples, heads, rows, columns, [&](auto sample, auto head, auto top, auto some, auto at, auto keys) {
        const auto of = [&](auto &view, int64_t row) { return Matrix<T>{view.at(sample, head, row), view.row}; };
        const Matrix<T> p{buffer<T>(0, QUERIES * KEYS), keys}, ds{buffer<T>(1, QUERIES * KEYS), keys};
        product<T>(some, keys, width, scale, of(q, top), of(k, at).t(), 0, p);
        for (int64_t row = 0; row < some; row++)
            normalise(p.data + row * keys, b.at(0, head, top + row) + at, keys, *logsumexp.at(sample, head, top + row));
        product<T>(keys, width_v, some, 1, p.t(), of(grad, top), 1, of(dv, at));
        product<T>(some, keys, width_v, 1, of(grad, top), of(v, at).t(), 0, ds);
        for (int64_t row = 0; row < some; row++)
            differentiate(ds.data + row * keys, p.data + row * keys, db.at(0, head, top + row) + at, keys,
                          *delta.at(sample, head, top + row));
        product<T>(some, width, keys, scale, ds, of(k, at), 1, of(dq, top));
        product<T>(keys, width, some, scale, ds.t(), of(q, top), 1, of(dk, at));
    });
}

} // namespace

#define FOR(T)                                                                                                         \
    void attend_##T(const View<T> *q, const View<T> *k, const View<T> *v, const View<T> *b, const View<T> *highest,    \
                    const View<T> *sums, const View<T> *out, double scale, int64_t samples, int64_t heads,             \
                    int64_t rows, int64_t columns, int64_t width, int64_t width_v) {                                   \
        attend<T>(*q, *k, *v, *b, *highest, *sums, *out, scale, samples, heads, rows, columns, width, width_v);        \
    }                                                                                                                  \
    void differentiate_##T(const View<T> *q, const View<T> *k, const View<T> *v, const View<T> *grad,                  \
                           const View<T> *logsumexp, const View<T> *delta, const View<T> *b, const View<T> *dq,        \
                           const View<T> *dk, const View<T> *dv, const View<T> *db, double scale, int64_t samples,     \
                           int64_t heads, int64_t rows, int64_t columns, int64_t width, int64_t width_v) {             \
        differentiate<T>(*q, *k, *v, *grad, *logsumexp, *delta, *b, *dq, *dk, *dv, *db, scale, samples, heads, rows,   \
                         columns, width, width_v);                                                                     \
    }

extern "C" {
void use_blas(Gemm<float> of_float, Gemm<double> of_double) { sgemm = of_float, dgemm = of_double; }
FOR(float)
FOR(double)
}
