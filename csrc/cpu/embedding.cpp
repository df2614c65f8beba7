// Carriers are read and projected in chunks of fixed size, partial sums are added in a fixed second pass: the result
// does not depend on the number of threads, and each weight is read from memory once (a chunk's second read hits the
// cache).
#include "embedding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "simd.h"
#include "threads.h"

namespace wmengine {
namespace {

constexpr double kStdmAlpha = 10.0, kStdmBeta = 10.0;
constexpr int64_t kColumns = 512;      // columns of a filter mean that one task adds up
constexpr int64_t kTile = 8 * kBlock;  // weights of the backward pass that stay in the cache between its two passes

bool has_unit_rows(Carrier carrier) { return carrier == Carrier::kUnitFilters || carrier == Carrier::kUnitFilterMean; }
bool is_mean(Carrier carrier) { return carrier == Carrier::kFilterMean || carrier == Carrier::kUnitFilterMean; }

int64_t padded_buckets(int64_t total) {
    int64_t buckets = 32;
    while (buckets < total) {
        buckets *= 2;
    }
    return buckets;
}

struct RowDot {
    template <Level>
    WM_INLINE float run(const float* a, const float* b, int64_t size) {
        Float8 sum0 = {}, sum1 = {};
        int64_t i = 0;
        for (; i + 16 <= size; i += 16) {
            sum0 += load<Float8>(a + i) * load<Float8>(b + i);
            sum1 += load<Float8>(a + i + 8) * load<Float8>(b + i + 8);
        }
        float sum = sum_of(sum0 + sum1);
        for (; i < size; ++i) {
            sum += a[i] * b[i];
        }
        return sum;
    }
};

float row_dot(const float* a, const float* b, int64_t size) { return dispatch<RowDot>(a, b, size); }

// 1/‖row‖; beyond float's comfortable range in double. A row so small that float cannot hold the inverse counts as
// zero.
float inverse_norm(const float* row, int64_t size) {
    const float square = row_dot(row, row, size);
    if (square > 1e-30f && square < 1e30f) {
        return static_cast<float>(1.0 / std::sqrt(static_cast<double>(square)));
    }
    double exact = 0;
    for (int64_t i = 0; i < size; ++i) {
        exact += static_cast<double>(row[i]) * row[i];
    }
    const double inverse = 1.0 / std::sqrt(exact);
    return inverse > std::numeric_limits<float>::max() ? 0.0f : static_cast<float>(inverse);
}

struct ScaleRow {
    template <Level>
    WM_INLINE void run(const float* row, float factor, int64_t size, float* out) {
        for (int64_t i = 0; i < size; ++i) {
            out[i] = row[i] * factor;
        }
    }
};

void scale_row(const float* row, float factor, int64_t size, float* out) { dispatch<ScaleRow>(row, factor, size, out); }

struct AddScaledRow {
    template <Level>
    WM_INLINE void run(const float* row, float factor, int64_t size, float* sums) {
        for (int64_t i = 0; i < size; ++i) {
            sums[i] += row[i] * factor;
        }
    }
};

void add_scaled_row(const float* row, float factor, int64_t size, float* sums) {
    dispatch<AddScaledRow>(row, factor, size, sums);
}

// out = inverse * (g - u (u·g)), u = inverse * row: the gradient through x / ‖x‖.
struct UnitRowGradient {
    template <Level>
    WM_INLINE void run(const float* row, const float* g, float inverse, float factor, int64_t size, float* out) {
        const float along = row_dot(row, g, size) * inverse * inverse;
        for (int64_t i = 0; i < size; ++i) {
            out[i] = factor * inverse * (g[i] - along * row[i]);
        }
    }
};

void unit_row_gradient(const float* row, const float* g, float inverse, float factor, int64_t size, float* out) {
    dispatch<UnitRowGradient>(row, g, inverse, factor, size, out);
}

// out[c, r] = in[r, c] of eight by eight numbers, whose rows begin every in_step and out_step.
WM_INLINE void transpose_tile(const float* in, int64_t in_step, float* out, int64_t out_step) {
    Float8 low[8], mixed[8];
    for (int r = 0; r < 8; ++r) {
        low[r] = load<Float8>(in + r * in_step);
    }
    for (int r = 0; r < 8; r += 2) {
        mixed[r] = __builtin_shufflevector(low[r], low[r + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        mixed[r + 1] = __builtin_shufflevector(low[r], low[r + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int r = 0; r < 8; r += 4) {
        for (int i = r; i < r + 2; ++i) {
            low[i] = __builtin_shufflevector(mixed[i], mixed[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            low[i + 2] = __builtin_shufflevector(mixed[i], mixed[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int r = 0; r < 4; ++r) {
        store(out + r * out_step, __builtin_shufflevector(low[r], low[r + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        store(out + (r + 4) * out_step, __builtin_shufflevector(low[r], low[r + 4], 4, 5, 6, 7, 12, 13, 14, 15));
    }
}

struct Transpose {
    template <Level>
    WM_INLINE void run(const float* in, int64_t rows, int64_t columns, float* out) {
        const int64_t tiled_rows = rows / 8 * 8, tiled_columns = columns / 8 * 8;
        for (int64_t c = 0; c < tiled_columns; c += 8) {
            for (int64_t r = 0; r < tiled_rows; r += 8) {
                transpose_tile(in + r * columns + c, columns, out + c * rows + r, rows);
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = r < tiled_rows ? tiled_columns : 0; c < columns; ++c) {
                out[c * rows + r] = in[r * columns + c];
            }
        }
    }
};

// out[c, r] = in[r, c]: a row with channels last in the order of its values, or back.
void transpose_row(const float* in, int64_t rows, int64_t columns, float* out) {
    dispatch<Transpose>(in, rows, columns, out);
}

// Rows of a weight in the order of their values: where they lie, or the last one asked for, put into order.
class Rows {
public:
    explicit Rows(const Weight& weight) : weight_(weight), ordered_(weight.channels > 1 ? weight.size : 0) {}

    const float* row(int64_t o) {
        const float* stored = weight_.values + o * weight_.size;
        if (weight_.channels == 1) {
            return stored;
        }
        if (o != held_) {
            transpose_row(stored, weight_.size / weight_.channels, weight_.channels, ordered_.data());
            held_ = o;
        }
        return ordered_.data();
    }

private:
    const Weight& weight_;
    std::vector<float> ordered_;
    int64_t held_ = -1;
};

// Weights first … first + count of a carrier with unit filters, each row divided by its norm; `inverse` begins at row
// `from`.
void read_unit_rows(Rows* rows, int64_t size, const std::vector<float>& inverse, int64_t from, int64_t first,
                    int64_t count, float* out) {
    int64_t o = first / size, begin = first;
    while (begin < first + count) {
        const int64_t end = std::min((o + 1) * size, first + count);
        scale_row(rows->row(o) + (begin - o * size), inverse[o - from], end - begin, out + (begin - first));
        begin = end;
        ++o;
    }
}

struct Part {
    size_t weight;
    int64_t begin, end;  // rows, or carrier values
};

// Cuts 0 … count of a weight into parts of `step`: the tasks of all weights go to the threads in one call.
void cut(size_t weight, int64_t count, int64_t step, std::vector<Part>* parts) {
    for (int64_t begin = 0; begin < count; begin += step) {
        parts->push_back({weight, begin, std::min(begin + step, count)});
    }
}

struct Task {
    size_t weight;
    int64_t first, count;  // weights of the carrier
    int64_t row, rows;     // rows of a dense matrix
    float* sums;
};

}  // namespace

void carrier_projection(const std::vector<Weight>& weights, Carrier carrier, Projection projection, int64_t total,
                        double scale, const float* signs, float* inverse_norms, float* y) {
    const auto sign = [signs](int64_t filter) { return signs == nullptr ? 1.0f : signs[filter]; };
    const bool sketch = projection == Projection::kSketch, unit = has_unit_rows(carrier);
    const int64_t width = sketch ? padded_buckets(total) : total;

    std::vector<int64_t> norm_at(weights.size());
    std::vector<std::vector<float>> means(weights.size());
    int64_t norms = 0, chunks = 0;
    for (size_t l = 0; l < weights.size(); ++l) {
        norm_at[l] = norms;
        norms += weights[l].filters;
        chunks += chunks_of(is_mean(carrier) ? weights[l].size : weights[l].filters * weights[l].size);
    }

    if (is_mean(carrier)) {
        std::vector<Part> parts;
        if (unit) {
            for (size_t l = 0; l < weights.size(); ++l) {
                cut(l, weights[l].filters, std::max<int64_t>(1, kTile / std::max<int64_t>(1, weights[l].size)), &parts);
            }
            parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t index) {
                const Part& part = parts[index];
                const Weight& weight = weights[part.weight];
                for (int64_t o = part.begin; o < part.end; ++o) {
                    const int64_t at = norm_at[part.weight] + o;
                    inverse_norms[at] = sign(at) * inverse_norm(weight.values + o * weight.size, weight.size);
                }
            });
        }
        parts.clear();
        for (size_t l = 0; l < weights.size(); ++l) {
            means[l].assign(weights[l].size, 0.0f);
            cut(l, weights[l].size, kColumns, &parts);
        }
        parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t index) {
            const Part& part = parts[index];
            const Weight& weight = weights[part.weight];
            const int64_t count = part.end - part.begin;
            const float share = weight.filters > 0 ? 1.0f / static_cast<float>(weight.filters) : 0.0f;
            float* sums = means[part.weight].data() + part.begin;
            for (int64_t o = 0; o < weight.filters; ++o) {
                add_scaled_row(weight.values + o * weight.size + part.begin,
                               unit ? inverse_norms[norm_at[part.weight] + o] : 1.0f, count, sums);
            }
            scale_row(sums, share, count, sums);
        });
    }

    std::vector<float> partials(chunks * width, 0.0f);
    std::vector<Task> tasks;
    float* sums = partials.data();
    for (size_t l = 0; l < weights.size(); ++l) {
        const int64_t count = is_mean(carrier) ? weights[l].size : weights[l].filters * weights[l].size;
        for (int64_t first = 0; first < count; first += kChunk, sums += width) {
            const int64_t here = std::min(kChunk, count - first);
            const int64_t step = sketch || unit ? width : kDenseRows;  // unit rows are read once for all dense rows
            for (int64_t row = 0; row < width; row += step) {
                tasks.push_back({l, first, here, row, std::min(step, width - row), sums});
            }
        }
    }

    parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
        const Task& task = tasks[index];
        const Weight& weight = weights[task.weight];
        const auto run = [&](const float* values, int64_t first, int64_t count) {
            if (sketch) {
                sketch_run(values, first, count, weight.key, width, task.sums);
            } else {
                dense_run(values, first, count, weight.key, projection, task.row, task.rows, task.sums + task.row);
            }
        };
        if (carrier != Carrier::kUnitFilters) {
            const float* values = is_mean(carrier) ? means[task.weight].data() : weight.values;
            run(values + task.first, task.first, task.count);
            return;
        }
        // Norms of the rows that touch this chunk; the chunk in which a row begins stores it for the backward pass.
        const int64_t from = task.first / weight.size, to = (task.first + task.count - 1) / weight.size;
        std::vector<float> inverse(to - from + 1);
        for (int64_t o = from; o <= to; ++o) {
            const int64_t at = norm_at[task.weight] + o;
            inverse[o - from] = sign(at) * inverse_norm(weight.values + o * weight.size, weight.size);
            if (o * weight.size >= task.first) {
                inverse_norms[at] = inverse[o - from];
            }
        }
        Rows rows(weight);
        float block[kBlock];
        for (int64_t begin = task.first; begin < task.first + task.count; begin += kBlock) {
            const int64_t count = std::min<int64_t>(kBlock, task.first + task.count - begin);
            read_unit_rows(&rows, weight.size, inverse, from, begin, count, block);
            run(block, begin, count);
        }
    });

    for (int64_t t = 0; t < total; ++t) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            sum += partials[chunk * width + t];
        }
        y[t] = static_cast<float>(scale * sum);
    }
}

double link_loss(const float* y, const uint8_t* bits, int64_t total, Link link, double margin, float* residual) {
    const auto softplus = [](double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); };
    const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
    double loss = 0;
    for (int64_t t = 0; t < total; ++t) {
        const double s = bits[t] ? 1.0 : -1.0, z = y[t];
        double slope = 0;
        switch (link) {
            case Link::kBce:
                loss += softplus(-s * z);
                slope = -s * sigmoid(-s * z);
                break;
            case Link::kHinge: {
                const double gap = margin - s * z;
                if (!(gap <= 0)) {  // NaN must not read as a satisfied margin
                    loss += gap;
                    slope = gap > 0 ? -s : gap;
                }
                break;
            }
            case Link::kMse:
                loss += (z - margin * s) * (z - margin * s);
                slope = 2 * (z - margin * s);
                break;
            case Link::kStdm: {
                const double inner = kStdmAlpha * std::sin(kStdmBeta * z);
                loss += softplus(-s * inner);
                slope = -s * sigmoid(-s * inner) * kStdmAlpha * kStdmBeta * std::cos(kStdmBeta * z);
                break;
            }
        }
        residual[t] = static_cast<float>(slope);
    }
    return loss;
}

namespace {

std::vector<float> scaled_residual(const float* g, int64_t total, Projection projection, double factor) {
    std::vector<float> scaled(projection == Projection::kSketch ? padded_buckets(total) : total, 0.0f);
    for (int64_t t = 0; t < total; ++t) {
        scaled[t] = static_cast<float>(factor * g[t]);
    }
    return scaled;
}

// out[m - first] (+)= Σ_t X[t, m] g[t] for the carrier values first … first + count.
void adjoint_run(const std::vector<float>& g, int64_t first, int64_t count, uint64_t key, Projection projection,
                 bool accumulate, float* out) {
    const int64_t width = static_cast<int64_t>(g.size());
    if (projection == Projection::kSketch) {
        sketch_adjoint_run(g.data(), first, count, key, width, accumulate, out);
    } else {
        dense_adjoint_run(g.data(), width, first, count, key, projection, accumulate, out);
    }
}

// Carrier values of an adjoint that one task computes; the dense adjoint is arithmetic, not memory: one block a task.
int64_t adjoint_step(Projection projection) { return projection == Projection::kSketch ? kChunk : kBlock; }

}  // namespace

void projection_adjoint(const float* g, int64_t total, int64_t count, uint64_t key, Projection projection,
                        double factor, bool accumulate, float* out) {
    const std::vector<float> scaled = scaled_residual(g, total, projection, factor);
    const int64_t step = adjoint_step(projection);
    parallel_for((count + step - 1) / step, [&](int64_t part) {
        const int64_t first = part * step, here = std::min(step, count - first);
        adjoint_run(scaled, first, here, key, projection, accumulate, out + first);
    });
}

void embedding_backward(const std::vector<Weight>& weights, Carrier carrier, Projection projection, int64_t total,
                        double factor, const float* inverse_norms, const float* residual) {
    const std::vector<float> scaled = scaled_residual(residual, total, projection, factor);
    std::vector<const float*> inverse;
    for (const Weight& weight : weights) {
        inverse.push_back(inverse_norms);
        inverse_norms += weight.filters;
    }

    // Of a flat carrier the adjoint is the gradient; that of a mean is kept until its filters are done.
    std::vector<std::vector<float>> means(weights.size());
    std::vector<Part> parts;
    if (carrier != Carrier::kUnitFilters) {
        for (size_t l = 0; l < weights.size(); ++l) {
            means[l].resize(is_mean(carrier) ? weights[l].size : 0);
            const int64_t count = is_mean(carrier) ? weights[l].size : weights[l].filters * weights[l].size;
            cut(l, count, adjoint_step(projection), &parts);
        }
        parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t index) {
            const Part& part = parts[index];
            float* out = is_mean(carrier) ? means[part.weight].data() : weights[part.weight].gradient;
            adjoint_run(scaled, part.begin, part.end - part.begin, weights[part.weight].key, projection, false,
                        out + part.begin);
        });
    }
    if (carrier == Carrier::kFlat) {
        return;
    }

    // Whole rows per task; for unit filters their part of the adjoint is drawn into a tile that stays in the cache.
    parts.clear();
    for (size_t l = 0; l < weights.size(); ++l) {
        cut(l, weights[l].filters, std::max<int64_t>(1, kTile / std::max<int64_t>(1, weights[l].size)), &parts);
    }
    parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t index) {
        const Part& part = parts[index];
        const Weight& weight = weights[part.weight];
        const float* g = means[part.weight].data();
        const float share = is_mean(carrier) ? 1.0f / static_cast<float>(weight.filters) : 1.0f;
        const int64_t begin = part.begin * weight.size, first = begin / kBlock * kBlock;
        std::unique_ptr<float[]> tile;
        if (!is_mean(carrier)) {
            const int64_t count = part.end * weight.size - first;
            tile.reset(new float[count]);
            adjoint_run(scaled, first, count, weight.key, projection, false, tile.get());
        }
        const bool last = weight.channels > 1;
        std::vector<float> ordered(last ? weight.size : 0);
        Rows rows(weight);
        for (int64_t o = part.begin; o < part.end; ++o) {
            const int64_t at = o * weight.size;
            float* gradient = weight.gradient + at;
            if (carrier == Carrier::kFilterMean) {
                scale_row(g, share, weight.size, gradient);
                continue;
            }
            unit_row_gradient(rows.row(o), is_mean(carrier) ? g : tile.get() + (at - first), inverse[part.weight][o],
                              share, weight.size, last ? ordered.data() : gradient);
            if (last) {
                transpose_row(ordered.data(), weight.channels, weight.size / weight.channels, gradient);
            }
        }
    });
}

}  // namespace wmengine
