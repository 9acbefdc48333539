// The physics bias of a tile, and the sums that its gradient is made of; the equations are in bias/physics.py.
//
// z is [rows] of queries and [columns] of keys, in units of height; e, wind above the threshold, likewise.
// The penalised part of a rise x is r = max(up x, down x), and s = sigmoid((e_i + e_j) / 2) with wind.

#include "wide.h"

namespace {

template <class T> struct Pairs {
    const T *z_query, *z_key, *e_query, *e_key;
    T up, down;

    Wide<T> penalised(int64_t row, Wide<T> z) const {
        const Wide<T> rise = z - z_query[row];
        return larger(rise * up, rise * down);
    }
    Wide<T> share(int64_t row, Wide<T> e) const { return 1 / (1 + exponential((e + e_query[row]) * T(-0.5))); }
};

template <class T, bool WIND>
void values(const Pairs<T> &pairs, const View<T> &b, T alpha, T beta, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; row++)
        across<T>(columns, [&](auto read, auto write, int) {
            const Wide<T> r = pairs.penalised(row, read(pairs.z_key, T(0)));
            const Wide<T> s = WIND ? pairs.share(row, read(pairs.e_key, T(0))) : Wide<T>{};
            write(b.at(0, 0, row), r * (s * beta - 1) * alpha);
        });
}

template <class T, bool WIND>
void sums(const Pairs<T> &pairs, const View<T> &db, double *found, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; row++) {
        Wide<T> of_r = {}, of_rs = {};
        across<T>(columns, [&](auto read, auto, int) {
            const Wide<T> part = pairs.penalised(row, read(pairs.z_key, T(0))) * read(db.at(0, 0, row), T(0));
            of_r += part;
            if constexpr (WIND) of_rs += part * pairs.share(row, read(pairs.e_key, T(0)));
        });
        found[0] += total<T>(of_r);
        found[1] += total<T>(of_rs);
    }
}

} // namespace

#define FOR(T)                                                                                                         \
    void physics_values_##T(const View<T> *z_query, const View<T> *z_key, const View<T> *e_query,                      \
                            const View<T> *e_key, const View<T> *b, double up, double down, double alpha, double beta, \
                            int64_t wind, int64_t rows, int64_t columns) {                                             \
        const Pairs<T> pairs{z_query->data, z_key->data, e_query->data, e_key->data, T(up), T(down)};                  \
        (wind ? values<T, true> : values<T, false>)(pairs, *b, T(alpha), T(beta), rows, columns);                      \
    }                                                                                                                  \
    void physics_sums_##T(const View<T> *z_query, const View<T> *z_key, const View<T> *e_query, const View<T> *e_key,  \
                          const View<T> *db, const View<double> *found, double up, double down, int64_t wind,          \
                          int64_t rows, int64_t columns) {                                                             \
        const Pairs<T> pairs{z_query->data, z_key->data, e_query->data, e_key->data, T(up), T(down)};                  \
        (wind ? sums<T, true> : sums<T, false>)(pairs, *db, found->data, rows, columns);                               \
    }

extern "C" {
FOR(float)
FOR(double)
}
