// Products of int8 weights, in tiles of one output by four inputs, with activations that
// are quantized token by token: y = scale[o] * scales[b] * sum of int8 products in int32.
//
// With VNNI one instruction multiplies four features and adds; it takes unsigned
// activations, so 128 is added to each and 128 times the sum of the weights subtracted
// again (sums wrap, so this is exact). Without it features are int16 in pairs, whose
// products and sum fit into int32 for every int8; nothing saturates.

#include "kernels.h"
#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jaxsparse {
namespace NAMESPACE {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kWords = 1;  // of 32 bits, for one token's four features
#else
constexpr int kWords = 2;
#endif

template <class F>
inline void WithPanel(int width, F f) {
  constexpr int W = kWidest;
  switch (width) {
    case 1: return f(Panel<1, 1>{});
    case 4: return f(Panel<4, 1>{});
#if defined(__AVX2__)
    case 8: return f(Panel<8, 1>{});
#endif
#if defined(__AVX512F__)
    case 16: return f(Panel<16, 1>{});
#endif
    case 2 * W: return f(Panel<W, 2>{});
    case 4 * W: return f(Panel<W, 4>{});
    case 8 * W: return f(Panel<W, 8>{});
    default: break;
  }
}

#if defined(__AVX512F__)
const int kWidths[] = {1, 4, 8, 16, 32, 64, 128, 0};
#elif defined(__AVX2__)
const int kWidths[] = {1, 4, 8, 16, 32, 64, 0};
#else
const int kWidths[] = {1, 4, 8, 16, 32, 0};
#endif

// ---- Activations ------------------------------------------------------------------------

// What is smaller has no inverse, and its token is taken for 0.
inline float Inverse(float scale) { return scale >= 1e-37f ? 1.0f / scale : 0.0f; }

// Rounds to the nearest integer, ties to even: |v| is far below 2^22.
template <int W>
inline Ints<W> Round(const Floats<W>& v) {
  const Floats<W> magic = v + 12582912.0f;  // 1.5 * 2^23
  return Load<Ints<W>>(&magic) - 0x4B400000;
}

template <int W>
void QuantizeLanes(const float* x, int64_t stride, int64_t features, int used, int width,
                   int32_t* packed, float* scales) {
  const auto read = [&](int64_t k) {
    if (used == W) return Load<Floats<W>>(x + k * stride);
    Floats<W> v = {};
    __builtin_memcpy(&v, x + k * stride, used * sizeof(float));
    return v;
  };
  // Magnitudes are compared as integers: NaN is above all numbers and not lost.
  Ints<W> largest = {};
  for (int64_t k = 0; k < features; ++k) {
    const Floats<W> v = read(k);
    const Ints<W> bits = Load<Ints<W>>(&v) & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  const Floats<W> scale = Load<Floats<W>>(&largest) * (1.0f / 127.0f);
  Store(scales, scale);
  Floats<W> inverse;
  for (int w = 0; w < W; ++w) inverse[w] = Inverse(scale[w]);

  for (int64_t k = 0; k < features; k += 4) {
    Ints<W> q[4] = {};
    for (int i = 0; i < 4; ++i) {
      if (k + i < features) q[i] = Round<W>(read(k + i) * inverse);
    }
    int32_t* to = packed + (k / 4) * kWords * width;
    if constexpr (kWords == 1) {
      for (int i = 0; i < 4; ++i) q[i] = (q[i] + 128) & 0xFF;
      Store(to, q[0] | (q[1] << 8) | (q[2] << 16) | (q[3] << 24));
    } else {
      for (int i = 0; i < 4; ++i) q[i] &= 0xFFFF;
      Store(to, q[0] | (q[1] << 16));
      Store(to + width, q[2] | (q[3] << 16));
    }
  }
}

// One token: its features lie together when they are packed.
void QuantizeOne(const float* x, int64_t stride, int64_t features, void* packed,
                 float* scales) {
  constexpr int W = kWidest;
#if defined(__AVX512VNNI__)
  typedef uint8_t Word;
  constexpr int kOffset = 128;
#else
  typedef int16_t Word;
  constexpr int kOffset = 0;
#endif
  typedef Word Words __attribute__((vector_size(sizeof(Word) * W)));
  const int64_t whole = features / W * W;
  const auto read = [&](int64_t k) {
    if (stride == 1 && k < whole) return Load<Floats<W>>(x + k);
    Floats<W> v = {};
    for (int w = 0; w < W && k + w < features; ++w) v[w] = x[(k + w) * stride];
    return v;
  };
  Ints<W> largest = {};
  for (int64_t k = 0; k < features; k += W) {
    const Floats<W> v = read(k);
    const Ints<W> bits = Load<Ints<W>>(&v) & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  int32_t most = 0;
  for (int w = 0; w < W; ++w) most = largest[w] > most ? largest[w] : most;
  *scales = Load<float>(&most) * (1.0f / 127.0f);
  const float inverse = Inverse(*scales);
  Word* const to = static_cast<Word*>(packed);
  for (int64_t k = 0; k < features; k += W) {
    const Words q = __builtin_convertvector(Round<W>(read(k) * inverse) + kOffset, Words);
    if (k < whole) {
      Store(to + k, q);
    } else {
      __builtin_memcpy(to + k, &q, ((features - k + 3) & ~int64_t{3}) * sizeof(Word));
    }
  }
}

void Quantize(const float* x, int64_t stride, int64_t features, int used, int width,
              void* packed, float* scales) {
  int32_t* to = static_cast<int32_t*>(packed);
  switch (width < kWidest ? width : kWidest) {
    case 1: return QuantizeOne(x, stride, features, packed, scales);
    case 4: return QuantizeLanes<4>(x, stride, features, used, width, to, scales);
#if defined(__AVX2__)
    case 8: return QuantizeLanes<8>(x, stride, features, used, width, to, scales);
#endif
#if defined(__AVX512F__)
    case 16: return QuantizeLanes<16>(x, stride, features, used, width, to, scales);
#endif
    default: break;
  }
}

// ---- Products ---------------------------------------------------------------------------

#if defined(__AVX512VNNI__)

inline Ints<16> Dot(Ints<16> sum, Ints<16> x, Ints<16> w) {
  return (Ints<16>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
}
inline Ints<8> Dot(Ints<8> sum, Ints<8> x, Ints<8> w) {
  return (Ints<8>)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
}
inline Ints<4> Dot(Ints<4> sum, Ints<4> x, Ints<4> w) {
  return (Ints<4>)_mm_dpbusd_epi32((__m128i)sum, (__m128i)x, (__m128i)w);
}

#else

// The sum of two products of int16 in each lane.
template <int W>
inline Ints<W> Dot(Ints<W> sum, Ints<W> x, Ints<W> w) {
#if defined(__AVX2__)
  if constexpr (W == 8)
    return sum + (Ints<8>)_mm256_madd_epi16((__m256i)x, (__m256i)w);
  else
    return sum + (Ints<4>)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
  return sum + ((x << 16) >> 16) * ((w << 16) >> 16) + (x >> 16) * (w >> 16);
#endif
}

inline int32_t Pair(int8_t low, int8_t high) {
  return static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint16_t>(low)) |
                              static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16);
}

#endif

template <class P, class Index>
void ForwardPanel(const Structure& s, const Index* indices, const int8_t* values,
                  const float* scale, const int32_t* packed, const float* scales, float* y,
                  int64_t stride, int used, Range groups) {
  constexpr int W = P::W, N = P::N;
  constexpr int U = N >= 8 ? 1 : N >= 4 ? 2 : 4;
  using V = Ints<W>;
  Floats<W> token[N];
  for (int n = 0; n < N; ++n) token[n] = Load<Floats<W>>(scales + n * W);
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    V sums[U][N];
    for (int u = 0; u < U; ++u)
      for (int n = 0; n < N; ++n) sums[u][n] = V{};
    Ints<4> extra[U];
    for (int u = 0; u < U; ++u) extra[u] = Ints<4>{};
    const auto add = [&](int u, int64_t e) {
      V(&into)[N] = sums[u];
      const int32_t* row = packed + int64_t{indices[e]} * kWords * P::width;
#if defined(__AVX512VNNI__)
      const V weights = Load<int32_t>(values + 4 * e) - V{};
      for (int n = 0; n < N; ++n)
        into[n] = Dot(into[n], Load<V>(row + n * W), weights);
      extra[u] = Dot(extra[u], Ints<4>{} - 0x7F7F7F80,  // 128 in each byte
                     Load<int32_t>(values + 4 * e) - Ints<4>{});
#else
      const int8_t* w = values + 4 * e;
      const V low = Pair(w[0], w[1]) - V{}, high = Pair(w[2], w[3]) - V{};
      for (int n = 0; n < N; ++n) {
        into[n] = Dot<W>(into[n], Load<V>(row + n * W), low);
        into[n] = Dot<W>(into[n], Load<V>(row + P::width + n * W), high);
      }
#endif
    };
    const int64_t last = s.offsets[g + 1];
    int64_t e = s.offsets[g];
    for (; e + U <= last; e += U)
      for (int u = 0; u < U; ++u) add(u, e + u);
    for (; e < last; ++e) add(0, e);
    Floats<W> out[N];
    for (int n = 0; n < N; ++n) {
      V sum = V{};
      for (int u = 0; u < U; ++u) sum += sums[u][n] - extra[u][0];
      out[n] = __builtin_convertvector(sum, Floats<W>) * (token[n] * scale[g]);
    }
    StoreSome<W, N>(y + g * stride, out, used);
  }
}

// The words of entries that fill a vector.
template <class Index>
inline Ints<4> Words(const int32_t* packed, const Index* at) {
#if defined(__AVX512VNNI__)
  return Ints<4>{packed[at[0]], packed[at[1]], packed[at[2]], packed[at[3]]};
#else
  typedef int64_t Two __attribute__((vector_size(16)));
  const Two both = {Load<int64_t>(packed + int64_t{at[0]} * 2),
                    Load<int64_t>(packed + int64_t{at[1]} * 2)};
  return Load<Ints<4>>(&both);
#endif
}

// One token: entries are the vector.
template <class Index>
void ForwardOne(const Structure& s, const Index* indices, const int8_t* values,
                const float* scale, const int32_t* packed, float token, float* y,
                int64_t stride, Range groups) {
  constexpr int U = 4 / kWords;
  const auto dot = [&](Ints<4> sum, Ints<4> x, const int8_t* w) {
#if defined(__AVX512VNNI__)
    const Ints<4> weights = Load<Ints<4>>(w);
    sum -= Dot(Ints<4>{}, Ints<4>{} - 0x7F7F7F80, weights);  // 128 in each byte
    return Dot(sum, x, weights);
#else
    const Ints<4> weights = {Pair(w[0], w[1]), Pair(w[2], w[3]), Pair(w[4], w[5]),
                             Pair(w[6], w[7])};
    return Dot<4>(sum, x, weights);
#endif
  };
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    Ints<4> sums = {};
    const int64_t last = s.offsets[g + 1];
    int64_t e = s.offsets[g];
    for (; e + U <= last; e += U)
      sums = dot(sums, Words(packed, indices + e), values + 4 * e);
    if (e < last) {  // the last entry again, with weights of 0
      Index at[U];
      int8_t w[4 * U] = {};
      for (int u = 0; u < U; ++u) at[u] = indices[e + u < last ? e + u : last - 1];
      __builtin_memcpy(w, values + 4 * e, 4 * (last - e));
      sums = dot(sums, Words(packed, at), w);
    }
    const int32_t sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
    y[g * stride] = static_cast<float>(sum) * (token * scale[g]);
  }
}

void Forward(const Structure& s, const int8_t* values, const float* scale, int width,
             const void* packed, const float* scales, float* y, int64_t stride, int used,
             Range groups) {
  const int32_t* from = static_cast<const int32_t*>(packed);
  WithPanel(width, [&](auto panel) {
    using P = decltype(panel);
    const auto run = [&](auto indices) {
      if constexpr (P::width == 1) {
        ForwardOne(s, indices, values, scale, from, *scales, y, stride, groups);
      } else {
        ForwardPanel<P>(s, indices, values, scale, from, scales, y, stride, used, groups);
      }
    };
    if (s.wide) {
      run(static_cast<const uint32_t*>(s.indices));
    } else {
      run(static_cast<const uint16_t*>(s.indices));
    }
  });
}

}  // namespace

const Int8Kernels int8 = {kWidths, kWidest, 4 * kWords, Quantize, Forward};

}  // namespace NAMESPACE
}  // namespace jaxsparse
