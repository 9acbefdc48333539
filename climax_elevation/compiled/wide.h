// What the loops share: views of tensors, and the numbers that a processor computes with at once, which are GCC's and
// Clang's vector types and what those lack.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

// A tensor [samples, heads, rows, ...], and how many numbers lie from one sample, head and row to the next.
template <class T> struct View {
    T *data;
    int64_t sample, head, row;
    T *at(int64_t s, int64_t h, int64_t r = 0) const { return data + s * sample + h * head + r * row; }
};

template <class T> struct Of;
template <> struct Of<float> {
    typedef float type __attribute__((vector_size(BYTES)));
    typedef int32_t bits __attribute__((vector_size(BYTES)));
};
template <> struct Of<double> {
    typedef double type __attribute__((vector_size(BYTES)));
    typedef int64_t bits __attribute__((vector_size(BYTES)));
};
template <class T> using Wide = typename Of<T>::type;
template <class T> constexpr int64_t LANES = BYTES / sizeof(T);

template <class T> inline Wide<T> all(T value) { return Wide<T>{} + value; }

template <class T> inline Wide<T> load(const T *from) {
    Wide<T> values;
    std::memcpy(&values, from, BYTES);
    return values;
}

template <class T> inline void store(T *to, Wide<T> values) { std::memcpy(to, &values, BYTES); }

// The first `count` numbers; `rest` in the other lanes.
template <class T> inline Wide<T> load(const T *from, int64_t count, T rest) {
    Wide<T> values = all<T>(rest);
    std::memcpy(&values, from, count * sizeof(T));
    return values;
}

template <class T> inline void store(T *to, Wide<T> values, int64_t count) {
    std::memcpy(to, &values, count * sizeof(T));
}

// What is not a number stays so in the first argument, and is passed over in the second.
template <class V> inline V larger(V one, V other) { return other > one ? other : one; }

// All lanes as one: halves of them together, again and again.
template <class T, int BYTES_LEFT, class Join> inline T joined(const T *lanes, Join join) {
    if constexpr (BYTES_LEFT == sizeof(T)) return *lanes;
    else {
        typedef T half __attribute__((vector_size(BYTES_LEFT / 2)));
        half one, other;
        std::memcpy(&one, lanes, BYTES_LEFT / 2);
        std::memcpy(&other, lanes + BYTES_LEFT / 2 / sizeof(T), BYTES_LEFT / 2);
        one = join(one, other);
        return joined<T, BYTES_LEFT / 2>((const T *)&one, join);
    }
}

template <class T> inline T total(Wide<T> values) {
    return joined<T, BYTES>((const T *)&values, [](auto one, auto other) { return one + other; });
}

template <class T> inline T largest(Wide<T> values) {
    return joined<T, BYTES>((const T *)&values, [](auto one, auto other) { return larger(one, other); });
}

// e^x to about one unit in the last place; 0 below -87.33, infinite above 88.73. x = n log 2 + r, and a polynomial in r
// (Cephes' expf).
inline Wide<float> exponential(Wide<float> x) {
    const auto tiny = x < -87.33f, huge = x > 88.0f;
    const Wide<float> within = tiny ? all(-87.33f) : x > 89.0f ? all(89.0f) : x;
    const Wide<float> shifted = within * 1.44269504f + 12582912.0f; // the nearest integer, in the low bits
    const Wide<float> n = shifted - 12582912.0f;
    const Wide<float> r = within - n * 0.693359375f + n * 2.12194440e-4f;
    Wide<float> y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const Of<float>::bits power = (((Of<float>::bits)shifted + huge) << 23) + (127 << 23); // 2^128 is no number: halved
    y = tiny ? Wide<float>{} : y * (Wide<float>)power;
    return huge ? y + y : y;
}

inline Wide<double> exponential(Wide<double> x) {
    for (int lane = 0; lane < LANES<double>; lane++) x[lane] = std::exp(x[lane]);
    return x;
}

// Calls body(read, write, turn) for all columns, a set of lanes at a time; behind the last, `read` gives what it is
// told. `turn` is 0 and 1 by turns: a sum of each need not wait for the other.
template <class T, class Body> inline void across(int64_t columns, Body body) {
    int64_t at = 0;
    const auto read = [&](const T *from, T) { return load(from + at); };
    const auto write = [&](T *to, Wide<T> values) { store(to + at, values); };
    for (; at + 2 * LANES<T> <= columns; at += LANES<T>) {
        body(read, write, 0);
        at += LANES<T>;
        body(read, write, 1);
    }
    if (at + LANES<T> <= columns) {
        body(read, write, 0);
        at += LANES<T>;
    }
    const int64_t left = columns - at;
    if (left > 0)
        body([&](const T *from, T behind) { return load(from + at, left, behind); },
             [&](T *to, Wide<T> values) { store(to + at, values, left); }, 0);
}
