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

template <int W>
inline float Sum(const Floats<W>& v) {
  if constexpr (W == 1) {
    return v;
  } else if constexpr (W == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    Floats<W / 2> half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    return Sum<W / 2>(half[0] + half[1]);
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
    __builtin_memcpy(to, from, used * sizeof(float));
  }
}

}  // namespace NAMESPACE
}  // namespace jaxsparse

#endif  // JAXSPARSE_VECTORS_H_
