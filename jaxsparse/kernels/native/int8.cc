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
const int kWidths[] = {4, 8, 16, 32, 64, 128, 0};
#elif defined(__AVX2__)
const int kWidths[] = {4, 8, 16, 32, 64, 0};
#else
const int kWidths[] = {4, 8, 16, 32, 0};
#endif

// ---- Activations ------------------------------------------------------------------------

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
  // What is smaller has no inverse: it is 0.
  for (int w = 0; w < W; ++w) inverse[w] = scale[w] >= 1e-37f ? 1.0f / scale[w] : 0.0f;

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

void Quantize(const float* x, int64_t stride, int64_t features, int used, int width,
              void* packed, float* scales) {
  int32_t* to = static_cast<int32_t*>(packed);
  switch (width < kWidest ? width : kWidest) {
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
    V sums[U][N] = {};
    Ints<4> extra = {};
    const auto add = [&](V(&into)[N], int64_t e) {
      const int32_t* row = packed + int64_t{indices[e]} * kWords * P::width;
#if defined(__AVX512VNNI__)
      const V weights = Load<int32_t>(values + 4 * e) - V{};
      for (int n = 0; n < N; ++n)
        into[n] = Dot(into[n], Load<V>(row + n * W), weights);
      extra = Dot(extra, Ints<4>{} - 0x7F7F7F80, Load<int32_t>(values + 4 * e) - Ints<4>{});
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
      for (int u = 0; u < U; ++u) add(sums[u], e + u);
    for (; e < last; ++e) add(sums[0], e);
    Floats<W> out[N];
    for (int n = 0; n < N; ++n) {
      V sum = sums[0][n] - extra[0];
      for (int u = 1; u < U; ++u) sum += sums[u][n];
      out[n] = __builtin_convertvector(sum, Floats<W>) * (token[n] * scale[g]);
    }
    StoreSome<W, N>(y + g * stride, out, used);
  }
}

void Forward(const Structure& s, const int8_t* values, const float* scale, int width,
             const void* packed, const float* scales, float* y, int64_t stride, int used,
             Range groups) {
  const int32_t* from = static_cast<const int32_t*>(packed);
  WithPanel(width, [&](auto panel) {
    using P = decltype(panel);
    const auto run = [&](auto indices) {
      ForwardPanel<P>(s, indices, values, scale, from, scales, y, stride, used, groups);
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
