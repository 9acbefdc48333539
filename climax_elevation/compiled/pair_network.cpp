// A network over token pairs after its first layer, and its gradient; the equations are in bias/pair_network.py.
//
// q is [rows, units], k [columns, units], W [heads, units], c [heads], each without gaps; the values b and their
// gradient db are [heads, rows, columns].
// Hidden units are never written to memory: those of a few keys are made in registers, for some heads at once.

#include "wide.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t SETS = 2;  // of keys, LANES in each, that are worked on at once
constexpr int64_t UNITS = 2; // whose gradients are
constexpr int64_t MOST = 8;  // heads that are, of which a processor has the registers for
constexpr int64_t ROWS = 4;  // queries whose db stays in the first cache while the units pass by

int64_t up_to(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// [rows, columns], with zeros behind the last of each row.
template <class T>
std::vector<T> padded(const T *from, int64_t rows, int64_t columns, int64_t width) {
    std::vector<T> out(rows * width);
    for (int64_t row = 0; row < rows; row++) std::copy_n(from + row * columns, columns, &out[row * width]);
    return out;
}

// [columns, units] as [units, columns], with zeros behind, and in rows after the last.
template <class T>
std::vector<T> transposed(const T *from, int64_t columns, int64_t units, int64_t height, int64_t width) {
    std::vector<T> out(height * width);
    for (int64_t column = 0; column < columns; column++)
        for (int64_t unit = 0; unit < units; unit++) out[unit * width + column] = from[column * units + unit];
    return out;
}

// As many heads at once as there are registers for, fewer at the end.
template <class Body> void some_at_once(int64_t heads, Body body) {
    int64_t head = 0;
    for (; head + MOST <= heads; head += MOST) body(std::integral_constant<int, MOST>{}, head);
    for (; head + 4 <= heads; head += 4) body(std::integral_constant<int, 4>{}, head);
    for (; head < heads; head++) body(std::integral_constant<int, 1>{}, head);
}

template <class T>
void values(const T *q, const T *keys, const T *weight, const T *c, const View<T> &b, int64_t heads, int64_t rows,
            int64_t columns, int64_t units) {
    const int64_t step = LANES<T> * SETS, width = up_to(columns, step);
    const auto k = transposed(keys, columns, units, units, width);
    some_at_once(heads, [&](auto count, int64_t first) {
        constexpr int HEADS = decltype(count)::value;
        const T *w = weight + first * units;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t at = 0; at < columns; at += step) {
                Wide<T> sums[HEADS][SETS];
                for (int head = 0; head < HEADS; head++)
                    for (int set = 0; set < SETS; set++) sums[head][set] = all(c[first + head]);
                for (int64_t unit = 0; unit < units; unit++) {
                    Wide<T> hidden[SETS];
                    for (int set = 0; set < SETS; set++) {
                        const Wide<T> own = load(&k[unit * width + at + set * LANES<T>]);
                        hidden[set] = larger(own + q[row * units + unit], Wide<T>{});
                    }
                    for (int head = 0; head < HEADS; head++)
                        for (int set = 0; set < SETS; set++) sums[head][set] += hidden[set] * w[head * units + unit];
                }
                for (int head = 0; head < HEADS; head++)
                    for (int set = 0; set < SETS; set++) {
                        const int64_t column = at + set * LANES<T>, left = columns - column;
                        T *to = b.at(0, first + head, row) + column;
                        if (left >= LANES<T>) store(to, sums[head][set]);
                        else if (left > 0) store(to, sums[head][set], left);
                    }
            }
    });
}

