// Prints what the C++ core computes for fixed inputs, as bits: the same on every processor and compiler.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/embedding.h"
#include "cpu/match_counts.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

using namespace wmengine;

namespace {

constexpr uint64_t kKey = 0x0123456789ABCDEFull;

// Multiples of 1/64 in [-2, 2), from a linear congruential generator.
std::vector<float> values(int64_t count, uint32_t seed) {
    std::vector<float> result(count);
    for (float& value : result) {
        seed = seed * 1664525u + 1013904223u;
        value = static_cast<float>(static_cast<int32_t>(seed >> 24) - 128) / 64.0f;
    }
    return result;
}

// FNV-1a of the bytes, and the first number.
template <typename T>
void print(const char* name, const std::vector<T>& numbers) {
    uint64_t hash = 0xCBF29CE484222325ull;
    const auto* bytes = reinterpret_cast<const unsigned char*>(numbers.data());
    for (size_t i = 0; i < numbers.size() * sizeof(T); ++i) {
        hash = (hash ^ bytes[i]) * 0x100000001B3ull;
    }
    std::printf("%s %016" PRIx64 " %.9g\n", name, hash, static_cast<double>(numbers.empty() ? 0 : numbers[0]));
}

}  // namespace

int main() {
    set_thread_count(2);
    const char* const projections[] = {"sketch", "rademacher", "gaussian"};
    const char* const carriers[] = {"flat", "unit_filters", "filter_mean", "unit_filter_mean"};
    const std::vector<float> weight = values(37 * 141, 1), second = values(3 * 40000, 2), g = values(100, 3);
    for (int projection = 0; projection < 3; ++projection) {
        for (int carrier = 0; carrier < 4; ++carrier) {
            std::vector<float> y(100), norms(40), gradient(weight.size()), second_gradient(second.size());
            const int64_t short_size = projection == 2 ? 4001 : 40000;  // Gaussian values take an emulator long
            const std::vector<Weight> weights{{weight.data(), gradient.data(), 37, 141, 1, kKey},
                                              {second.data(), second_gradient.data(), 3, short_size, 1, kKey + 1}};
            carrier_projection(weights, static_cast<Carrier>(carrier), static_cast<Projection>(projection), 100, 0.5,
                               nullptr, norms.data(), y.data());
            embedding_backward(weights, static_cast<Carrier>(carrier), static_cast<Projection>(projection), 100, 0.25,
                               norms.data(), g.data());
            std::printf("%s %s ", projections[projection], carriers[carrier]);
            print("y", y);
            print("  gradient", gradient);
            print("  gradient", second_gradient);
        }
    }
    const int64_t rows = 270, groups = 3;
    for (const int64_t classes : {2, 10, 37, 1000}) {
        for (const bool distribution : {false, true}) {
            std::vector<float> scores = values(rows * classes, 4);
            std::vector<int64_t> expected(rows), group(rows);
            for (int64_t n = 0; n < rows; ++n) {
                expected[n] = n * 7919 % classes;
                group[n] = n % groups;
                float* const row = scores.data() + n * classes;
                const float sum = std::accumulate(row, row + classes, 0.0f, [](float a, float b) { return a + b * b; });
                for (int64_t c = 0; distribution && c < classes; ++c) {
                    row[c] = row[c] * row[c] / sum;
                }
            }
            std::vector<int32_t> predicted(rows), hits(groups), invalid(groups);
            std::vector<int8_t> at(rows), levels(rows * classes);
            std::vector<uint32_t> histogram(rows * kLevels);
            match_counts({scores.data(), Stored::kFloat32, rows, classes, expected.data(), group.data(), groups},
                         {predicted.data(), at.data(), histogram.data(), hits.data(), invalid.data(), levels.data()});
            print("match_counts", hits);
            print("  levels", levels);
        }
    }
    return 0;
}
