// How the work of a product is cut: tokens into panels, groups into ranges.

#ifndef JAXSPARSE_CUTTING_H_
#define JAXSPARSE_CUTTING_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxsparse {

namespace ffi = xla::ffi;

struct Block {
  int64_t begin;    // its first token
  int used, width;  // tokens, and those of the panel that holds them
};

// Panels that hold a batch: as many of the widest as are full, and one for the rest.
inline std::vector<Block> Blocks(const int* widths, int64_t batch) {
  int widest = 0;
  for (const int* w = widths; *w; ++w) widest = *w;
  std::vector<Block> blocks;
  int64_t begin = 0;
  for (; batch - begin >= widest; begin += widest)
    blocks.push_back({begin, widest, widest});
  if (begin < batch) {
    const int rest = static_cast<int>(batch - begin);
    while (*widths < rest) ++widths;
    blocks.push_back({begin, rest, *widths});
  }
  return blocks;
}

// Ranges of groups with about the same number of entries.
inline std::vector<Range> Split(const Structure& s, int64_t parts) {
  std::vector<Range> ranges;
  const int64_t entries = s.offsets[s.groups];
  int64_t begin = 0;
  for (int64_t p = 1; p <= parts; ++p) {
    const int64_t bound = entries * p / parts;
    const int32_t* at = std::lower_bound(s.offsets + begin, s.offsets + s.groups, bound);
    const int64_t end = p == parts ? s.groups : at - s.offsets;
    if (end > begin) ranges.push_back({begin, end});
    begin = std::max(begin, end);
  }
  return ranges;
}

// In how many parts to cut what takes about so many cycles: to wake a thread takes 10,000.
inline int64_t Parts(ffi::ThreadPool& pool, double cycles) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (threads == 1 || cycles < 3e4) return 1;
  return std::min<int64_t>(4 * threads, static_cast<int64_t>(cycles / 1e4));
}

// Memory that is not filled with zeros first.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
std::unique_ptr<T[], Free> Allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) / 64 + 1) * 64;
  return std::unique_ptr<T[], Free>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

// Activations [features, tokens] as one array [features, width] for each block.
class Panels {
 public:
  Panels(ffi::ThreadPool& pool, const std::vector<Block>& blocks, const float* x,
         int64_t features, int64_t batch) {
    if (blocks.size() == 1 && blocks[0].width == batch) {
      starts_.push_back(x);  // as they are
      return;
    }
    int64_t total = 0;
    for (const Block& b : blocks) total += b.width;
    memory_ = Allocate<float>(total * features);
    float* start = memory_.get();
    for (const Block& b : blocks) {
      starts_.push_back(start);
      start += b.width * features;
    }
    const int64_t parts = Parts(pool, 0.2 * total * features);
    ParallelFor(pool, parts, [&](int64_t p) {
      for (size_t i = 0; i < blocks.size(); ++i) {
        const Block& b = blocks[i];
        float* const panel = const_cast<float*>(starts_[i]);
        for (int64_t k = features * p / parts; k < features * (p + 1) / parts; ++k) {
          float* const row = panel + k * b.width;
          std::memcpy(row, x + k * batch + b.begin, b.used * sizeof(float));
          std::memset(row + b.used, 0, (b.width - b.used) * sizeof(float));
        }
      }
    });
  }

  const float* operator[](size_t block) const { return starts_[block]; }

 private:
  std::unique_ptr<float[], Free> memory_;
  std::vector<const float*> starts_;
};

}  // namespace jaxsparse

#endif  // JAXSPARSE_CUTTING_H_
