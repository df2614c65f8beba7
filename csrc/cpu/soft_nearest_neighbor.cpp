// Tiles of kBlock × kBlock squared distances, of which only those on and above the diagonal are computed. A tile is a
// product of centred features, n_i + n_j - 2 x_i·x_j; where that cancels, the pair is computed again from the
// difference of the features as they were given, and so is its part of the gradient.
//
// One exponential serves both rows of a pair, exp(-(d - m) / T) with m the least distance of the tile, unless the tile
// spans more than kSpan temperatures: then each row and each column takes its own least distance. Nothing underflows
// that counts, at any temperature.
//
// Order: forward, each tile writes sums of its own, and each row adds them up by tile. Backward, tiles (I, J) with
// (I + J) mod blocks = r run together in round r: every block is in one tile of a round, so a tile owns the gradients
// of its two blocks, and they are added in the order of the rounds whatever the number of threads.
#include "soft_nearest_neighbor.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "soft_neighbor_products.h"
#include "soft_neighbor_tiles.h"
#include "threads.h"

namespace wmengine {
namespace {

using namespace soft_neighbor;

constexpr int kChunk = 32;  // panels of the gradient in a task of its own, where there are more

}  // namespace

double soft_nearest_neighbor(const SoftNeighborProblem& problem, const SoftNeighborRows& result) {
    const Packed packed = pack(problem);
    const View& v = packed.view;
    for (float* each : {result.same_nearest, result.same_weight, result.other_nearest, result.other_weight}) {
        std::fill(each, each + v.rows, packed.finite ? 0.0f : NAN);
    }
    if (!packed.finite) {
        return std::numeric_limits<double>::quiet_NaN();
    }
    const Buffer<float> memory = allocate<float>(v.blocks * 4 * v.padded_rows);
    const Parts parts{memory.get(), v.padded_rows};
    parallel_for(v.blocks * (v.blocks + 1) / 2, [&](int64_t tile) {
        int64_t I = 0;
        for (; tile >= v.blocks - I; ++I) {
            tile -= v.blocks - I;
        }
        Tile distances;
        products(v, I, I + tile, distances.d);
        sum_tile(v, parts, I, I + tile, distances);
    });

    const Buffer<double> losses = allocate<double>(v.padded_rows);
    parallel_for(v.blocks, [&](int64_t block) {
        for (int64_t r = 0; r < rows_of(v, block); ++r) {
            const int64_t i = block * kBlock + r;
            losses[i] = 0;
            double sums[2] = {0, 0};
            float nearest[2] = {FLT_MAX, FLT_MAX};
            for (int kind = 0; kind < 2; ++kind) {
                for (int64_t other = 0; other < v.blocks; ++other) {
                    if (parts.row(other, 2 * kind + 1, block)[r] > 0) {
                        nearest[kind] = std::min(nearest[kind], parts.row(other, 2 * kind, block)[r]);
                    }
                }
                for (int64_t other = 0; other < v.blocks; ++other) {
                    const float sum = parts.row(other, 2 * kind + 1, block)[r];
                    if (sum > 0) {
                        const double behind = parts.row(other, 2 * kind, block)[r] - nearest[kind];
                        sums[kind] += sum * std::exp(-behind * v.inverse_temperature);
                    }
                }
            }
            if (sums[0] > 0 && sums[1] > 0) {
                // the other labels' sum over the own label's, in logarithms
                const double ratio = (static_cast<double>(nearest[0]) - nearest[1]) * v.inverse_temperature +
                                     std::log(sums[1]) - std::log(sums[0]);
                losses[i] = std::max(ratio, 0.0) + std::log1p(std::exp(-std::fabs(ratio)));
                const double share = 1 / (1 + std::exp(-ratio));
                result.same_nearest[i] = nearest[0];
                result.same_weight[i] = static_cast<float>(share / sums[0]);
                result.other_nearest[i] = nearest[1];
                result.other_weight[i] = static_cast<float>(share / sums[1]);
            }
        }
    });
    double loss = 0;
    int64_t counted = 0;
    for (int64_t i = 0; i < v.rows; ++i) {
        loss += losses[i];
        counted += packed.members[packed.label[i]] > 1;
    }
    return counted > 0 ? loss / static_cast<double>(counted) : 0;
}

double soft_nearest_neighbor_backward(const SoftNeighborProblem& problem, const SoftNeighborRows& rows, double factor,
                                      float* gradient) {
    const Packed packed = pack(problem);
    const View& v = packed.view;
    if (!packed.finite) {
        if (gradient != nullptr) {
            std::fill(gradient, gradient + v.rows * v.size, NAN);
        }
        return std::numeric_limits<double>::quiet_NaN();
    }
    int64_t counted = 0;
    for (int64_t i = 0; i < v.rows; ++i) {
        counted += packed.members[packed.label[i]] > 1;
    }
    const bool wanted = gradient != nullptr;
    const Buffer<float> weighted = allocate<float>(wanted ? v.panels * v.padded_rows * kWidth : 0);
    const Buffer<double> weight = allocate<double>(v.padded_rows);
    const Buffer<double> distance = allocate<double>(v.blocks * v.blocks);
    std::fill(weight.get(), weight.get() + v.padded_rows, 0.0);
    if (wanted) {
        parallel_for(v.panels, [&](int64_t panel) {
            float* const own = weighted.get() + panel * v.padded_rows * kWidth;
            std::fill(own, own + v.padded_rows * kWidth, 0.0f);
        });
    }
    const int64_t chunks = (v.panels + kChunk - 1) / kChunk;
    const auto add = [&](int64_t I, int64_t J, const Tile& tile, int64_t chunk) {
        const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, v.panels);
        add_weighted(v, I, J, tile.d, false, begin, end, weighted.get());
        if (I != J) {
            add_weighted(v, J, I, tile.d, true, begin, end, weighted.get());
        }
    };
    const Buffer<Tile> tiles = allocate<Tile>(v.blocks / 2 + 1);
    const GradientSums sums{wanted ? weighted.get() : nullptr, weight.get(), distance.get()};
    for (int64_t round = 0; round < v.blocks; ++round) {
        std::vector<int64_t> firsts;  // of the pairs of blocks I <= J with (I + J) mod blocks = round
        for (int64_t I = 0; I < v.blocks; ++I) {
            if (I <= (round - I + v.blocks) % v.blocks) {
                firsts.push_back(I);
            }
        }
        const int64_t pairs = static_cast<int64_t>(firsts.size());
        parallel_for(pairs, [&](int64_t place) {
            const int64_t I = firsts[place], J = (round - I + v.blocks) % v.blocks;
            products(v, I, J, tiles[place].d);
            gradient_tile(v, rows, sums, I, J, tiles[place]);
            if (wanted && chunks == 1) {  // while the tile is in this processor's cache
                add(I, J, tiles[place], 0);
            }
        });
        if (wanted && chunks > 1) {
            parallel_for(pairs * chunks, [&](int64_t task) {
                const int64_t I = firsts[task / chunks], J = (round - I + v.blocks) % v.blocks;
                add(I, J, tiles[task / chunks], task % chunks);
            });
        }
    }
    const double mean = counted > 0 ? factor / static_cast<double>(counted) : 0.0;
    const double scale = 2 * mean * v.inverse_temperature;
    if (wanted) {
        parallel_for(v.blocks, [&](int64_t block) {
            for (int64_t i = block * kBlock; i < block * kBlock + rows_of(v, block); ++i) {
                const float own = static_cast<float>(scale * weight[i]), others = static_cast<float>(scale);
                for (int64_t panel = 0; panel < v.panels; ++panel) {
                    const int64_t at = (panel * v.padded_rows + i) * kWidth;
                    for (int64_t c = 0; c < width_of(v, panel); ++c) {
                        gradient[i * v.size + panel * kWidth + c] = own * v.down[at + c] - others * weighted[at + c];
                    }
                }
            }
        });
    }
    double by_temperature = 0;
    for (int64_t I = 0; I < v.blocks; ++I) {
        for (int64_t J = I; J < v.blocks; ++J) {
            by_temperature += distance[I * v.blocks + J];
        }
    }
    return -mean * v.inverse_temperature * v.inverse_temperature * by_temperature;
}

}  // namespace wmengine
