// Products of float32 activations with weights in groups of T outputs by one input.
//
// T = 1 is CSR, T = 4 are tiles: each vector of activations that is loaded then serves four
// outputs. An entry's weight is broadcast and multiplied with the activations of its input,
// a panel of tokens at a time, whose sums stay in registers.

#include "kernels.h"
#include "vectors.h"

namespace jaxsparse {
namespace NAMESPACE {
namespace {

// Calls f with the panel of a width that `Widths<T>` lists.
template <int T, class F>
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
    default: break;
  }
  // Sums of tiles take four times the registers, of which AVX2 has 16 and AVX-512 32.
  if constexpr (T == 1 || W == 16) {
    switch (width) {
      case 3 * W: return f(Panel<W, 3>{});
      case 4 * W: return f(Panel<W, 4>{});
      default: break;
    }
  }
  if constexpr (T == 1) {
    switch (width) {
      case 6 * W: return f(Panel<W, 6>{});
      case 8 * W: return f(Panel<W, 8>{});
      default: break;
    }
  }
}

#if defined(__AVX512F__)
const int kRowWidths[] = {1, 4, 8, 16, 32, 48, 64, 96, 128, 0};
const int kTileWidths[] = {1, 4, 8, 16, 32, 48, 64, 0};
const int* const kBackwardWidths = kTileWidths;
#elif defined(__AVX2__)
const int kRowWidths[] = {1, 4, 8, 16, 24, 32, 48, 64, 0};
const int kTileWidths[] = {1, 4, 8, 16, 0};
const int kBackwardWidths[] = {1, 4, 8, 16, 24, 32, 0};
#else
const int kRowWidths[] = {1, 4, 8, 12, 16, 24, 32, 0};
const int kTileWidths[] = {1, 4, 8, 0};
const int kBackwardWidths[] = {1, 4, 8, 12, 16, 0};
#endif

template <class F>
inline void WithIndices(const Structure& s, F f) {
  if (s.wide) {
    f(static_cast<const uint32_t*>(s.indices));
  } else {
    f(static_cast<const uint16_t*>(s.indices));
  }
}

// Entries whose sums are apart, so that an addition need not wait for the one before.
template <int T, int N>
constexpr int kApart = T * N >= 8 ? 1 : T * N >= 4 ? 2 : 4;

template <int T, class P, class Index>
void ForwardPanel(const Structure& s, const Index* indices, const float* values,
                  const float* x, float* y, int64_t stride, int used, Range groups) {
  constexpr int W = P::W, N = P::N, U = kApart<T, N>;
  using V = Floats<W>;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    V sums[U][T][N];
    for (int u = 0; u < U; ++u)
      for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n) sums[u][t][n] = V{};
    const auto add = [&](V(&into)[T][N], int64_t e) {
      const float* row = x + int64_t{indices[e]} * P::width;
      V input[N];
      for (int n = 0; n < N; ++n) input[n] = Load<V>(row + n * W);
      for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n) into[t][n] += values[e * T + t] * input[n];
    };
    const int64_t last = s.offsets[g + 1];
    int64_t e = s.offsets[g];
    for (; e + U <= last; e += U)
      for (int u = 0; u < U; ++u) add(sums[u], e + u);
    for (; e < last; ++e) add(sums[0], e);
    for (int u = 1; u < U; ++u)
      for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n) sums[0][t][n] += sums[u][t][n];
    for (int t = 0; t < T; ++t)
      StoreSome<W, N>(y + (g * T + t) * stride, sums[0][t], used);
  }
}

// With one token memory is read as fast as it can be: asks for what is used 2 KiB later.
// Nothing is read by that, so it may lie beyond the end.
template <class Index>
inline void ReadAhead(const float* values, const Index* indices) {
  __builtin_prefetch(values + 512);
  __builtin_prefetch(indices + 512);
}

// One token: four entries are the vector. What is left of a group is added without a
// branch for each entry, which no processor could predict.
template <class Index>
void ForwardRowsOfOne(const Structure& s, const Index* indices, const float* values,
                      const float* x, float* y, int64_t stride, Range groups) {
  constexpr int U = 2, W = 4;
  using V = Floats<W>;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    V sums[U] = {V{}, V{}};
    const int64_t last = s.offsets[g + 1];
    int64_t e = s.offsets[g];
    for (; e + U * W <= last; e += U * W) {
      ReadAhead(values + e, indices + e);
      for (int u = 0; u < U; ++u) {
        const Index* at = indices + e + u * W;
        sums[u] += Load<V>(values + e + u * W) * V{x[at[0]], x[at[1]], x[at[2]], x[at[3]]};
      }
    }
    if (e < last) {
      for (int u = 0; u < U; ++u, e += W) {
        V product;
        for (int w = 0; w < W; ++w) {
          const int64_t at = e + w < last ? e + w : last - 1;
          product[w] = values[at] * x[indices[at]];
        }
        const int32_t left = static_cast<int32_t>(last - e);
        sums[u] += Ints<W>{0, 1, 2, 3} < left ? product : V{};
      }
    }
    y[g * stride] = Sum<W>(sums[0] + sums[1]);
  }
}

