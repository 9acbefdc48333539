// Attention of a tile of queries and keys, whose bias is given, and its gradient: attention/tile.py says what each
// function computes. Products go to a BLAS; between them each number is passed over once, while it is in the cache.

#include "wide.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t KEYS = 512; // at once, for 256 queries or so: two buffers of them stay in the second cache

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
    Wide<T> high = all(lowest), weights_sum = {};
    across<T>(columns, [&](auto read, auto write) {
        const Wide<T> logits = read(s, lowest) + read(b, T(0));
        high = larger(high, logits);
        write(s, logits);
    });
    const T before = highest;
    highest = larger(before, largest<T>(high));
    across<T>(columns, [&](auto read, auto write) {
        const Wide<T> weights = exponential(read(s, lowest) - highest);
        weights_sum += weights;
        write(s, weights);
    });
    const T share = std::exp(before - highest);
    sum = sum * share + total<T>(weights_sum);
    if (highest != before)
        across<T>(width, [&](auto read, auto write) { write(out, read(out, T(0)) * share); });
}

// s becomes the probabilities e^(s + b - logsumexp).
template <class T> void normalise(T *s, const T *b, int64_t columns, T logsumexp) {
    across<T>(columns, [&](auto read, auto write) {
        write(s, exponential(read(s, T(0)) + (read(b, T(0)) - logsumexp)));
    });
}

// dp becomes ds = p (dp - delta), which db takes too.
template <class T> void differentiate(T *dp, const T *p, T *db, int64_t columns, T delta) {
    across<T>(columns, [&](auto read, auto write) {
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

template <class T>
void attend(const View<T> &q, const View<T> &k, const View<T> &v, const View<T> &b, const View<T> &highest,
            const View<T> &sums, const View<T> &out, double scale, int64_t samples, int64_t heads, int64_t rows,
            int64_t columns, int64_t width, int64_t width_v) {
    T *s = buffer<T>(0, rows * KEYS);
    for (int64_t sample = 0; sample < samples; sample++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t at = 0; at < columns; at += KEYS) {
                const int64_t keys = std::min(KEYS, columns - at);
                const Matrix<T> weights{s, keys}, o{out.at(sample, head), out.row};
                const Matrix<T> k_some{k.at(sample, head, at), k.row}, v_some{v.at(sample, head, at), v.row};
                product<T>(rows, keys, width, scale, {q.at(sample, head), q.row}, k_some.t(), 0, weights);
                for (int64_t row = 0; row < rows; row++)
                    gather(s + row * keys, b.at(0, head, row) + at, keys, *highest.at(sample, head, row),
                           *sums.at(sample, head, row), out.at(sample, head, row), width_v);
                product<T>(rows, width_v, keys, 1, weights, v_some, 1, o);
            }
}

template <class T>
void differentiate(const View<T> &q, const View<T> &k, const View<T> &v, const View<T> &grad, const View<T> &logsumexp,
                   const View<T> &delta, const View<T> &b, const View<T> &dq, const View<T> &dk, const View<T> &dv,
                   const View<T> &db, double scale, int64_t samples, int64_t heads, int64_t rows, int64_t columns,
                   int64_t width, int64_t width_v) {
    T *p_held = buffer<T>(0, rows * KEYS), *ds_held = buffer<T>(1, rows * KEYS);
    for (int64_t sample = 0; sample < samples; sample++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t at = 0; at < columns; at += KEYS) {
                const int64_t keys = std::min(KEYS, columns - at);
                const Matrix<T> p{p_held, keys}, ds{ds_held, keys};
                const Matrix<T> q_{q.at(sample, head), q.row}, grad_{grad.at(sample, head), grad.row};
                const Matrix<T> k_{k.at(sample, head, at), k.row}, v_{v.at(sample, head, at), v.row};
                const Matrix<T> dq_{dq.at(sample, head), dq.row};
                const Matrix<T> dk_{dk.at(sample, head, at), dk.row}, dv_{dv.at(sample, head, at), dv.row};
                product<T>(rows, keys, width, scale, q_, k_.t(), 0, p);
                for (int64_t row = 0; row < rows; row++)
                    normalise(p.data + row * keys, b.at(0, head, row) + at, keys, *logsumexp.at(sample, head, row));
                product<T>(keys, width_v, rows, 1, p.t(), grad_, 1, dv_);
                product<T>(rows, keys, width_v, 1, grad_, v_.t(), 0, ds);
                for (int64_t row = 0; row < rows; row++)
                    differentiate(ds.data + row * keys, p.data + row * keys, db.at(0, head, row) + at, keys,
                                  *delta.at(sample, head, row));
                product<T>(rows, width, keys, scale, ds, k_, 1, dq_);
                product<T>(keys, width, rows, scale, ds.t(), q_, 1, dk_);
            }
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
