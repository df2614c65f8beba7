// Features packed for products of matrices, and the two products of the soft nearest neighbour loss: of features with
// each other, tile by tile, and of weights with features.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "soft_nearest_neighbor.h"

namespace wmengine::soft_neighbor {

constexpr int kWidth = 32;  // features or rows in a panel, whatever the instruction set
constexpr int kBlock = 96;  // rows in a block: a multiple of kWidth and of every kernel's height

constexpr size_t kHugePage = size_t{1} << 21;

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Large buffers ask for huge pages: fresh memory costs a page fault for every page, and they are used once.
template <typename T>
Buffer<T> allocate(int64_t count) {
    const size_t needed = std::max<size_t>(static_cast<size_t>(count) * sizeof(T), 1);
    const size_t alignment = needed < 2 * kHugePage ? 64 : kHugePage;
    const size_t bytes = (needed + 63) / 64 * 64;
    void* p = nullptr;
    if (posix_memalign(&p, alignment, bytes) != 0) {
        throw std::bad_alloc();
    }
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) {
        madvise(p, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // no more than a wish
    }
#endif
    return Buffer<T>(static_cast<T*>(p));
}

// Pointers into one call's packed input.
struct View {
    const float* features;
    int64_t rows, size, stride, padded_rows, panels, blocks;
    float temperature, inverse_temperature;
    const float* down;     // [panels][padded_rows][kWidth]: centred, kWidth features of every row together
    const float* across;   // [padded_rows / kWidth][panels][kWidth features][kWidth rows]
    const float* norms;    // [padded_rows] squared
    const int32_t* label;  // [padded_rows], equal where the labels are
};

struct Packed {
    Buffer<float> down, across, norms;
    Buffer<int32_t> label;
    std::vector<int64_t> members;  // rows of each label
    View view;
    bool finite;
};

inline int64_t width_of(const View& v, int64_t panel) { return std::min<int64_t>(kWidth, v.size - panel * kWidth); }

inline int64_t rows_of(const View& v, int64_t block) { return std::min<int64_t>(kBlock, v.rows - block * kBlock); }

Packed pack(const SoftNeighborProblem& problem);

// tile[kBlock][kBlock] = x_i·x_j of blocks I and J
void products(const View& v, int64_t I, int64_t J, float* tile);

// out, packed as View::down, rows of block I and panels begin … end - 1, += W·x_J; W is the tile, or its transpose.
void add_weighted(const View& v, int64_t I, int64_t J, const float* tile, bool transposed, int64_t begin, int64_t end,
                  float* out);

}  // namespace wmengine::soft_neighbor
