// Passes over the indices of packed weights. They are loops that the compiler vectorizes.

#include "kernels.h"

namespace jaxsparse {
namespace NAMESPACE {
namespace {

template <class Index>
bool IsBelow(const Index* indices, int64_t count, int64_t limit) {
  Index largest = 0;
  for (int64_t e = 0; e < count; ++e)
    largest = indices[e] > largest ? indices[e] : largest;
  return count == 0 || largest < limit;
}

template <class Index>
bool PlaceCursors(const Structure& s, const Index* indices, int64_t input,
                  int32_t* cursors) {
  bool ascends = true;
  for (int64_t g = 0; g < s.groups; ++g) {
    const Index* const own = indices + s.offsets[g];
    const int32_t count = s.offsets[g + 1] - s.offsets[g];
    int32_t below = 0, descents = 0;
    if (input > 0)
      for (int32_t e = 0; e < count; ++e) below += own[e] < input;
    for (int32_t e = 1; e < count; ++e) descents += own[e] < own[e - 1];
    cursors[g] = s.offsets[g] + below;
    ascends &= descents == 0;
  }
  return ascends;
}

bool AreBelow(const Structure& s, Range groups) {
  const int64_t begin = s.offsets[groups.begin];
  const int64_t count = s.offsets[groups.end] - begin;
  return s.wide ? IsBelow(static_cast<const uint32_t*>(s.indices) + begin, count, s.inputs)
                : IsBelow(static_cast<const uint16_t*>(s.indices) + begin, count, s.inputs);
}

bool Cursors(const Structure& s, int64_t input, int32_t* cursors) {
  return s.wide
             ? PlaceCursors(s, static_cast<const uint32_t*>(s.indices), input, cursors)
             : PlaceCursors(s, static_cast<const uint16_t*>(s.indices), input, cursors);
}

}  // namespace

const StructureKernels structure = {AreBelow, Cursors};

}  // namespace NAMESPACE
}  // namespace jaxsparse