// Adds to dq [rows, units], dk [columns, units], dW [heads, units] and dc [heads].
template <class T>
void gradients(const View<T> &given, const T *queries, const T *keys, const T *weight,
               T *dq, T *dk, T *dw, T *dc, int64_t heads, int64_t rows, int64_t columns, int64_t units) {
    const int64_t width = up_to(columns, LANES<T>), height = up_to(units, UNITS);
    const auto q = padded(queries, rows, units, height), w = padded(weight, heads, units, height);
    const auto k = transposed(keys, columns, units, height, width);
    std::vector<T> of_k(height * width), of_q(rows * height), db(width == columns ? 0 : MOST * ROWS * width);
    std::vector<Wide<T>> of_w(MOST * height), of_c(MOST);
    some_at_once(heads, [&](auto count, int64_t first) {
        constexpr int HEADS = decltype(count)::value;
        std::fill(of_w.begin(), of_w.end(), Wide<T>{});
        std::fill(of_c.begin(), of_c.end(), Wide<T>{});
        for (int64_t top = 0; top < rows; top += ROWS) {
            const int64_t bottom = std::min(top + ROWS, rows);
            View<T> own{given.at(0, first, top), 0, given.head, given.row};
            if (width != columns) { // whole sets of lanes, with zeros behind the last
                own = {db.data(), 0, ROWS * width, width};
                for (int head = 0; head < HEADS; head++)
                    for (int64_t row = top; row < bottom; row++)
                        std::copy_n(given.at(0, first + head, row), columns, own.at(0, head, row - top));
            }
            for (int head = 0; head < HEADS; head++)
                for (int64_t row = 0; row < bottom - top; row++)
                    for (int64_t at = 0; at < width; at += LANES<T>) of_c[head] += load(own.at(0, head, row) + at);
            for (int64_t unit = 0; unit < height; unit += UNITS) {
                Wide<T> sums_w[UNITS][HEADS], own_w[UNITS][HEADS];
                for (int u = 0; u < UNITS; u++)
                    for (int head = 0; head < HEADS; head++) {
                        sums_w[u][head] = of_w[(unit + u) * MOST + head];
                        own_w[u][head] = all(w[(first + head) * height + unit + u]);
                    }
                for (int64_t row = top; row < bottom; row++) {
                    Wide<T> sums_q[UNITS] = {};
                    for (int64_t at = 0; at < width; at += LANES<T>) {
                        Wide<T> before[UNITS], hidden[UNITS], g[UNITS] = {};
                        for (int u = 0; u < UNITS; u++) {
                            before[u] = load(&k[(unit + u) * width + at]) + q[row * height + unit + u];
                            hidden[u] = larger(before[u], Wide<T>{});
                        }
                        for (int head = 0; head < HEADS; head++) {
                            const Wide<T> of_pairs = load(own.at(0, head, row - top) + at);
                            for (int u = 0; u < UNITS; u++) {
                                sums_w[u][head] += of_pairs * hidden[u];
                                g[u] += of_pairs * own_w[u][head];
                            }
                        }
                        for (int u = 0; u < UNITS; u++) {
                            g[u] = before[u] > 0 ? g[u] : Wide<T>{};
                            sums_q[u] += g[u];
                            T *to = &of_k[(unit + u) * width + at];
                            store(to, load(to) + g[u]);
                        }
                    }
                    for (int u = 0; u < UNITS; u++) of_q[row * height + unit + u] += total<T>(sums_q[u]);
                }
                for (int u = 0; u < UNITS; u++)
                    for (int head = 0; head < HEADS; head++) of_w[(unit + u) * MOST + head] = sums_w[u][head];
            }
        }
        for (int head = 0; head < HEADS; head++) {
            dc[first + head] += total<T>(of_c[head]);
            for (int64_t unit = 0; unit < units; unit++)
                dw[(first + head) * units + unit] += total<T>(of_w[unit * MOST + head]);
        }
    });
    for (int64_t row = 0; row < rows; row++)
        for (int64_t unit = 0; unit < units; unit++) dq[row * units + unit] += of_q[row * height + unit];
    for (int64_t column = 0; column < columns; column++)
        for (int64_t unit = 0; unit < units; unit++) dk[column * units + unit] += of_k[unit * width + column];
}

} // namespace

#define FOR(T)                                                                                                         \
    void pair_values_##T(const View<T> *q, const View<T> *k, const View<T> *w, const View<T> *c, const View<T> *b,     \
                         int64_t heads, int64_t rows, int64_t columns, int64_t units) {                                \
        values<T>(q->data, k->data, w->data, c->data, *b, heads, rows, columns, units);                                \
    }                                                                                                                  \
    void pair_gradients_##T(const View<T> *db, const View<T> *q, const View<T> *k, const View<T> *w,                   \
                            const View<T> *dq, const View<T> *dk, const View<T> *dw, const View<T> *dc, int64_t heads, \
                            int64_t rows, int64_t columns, int64_t units) {                                            \
        gradients<T>(*db, q->data, k->data, w->data, dq->data, dk->data, dw->data, dc->data, heads, rows, columns,     \
                     units);                                                                                           \
    }

extern "C" {
FOR(float)
FOR(double)
}
