// What the files of one instruction set offer to the handlers in handlers.cc.
//
// Each of these files is compiled once for each instruction set, with NAMESPACE naming it,
// and handlers.cc chooses among them when it runs. Only plain functions and arrays cross
// this boundary, so that no inline function of a library is shared by code for different
// processors.
//
// Activations are feature-major: the numbers of one feature for all tokens lie together.
// A panel is a block of tokens whose sums fit into registers: [features, width].

#ifndef JAXSPARSE_KERNELS_H_
#define JAXSPARSE_KERNELS_H_

#include <stdint.h>

namespace jaxsparse {

// Where the entries are. Entry e of group g, offsets[g] <= e < offsets[g + 1], belongs to
// input indices[e]. For float32 a group is T outputs and an input is one feature; for int8
// a group is one output and an input is four features.
struct Structure {
  const void* indices;     // uint16, or uint32 where wide
  bool wide;
  const int32_t* offsets;  // [groups + 1]
  int64_t groups, inputs;
};

struct Range {
  int64_t begin, end;
};

struct StructureKernels {
  // Whether all indices of a range of groups are below s.inputs.
  bool (*are_below)(const Structure& s, Range groups);

  // Where each group's entries of at least `input` begin; false where indices descend.
  bool (*cursors)(const Structure& s, int64_t input, int32_t* cursors);
};

// Kernels for groups of T outputs by one input; `values` is [entries, T].
struct FloatKernels {
  const int* widths;  // of panels, ascending, 0 behind the last
  const int* backward_widths;

  // y[o * stride + b] = sum of values * x, for b < used and the groups of a range.
  void (*forward)(const Structure&, const float* values, int width, const float* x,
                  float* y, int64_t stride, int used, Range groups);

  // dx = the sum over outputs of values * dy, for the inputs of a range, whose entries
  // begin at cursors[g]; the cursors move on.
  void (*backward)(const Structure&, const float* values, int width, const float* dy,
                   float* dx, Range inputs, int32_t* cursors);

  // dvalues (+)= the sum over tokens of x * dy, at the entries of a range of groups.
  void (*sampled)(const Structure&, int width, const float* x, const float* dy,
                  float* dvalues, bool add, Range groups);
};

struct Int8Kernels {
  const int* widths;
  int lanes;        // tokens that `quantize` takes at once, where a panel is not smaller
  int lane_bytes;   // of one token's four quantized features

  // Quantizes `used` tokens of x[k * stride + b] to packed[k / 4][width] and their scales.
  void (*quantize)(const float* x, int64_t stride, int64_t features, int used, int width,
                   void* packed, float* scales);

  void (*forward)(const Structure&, const int8_t* values, const float* scale, int width,
                  const void* packed, const float* scales, float* y, int64_t stride,
                  int used, Range groups);
};

#define JAXSPARSE_DECLARE(name)           \
  namespace name {                        \
  extern const StructureKernels structure; \
  extern const FloatKernels rows;         \
  extern const FloatKernels tiles;        \
  extern const Int8Kernels int8;          \
  }

JAXSPARSE_DECLARE(portable)
JAXSPARSE_DECLARE(avx2)
JAXSPARSE_DECLARE(avx512)
JAXSPARSE_DECLARE(avx512vnni)

}  // namespace jaxsparse

#endif  // JAXSPARSE_KERNELS_H_
