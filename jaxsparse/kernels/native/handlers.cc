// The handlers that XLA calls: they check every index, cut the work and choose kernels.
//
// Matrices of activations arrive feature-major: x of logical shape [tokens, features] lies
// in memory as [features, tokens], which the layouts in _native.py ask of XLA.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "cutting.h"
#include "kernels.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxsparse {
namespace {

// ---- Instruction sets -------------------------------------------------------------------

struct Variant {
  const char* name;
  bool (*runs)();  // whether this processor and its system have the instructions
  const StructureKernels* structure;
  const FloatKernels* rows;
  const FloatKernels* tiles;
  const Int8Kernels* int8;
};

#if defined(__x86_64__)
bool HasAvx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool HasVnni() { return HasAvx512() && __builtin_cpu_supports("avx512vnni"); }
#endif
bool Always() { return true; }

// The best first. AVX-512 is nothing new for int8 without VNNI.
const Variant kVariants[] = {
#if defined(__x86_64__)
    {"avx512vnni", HasVnni, &avx512::structure, &avx512::rows, &avx512::tiles,
     &avx512vnni::int8},
    {"avx512", HasAvx512, &avx512::structure, &avx512::rows, &avx512::tiles, &avx2::int8},
    {"avx2", HasAvx2, &avx2::structure, &avx2::rows, &avx2::tiles, &avx2::int8},
#endif
    {"portable", Always, &portable::structure, &portable::rows, &portable::tiles,
     &portable::int8},
};

// The variant of a name, the best for "", or null.
const Variant* Find(std::string_view name) {
  for (const Variant& v : kVariants)
    if (v.runs() && (name.empty() || name == v.name)) return &v;
  return nullptr;
}

// ---- Checks -----------------------------------------------------------------------------

constexpr int kTooLarge = 1, kNotAscending = 2;

ffi::Error Wrong(const std::string& message) {
  return ffi::Error::InvalidArgument("jaxsparse: " + message);
}

ffi::Error IndexError(int code, int64_t inputs) {
  if (code == kTooLarge)
    return Wrong("an index of the packed weights is not below " + std::to_string(inputs) +
                 ", the number of inputs; pack the weights again.");
  return Wrong("the inputs within a group of outputs do not ascend; sort the entries.");
}

// The structure that arrays describe; an error when they describe none.
ffi::Error Read(const ffi::AnyBuffer& indices, const ffi::Buffer<ffi::S32, 1>& offsets,
                int64_t entries, int64_t inputs, Structure* s) {
  s->wide = indices.element_type() == ffi::U32;
  if (!s->wide && indices.element_type() != ffi::U16)
    return Wrong("indices must be uint16 or uint32.");
  s->indices = indices.untyped_data();
  s->offsets = offsets.typed_data();
  s->groups = static_cast<int64_t>(offsets.element_count()) - 1;
  s->inputs = inputs;
  if (s->groups < 0) return Wrong("offsets must have an entry more than there are groups.");
  if (static_cast<int64_t>(indices.element_count()) != entries)
    return Wrong("there must be as many indices as there are values.");
  bool good = s->offsets[0] >= 0 && s->offsets[s->groups] <= entries;
  for (int64_t g = 0; g < s->groups; ++g) good &= s->offsets[g] <= s->offsets[g + 1];
  if (!good)
    return Wrong("offsets must ascend from 0 on to at most the number of entries, " +
                 std::to_string(entries) + "; pack the weights again.");
  return ffi::Error::Success();
}

// ---- Products of float32 ----------------------------------------------------------------

using F32Matrix = ffi::Buffer<ffi::F32, 2>;
using F32Vector = ffi::Buffer<ffi::F32, 1>;
using S8Vector = ffi::Buffer<ffi::S8, 1>;
using S32Vector = ffi::Buffer<ffi::S32, 1>;

// A height of 1 is CSR, one of 4 tiles.
const FloatKernels* KernelsOf(const Variant& v, int64_t height) {
  return height == 1 ? v.rows : height == 4 ? v.tiles : nullptr;
}

constexpr const char* kNoVariant =
    "this processor does not run the variant that was asked for.";

ffi::Error Matmul(ffi::ThreadPool pool, F32Matrix x, F32Vector values,
                  ffi::AnyBuffer indices, S32Vector offsets, ffi::Result<F32Matrix> y,
                  int64_t height, std::string_view variant) {
  const Variant* v = Find(variant);
  const FloatKernels* kernels = v ? KernelsOf(*v, height) : nullptr;
  if (!kernels) return Wrong(kNoVariant);
  const int64_t batch = x.dimensions()[0], features = x.dimensions()[1];
  Structure s;
  ffi::Error error = Read(indices, offsets, values.element_count() / height, features, &s);
  if (error.failure()) return error;
  if (y->dimensions()[0] != batch || y->dimensions()[1] != s.groups * height)
    return Wrong("the product has another shape than tokens by outputs.");
  if (batch == 0 || s.groups == 0) return ffi::Error::Success();

  const std::vector<Block> blocks = Blocks(kernels->widths, batch);
  const Panels panels(pool, blocks, x.typed_data(), features, batch);
  const double work = (0.25 * batch + 1.0) * values.element_count();
  const std::vector<Range> ranges = Split(s, Parts(pool, work / blocks.size()));
  std::atomic<int> wrong{0};
  ParallelFor(pool, blocks.size() * ranges.size(), [&](int64_t i) {
    const size_t b = i / ranges.size();
    const Range& groups = ranges[i % ranges.size()];
    if (!v->structure->are_below(s, groups)) {
      wrong = kTooLarge;
      return;
    }
    kernels->forward(s, values.typed_data(), blocks[b].width, panels[b],
                     y->typed_data() + blocks[b].begin, batch, blocks[b].used, groups);
  });
  return wrong ? IndexError(wrong, s.inputs) : ffi::Error::Success();
}

// The gradient of one panel for the inputs of a range.
void BackwardBlock(const FloatKernels& kernels, const Structure& s,
                       const float* values, const Block& block, const float* dy,
                       int64_t batch, Range inputs, int32_t* cursors, float* dx) {
  if (block.width == batch) {
    kernels.backward(s, values, block.width, dy, dx, inputs, cursors);
    return;
  }
  const int64_t rows = inputs.end - inputs.begin;
  const auto panel = Allocate<float>(rows * block.width);
  kernels.backward(s, values, block.width, dy,
                   panel.get() - inputs.begin * block.width, inputs, cursors);
  for (int64_t k = 0; k < rows; ++k)
    std::memcpy(dx + (inputs.begin + k) * batch + block.begin,
                panel.get() + k * block.width, block.used * sizeof(float));
}

ffi::Error Transposed(ffi::ThreadPool pool, F32Matrix dy, F32Vector values,
                      ffi::AnyBuffer indices, S32Vector offsets,
                      ffi::Result<F32Matrix> dx, int64_t height, std::string_view variant) {
  const Variant* v = Find(variant);
  const FloatKernels* kernels = v ? KernelsOf(*v, height) : nullptr;
  if (!kernels) return Wrong(kNoVariant);
  const int64_t batch = dy.dimensions()[0], features = dx->dimensions()[1];
  Structure s;
  ffi::Error error = Read(indices, offsets, values.element_count() / height, features, &s);
  if (error.failure()) return error;
  if (dx->dimensions()[0] != batch || dy.dimensions()[1] != s.groups * height)
    return Wrong("the gradient of the outputs has another shape than tokens by outputs.");
  if (batch == 0 || features == 0) return ffi::Error::Success();

  const std::vector<Block> blocks = Blocks(kernels->backward_widths, batch);
  const Panels panels(pool, blocks, dy.typed_data(), s.groups * height, batch);
  // All threads have something to do, and no more of them pass over all groups.
  const double work = (0.5 * batch + 1.0) * values.element_count();
  const int64_t count = blocks.size();
  const int64_t cut = Parts(pool, work) == 1 ? 1 : (pool.num_threads() - 1) / count + 1;
  const int64_t parts = std::min(cut, features);
  std::atomic<int> wrong{0};
  ParallelFor(pool, parts * count, [&](int64_t i) {
    const int64_t p = i % parts;
    const Range inputs{features * p / parts, features * (p + 1) / parts};
    const auto cursors = Allocate<int32_t>(s.groups);
    if (!v->structure->are_below(s, {0, s.groups})) {
      wrong = kTooLarge;
    } else if (!v->structure->cursors(s, inputs.begin, cursors.get())) {
      wrong = kNotAscending;
    } else {
      BackwardBlock(*kernels, s, values.typed_data(), blocks[i / parts],
                        panels[i / parts], batch, inputs, cursors.get(),
                        dx->typed_data());
    }
  });
  return wrong ? IndexError(wrong, s.inputs) : ffi::Error::Success();
}

ffi::Error Sampled(ffi::ThreadPool pool, F32Matrix x, F32Matrix dy, ffi::AnyBuffer indices,
                   S32Vector offsets, ffi::Result<F32Vector> dvalues,
                   int64_t height, std::string_view variant) {
  const Variant* v = Find(variant);
  const FloatKernels* kernels = v ? KernelsOf(*v, height) : nullptr;
  if (!kernels) return Wrong(kNoVariant);
  const int64_t batch = x.dimensions()[0], features = x.dimensions()[1];
  const int64_t size = dvalues->element_count();
  Structure s;
  ffi::Error error = Read(indices, offsets, size / height, features, &s);
  if (error.failure()) return error;
  if (dy.dimensions()[0] != batch || dy.dimensions()[1] != s.groups * height)
    return Wrong("the gradient of the outputs has another shape than tokens by outputs.");
  // Entries that belong to no group have no gradient.
  float* const out = dvalues->typed_data();
  const int64_t first = int64_t{s.offsets[0]} * height;
  const int64_t last = int64_t{s.offsets[s.groups]} * height;
  if (first > 0) std::memset(out, 0, first * sizeof(float));
  if (last < size) std::memset(out + last, 0, (size - last) * sizeof(float));
  if (last == first) return ffi::Error::Success();
  if (batch == 0) {
    std::memset(out + first, 0, (last - first) * sizeof(float));
    return ffi::Error::Success();
  }

  const std::vector<Block> blocks = Blocks(kernels->widths, batch);
  const Panels xs(pool, blocks, x.typed_data(), features, batch);
  const Panels dys(pool, blocks, dy.typed_data(), s.groups * height, batch);
  const std::vector<Range> ranges = Split(s, Parts(pool, (0.25 * batch + 4.0) * size));
  std::atomic<int> wrong{0};
  ParallelFor(pool, ranges.size(), [&](int64_t i) {
    if (!v->structure->are_below(s, ranges[i])) {
      wrong = kTooLarge;
      return;
    }
    for (size_t b = 0; b < blocks.size(); ++b)
      kernels->sampled(s, blocks[b].width, xs[b], dys[b], out, b > 0, ranges[i]);
  });
  return wrong ? IndexError(wrong, s.inputs) : ffi::Error::Success();
}

// ---- Products of int8 -------------------------------------------------------------------

ffi::Error Int8Matmul(ffi::ThreadPool pool, F32Matrix x, S8Vector values,
                      F32Vector scale, ffi::AnyBuffer indices,
                      S32Vector offsets, ffi::Result<F32Matrix> y,
                      std::string_view variant) {
  const Variant* v = Find(variant);
  if (!v) return Wrong(kNoVariant);
  const Int8Kernels& kernels = *v->int8;
  const int64_t batch = x.dimensions()[0], features = x.dimensions()[1];
  const int64_t inputs = (features + 3) / 4;
  if (features * 127 * 128 > INT32_MAX)
    return Wrong("int8 sums of " + std::to_string(features) +
                 " inputs do not fit into int32.");
  Structure s;
  ffi::Error error = Read(indices, offsets, values.element_count() / 4, inputs, &s);
  if (error.failure()) return error;
  if (y->dimensions()[0] != batch || y->dimensions()[1] != s.groups ||
      static_cast<int64_t>(scale.element_count()) != s.groups)
    return Wrong("the product or the scale has another shape than that of the outputs.");
  if (batch == 0 || s.groups == 0) return ffi::Error::Success();

  const std::vector<Block> blocks = Blocks(kernels.widths, batch);
  std::vector<int64_t> starts{0};  // of the tokens of each block, padded
  for (const Block& b : blocks) starts.push_back(starts.back() + b.width);
  const auto packed = Allocate<char>(starts.back() * inputs * kernels.lane_bytes);
  const auto scales = Allocate<float>(starts.back());
  const auto panel = [&](size_t b) {
    return packed.get() + starts[b] * inputs * kernels.lane_bytes;
  };
  struct Strip {
    size_t block;
    int begin;
  };
  std::vector<Strip> strips;
  for (size_t b = 0; b < blocks.size(); ++b)
    for (int begin = 0; begin < blocks[b].width; begin += kernels.lanes)
      strips.push_back({b, begin});
  const auto quantize = [&](int64_t i) {
    const Block& b = blocks[strips[i].block];
    const int begin = strips[i].begin;
    const int used = std::min(kernels.lanes, std::max(0, b.used - begin));
    kernels.quantize(x.typed_data() + b.begin + (used ? begin : 0), batch, features, used,
                     b.width, panel(strips[i].block) + begin * 4,
                     scales.get() + starts[strips[i].block] + begin);
  };
  if (Parts(pool, 0.5 * starts.back() * features) > 1) {
    ParallelFor(pool, strips.size(), quantize);
  } else {
    for (size_t i = 0; i < strips.size(); ++i) quantize(i);
  }

  const double work = (0.125 * batch + 1.0) * s.offsets[s.groups];
  const std::vector<Range> ranges = Split(s, Parts(pool, work / blocks.size()));
  std::atomic<int> wrong{0};
  ParallelFor(pool, blocks.size() * ranges.size(), [&](int64_t i) {
    const size_t b = i / ranges.size();
    const Range& groups = ranges[i % ranges.size()];
    if (!v->structure->are_below(s, groups)) {
      wrong = kTooLarge;
      return;
    }
    kernels.forward(s, values.typed_data(), scale.typed_data(), blocks[b].width, panel(b),
                    scales.get() + starts[b], y->typed_data() + blocks[b].begin, batch,
                    blocks[b].used, groups);
  });
  return wrong ? IndexError(wrong, s.inputs) : ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsparse_matmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32Matrix>()
                                  .Arg<F32Vector>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<S32Vector>()
                                  .Ret<F32Matrix>()
                                  .Attr<int64_t>("height")
                                  .Attr<std::string_view>("variant"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsparse_transposed, Transposed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32Matrix>()
                                  .Arg<F32Vector>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<S32Vector>()
                                  .Ret<F32Matrix>()
                                  .Attr<int64_t>("height")
                                  .Attr<std::string_view>("variant"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsparse_sampled, Sampled,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32Matrix>()
                                  .Arg<F32Matrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<S32Vector>()
                                  .Ret<F32Vector>()
                                  .Attr<int64_t>("height")
                                  .Attr<std::string_view>("variant"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsparse_int8_matmul, Int8Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32Matrix>()
                                  .Arg<S8Vector>()
                                  .Arg<F32Vector>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<S32Vector>()
                                  .Ret<F32Matrix>()
                                  .Attr<std::string_view>("variant"));

// The names of the variants that this processor runs, the best first, with commas.
extern "C" __attribute__((visibility("default"))) const char* jaxsparse_variants() {
  static const std::string names = [] {
    std::string all;
    for (const Variant& v : kVariants)
      if (v.runs()) all += (all.empty() ? "" : ",") + std::string(v.name);
    return all;
  }();
  return names.c_str();
}

}  // namespace jaxsparse