// One token: the four outputs of a tile are the vector.
template <class Index>
void ForwardTilesOfOne(const Structure& s, const Index* indices, const float* values,
                       const float* x, float* y, int64_t stride, Range groups) {
  constexpr int U = 4;
  using V = Floats<4>;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    V sums[U] = {};
    const int64_t last = s.offsets[g + 1];
    int64_t e = s.offsets[g];
    for (; e + U <= last; e += U) {
      ReadAhead(values + 4 * e, indices + e);
      for (int u = 0; u < U; ++u)
        sums[u] += x[indices[e + u]] * Load<V>(values + 4 * (e + u));
    }
    for (; e < last; ++e) sums[0] += x[indices[e]] * Load<V>(values + 4 * e);
    const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int t = 0; t < 4; ++t) y[(4 * g + t) * stride] = sum[t];
  }
}

template <int T>
void Forward(const Structure& s, const float* values, int width, const float* x, float* y,
             int64_t stride, int used, Range groups) {
  WithIndices(s, [&](auto indices) {
    WithPanel<T>(width, [&](auto panel) {
      if constexpr (decltype(panel)::width == 1) {
        if constexpr (T == 1) {
          ForwardRowsOfOne(s, indices, values, x, y, stride, groups);
        } else {
          ForwardTilesOfOne(s, indices, values, x, y, stride, groups);
        }
      } else {
        ForwardPanel<T, decltype(panel)>(s, indices, values, x, y, stride, used, groups);
      }
    });
  });
}

// Inputs are visited in blocks whose gradients stay near, and each group adds the entries
// that it has there, while the gradients of its outputs are in registers. Smaller blocks
// fit into the first cache, but then a group has too few entries in each.
template <int T, class P, class Index>
void BackwardPanel(const Structure& s, const Index* indices, const float* values,
                   const float* dy, float* dx, Range inputs, int32_t* cursors) {
  constexpr int W = P::W, N = P::N;
  constexpr int64_t kBlock = 14336 / P::width;  // inputs, 56 KiB
  using V = Floats<W>;
  for (int64_t i = inputs.begin * P::width; i < inputs.end * P::width; ++i) dx[i] = 0;
  for (int64_t begin = inputs.begin; begin < inputs.end; begin += kBlock) {
    const int64_t end = begin + kBlock < inputs.end ? begin + kBlock : inputs.end;
    for (int64_t g = 0; g < s.groups; ++g) {
      int64_t e = cursors[g];
      const int64_t last = s.offsets[g + 1];
      if (e == last || indices[e] >= end) continue;
      V outer[T][N];
      for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n)
          outer[t][n] = Load<V>(dy + (g * T + t) * P::width + n * W);
      do {
        float* row = dx + int64_t{indices[e]} * P::width;
        for (int n = 0; n < N; ++n) {
          V sum = Load<V>(row + n * W);
          for (int t = 0; t < T; ++t) sum += values[e * T + t] * outer[t][n];
          Store(row + n * W, sum);
        }
      } while (++e < last && indices[e] < end);
      cursors[g] = e;
    }
  }
}

template <int T>
void Backward(const Structure& s, const float* values, int width, const float* dy,
              float* dx, Range inputs, int32_t* cursors) {
  WithIndices(s, [&](auto indices) {
    WithPanel<T>(width, [&](auto panel) {
      BackwardPanel<T, decltype(panel)>(s, indices, values, dy, dx, inputs, cursors);
    });
  });
}

template <int count>
struct Count {
  static constexpr int value = count;
};

template <int T, class P, class Index>
void SampledPanel(const Structure& s, const Index* indices, const float* x,
                  const float* dy, float* dvalues, bool add, Range groups) {
  constexpr int W = P::W, N = P::N, U = 4 / T;
  using V = Floats<W>;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    V outer[T][N];
    for (int t = 0; t < T; ++t)
      for (int n = 0; n < N; ++n)
        outer[t][n] = Load<V>(dy + (g * T + t) * P::width + n * W);
    // Four sums at a time.
    const auto some = [&](int64_t e, auto count) {
      V sums[count.value * T];
      for (int i = 0; i < count.value * T; ++i) sums[i] = V{};
      for (int u = 0; u < count.value; ++u) {
        const float* row = x + int64_t{indices[e + u]} * P::width;
        for (int n = 0; n < N; ++n) {
          const V input = Load<V>(row + n * W);
          for (int t = 0; t < T; ++t) sums[u * T + t] += input * outer[t][n];
        }
      }
      float* to = dvalues + e * T;
      if constexpr (count.value * T == 4) {
        const Floats<4> four = Sums<W>(sums[0], sums[1], sums[2], sums[3]);
        Store(to, add ? four + Load<Floats<4>>(to) : four);
      } else {
        *to = add ? *to + Sum<W>(sums[0]) : Sum<W>(sums[0]);
      }
    };
    const int64_t last = s.offsets[g + 1];
    int64_t e = s.offsets[g];
    for (; e + U <= last; e += U) some(e, Count<U>{});
    for (; e < last; ++e) some(e, Count<1>{});
  }
}

template <int T>
void Sampled(const Structure& s, int width, const float* x, const float* dy,
             float* dvalues, bool add, Range groups) {
  WithIndices(s, [&](auto indices) {
    WithPanel<T>(width, [&](auto panel) {
      SampledPanel<T, decltype(panel)>(s, indices, x, dy, dvalues, add, groups);
    });
  });
}

}  // namespace

const FloatKernels rows = {kRowWidths, kBackwardWidths, Forward<1>, Backward<1>,
                           Sampled<1>};
const FloatKernels tiles = {kTileWidths, kTileWidths, Forward<4>, Backward<4>, Sampled<4>};

}  // namespace NAMESPACE
}  // namespace jaxsparse
