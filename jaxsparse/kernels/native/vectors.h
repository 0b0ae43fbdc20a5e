// Vectors of W floats or integers, in the notation that gcc and clang share.
//
// The widest vector is that of the instruction set for which this is compiled: wider ones
// would be legal and slow.

#ifndef JAXSPARSE_VECTORS_H_
#define JAXSPARSE_VECTORS_H_

#include <stdint.h>

namespace jaxsparse {
namespace NAMESPACE {

#if defined(__AVX512F__)
constexpr int kWidest = 16;
#elif defined(__AVX2__)
constexpr int kWidest = 8;
#else
constexpr int kWidest = 4;
#endif

template <class Number, int W>
struct VectorOf {
  typedef Number type __attribute__((vector_size(sizeof(Number) * W)));
};
template <class Number>
struct VectorOf<Number, 1> {
  typedef Number type;
};
template <int W>
using Floats = typename VectorOf<float, W>::type;
template <int W>
using Ints = typename VectorOf<int32_t, W>::type;

// Memory need not be aligned.
template <class V>
inline V Load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class V>
inline void Store(void* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The halves of a vector.
template <int W>
inline Floats<W / 2> Low(const Floats<W>& v) {
  if constexpr (W == 16) return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  else return __builtin_shufflevector(v, v, 0, 1, 2, 3);
}
template <int W>
inline Floats<W / 2> High(const Floats<W>& v) {
  if constexpr (W == 16) return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  else return __builtin_shufflevector(v, v, 4, 5, 6, 7);
}

template <int W>
inline float Sum(const Floats<W>& v) {
  if constexpr (W == 1) return v;
  else if constexpr (W == 4) return (v[0] + v[2]) + (v[1] + v[3]);
  else return Sum<W / 2>(Low<W>(v) + High<W>(v));
}

// The sums of four vectors.
template <int W>
inline Floats<4> Sums(const Floats<W>& a, const Floats<W>& b, const Floats<W>& c,
                      const Floats<W>& d) {
  if constexpr (W == 1) {
    return Floats<4>{a, b, c, d};
  } else if constexpr (W == 4) {
    const Floats<4> ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) +
                         __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Floats<4> cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) +
                         __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) +
           __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  } else {
    return Sums<W / 2>(Low<W>(a) + High<W>(a), Low<W>(b) + High<W>(b),
                       Low<W>(c) + High<W>(c), Low<W>(d) + High<W>(d));
  }
}

// A panel of N vectors of W tokens.
template <int W_, int N_>
struct Panel {
  static constexpr int W = W_, N = N_, width = W_ * N_;
};

// Copies the first `used` of a panel's numbers, which lie in vectors.
template <int W, int N>
inline void StoreSome(float* to, const Floats<W>* from, int used) {
  if (used == W * N) {
    for (int n = 0; n < N; ++n) Store(to + n * W, from[n]);
  } else {
    // A copy: the vectors themselves then need no address and stay in registers.
    float all[W * N];
    for (int n = 0; n < N; ++n) Store(all + n * W, from[n]);
    __builtin_memcpy(to, all, used * sizeof(float));
  }
}

}  // namespace NAMESPACE
}  // namespace jaxsparse

#endif  // JAXSPARSE_VECTORS_H_
