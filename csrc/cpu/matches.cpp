// A symbol of B bits is written as one bit in each of B planes, 32 symbols a word, so that two words of symbols differ
// where any of their planes do: B × (XOR, OR) and one population count compare 32 pairs. A bit string is its own plane.
//
// Sixteen rows lie side by side, word by word: [tile of rows][word][plane][16 rows]. A vector then holds one word of 8
// or 16 rows of the registry, is compared with one word of a suspect spread over all lanes, and is counted lane by
// lane, with no sum across lanes. Suspects are packed in the same way, once; each task packs the part of the registry
// that it compares, which stays in the nearest caches.
#include "matches.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "simd.h"
#include "threads.h"

#if defined(WM_X86_64) && !defined(__clang__)
#define WM_POPCOUNT_BY_ASSEMBLY 1
#endif

namespace wmengine {
namespace {

constexpr int64_t kTile = 16;          // rows side by side
constexpr int64_t kGroup = 4;          // suspects that share one load of the registry, whether there are as many or not
constexpr int64_t kChunk = 64 * 1024;  // bytes of the packed registry that a task reads again and again
constexpr int64_t kMostRows = 1024;    // rows of the registry in such a part
constexpr int64_t kWordsOfBytes = 31;  // words whose bits, up to eight a byte, a byte can count

// Population counts for the processors that have them in vectors; the other AVX-512 ones run the code for AVX2.
enum class Counting { kBitTricks, kShuffle, kInstruction };

constexpr int counting_lanes(Counting counting) { return counting == Counting::kInstruction ? 16 : 8; }

// Set bits, counted in each byte (kInstruction: in each lane). GCC refuses a builtin of another instruction set in a
// function that is still to be inlined into one, but not assembly; with Clang the bit tricks have to do.
template <Counting counting, typename Words>
WM_INLINE Words set_bits(Words v) {
#if defined(WM_POPCOUNT_BY_ASSEMBLY)
    if constexpr (counting == Counting::kInstruction) {
        Words count;
        __asm__("vpopcntd %1, %0" : "=v"(count) : "v"(v));
        return count;
    }
    if constexpr (counting == Counting::kShuffle) {
        typedef uint8_t Bytes __attribute__((vector_size(32)));
        const Bytes table = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                             0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
        const Words low = v & 0x0f0f0f0fu, high = (v >> 4) & 0x0f0f0f0fu;
        Bytes count_low, count_high;
        __asm__("vpshufb %2, %1, %0" : "=x"(count_low) : "x"(table), "x"(low));
        __asm__("vpshufb %2, %1, %0" : "=x"(count_high) : "x"(table), "x"(high));
        return (Words)(count_low + count_high);
    }
#endif
    v = v - ((v >> 1) & 0x55555555u);
    v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
    return (v + (v >> 4)) & 0x0f0f0f0fu;
}

template <Counting counting, typename Words>
WM_INLINE Words sum_of_bytes(Words v) {
    if constexpr (counting == Counting::kInstruction) {
        return v;
    }
    const Words pairs = (v & 0x00ff00ffu) + ((v >> 8) & 0x00ff00ffu);
    return (pairs & 0xffffu) + (pairs >> 16);
}

// How the rows of one side lie: `words` of `planes` planes.
struct Layout {
    int64_t words, planes;
    int64_t tile() const { return words * planes * kTile; }  // words of a tile
};

// Symbols that differ between kGroup neighbouring suspects and the rows of one tile: differences[kGroup][kMostRows].
template <Counting counting>
WM_INLINE void compare_tile(const uint32_t* suspects, const uint32_t* tile, Layout layout, int32_t* differences) {
    constexpr int lanes = counting_lanes(counting);
    typedef Words32<lanes> Words;
    for (int64_t lane = 0; lane < kTile; lane += lanes) {
        Words sums[kGroup] = {};
        for (int64_t begin = 0; begin < layout.words; begin += kWordsOfBytes) {
            const int64_t end = std::min(begin + kWordsOfBytes, layout.words);
            Words counts[kGroup] = {};
            for (int64_t w = begin; w < end; ++w) {
                Words differing[kGroup] = {};
                for (int64_t plane = w * layout.planes; plane < (w + 1) * layout.planes; ++plane) {
                    const Words row = load<Words>(tile + plane * kTile + lane);
#pragma GCC unroll 4
                    for (int i = 0; i < kGroup; ++i) {
                        differing[i] |= row ^ suspects[plane * kTile + i];
                    }
                }
#pragma GCC unroll 4
                for (int i = 0; i < kGroup; ++i) {
                    counts[i] += set_bits<counting>(differing[i]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < kGroup; ++i) {
                sums[i] += sum_of_bytes<counting>(counts[i]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i) {
            store(differences + i * kMostRows + lane, sums[i]);
        }
    }
}

template <Counting counting>
WM_INLINE void compare_tiles(const uint32_t* suspects, const uint32_t* tiles, int64_t count, Layout layout,
                             int32_t* differences) {
    for (int64_t tile = 0; tile < count; ++tile) {
        compare_tile<counting>(suspects, tiles + tile * layout.tile(), layout, differences + tile * kTile);
    }
}

#if defined(WM_POPCOUNT_BY_ASSEMBLY)
__attribute__((target("arch=x86-64-v4,avx512vpopcntdq"))) void compare_by_instruction(const uint32_t* suspects,
                                                                                      const uint32_t* tiles,
                                                                                      int64_t count, Layout layout,
                                                                                      int32_t* differences) {
    compare_tiles<Counting::kInstruction>(suspects, tiles, count, layout, differences);
}

__attribute__((target("arch=x86-64-v3"))) void compare_by_shuffle(const uint32_t* suspects, const uint32_t* tiles,
                                                                  int64_t count, Layout layout, int32_t* differences) {
    compare_tiles<Counting::kShuffle>(suspects, tiles, count, layout, differences);
}
#endif

// Differing symbols of kGroup suspects, neighbours in their tile, and `count` tiles of rows, for suspect i at
// differences + i * kMostRows.
void compare(const uint32_t* suspects, const uint32_t* tiles, int64_t count, Layout layout, int32_t* differences) {
#if defined(WM_POPCOUNT_BY_ASSEMBLY)
    if (level() == Level::kV4 && __builtin_cpu_supports("avx512vpopcntdq")) {
        return compare_by_instruction(suspects, tiles, count, layout, differences);
    }
    if (level() >= Level::kV3) {
        return compare_by_shuffle(suspects, tiles, count, layout, differences);
    }
#endif
    compare_tiles<Counting::kBitTricks>(suspects, tiles, count, layout, differences);
}

// Up to sixteen rows of labels to one tile; a negative label becomes `abstains`, a code that the other side lacks.
struct PackLabels {
    template <Level level, typename Label>
    WM_INLINE void run(const Label* labels, int64_t rows, int64_t places, uint32_t abstains, Layout layout,
                       uint32_t* tile) {
        constexpr int lanes = lanes_of(level);
        typedef Words32<lanes> Words;
        uint32_t codes[32][kTile] = {};
        for (int64_t w = 0; w < layout.words; ++w) {
            const int64_t here = std::min<int64_t>(32, places - 32 * w);
            for (int64_t row = 0; row < rows; ++row) {
                const Label* source = labels + row * places + 32 * w;
                for (int64_t i = 0; i < here; ++i) {
                    codes[i][row] = source[i] < 0 ? abstains : static_cast<uint32_t>(source[i]);
                }
            }
            for (int64_t plane = 0; plane < layout.planes; ++plane) {
                const int down = static_cast<int>(plane);
                for (int64_t lane = 0; lane < kTile; lane += lanes) {
                    Words bits = {};
                    for (int64_t i = here - 1; i >= 0; --i) {
                        bits = bits + bits + ((load<Words>(codes[i] + lane) >> down) & 1u);
                    }
                    store(tile + (w * layout.planes + plane) * kTile + lane, bits);
                }
            }
        }
    }
};

template <typename Label>
struct LabelRows {
    const Label* labels;
    int64_t rows, places;
    uint32_t abstains;

    void pack(int64_t first, Layout layout, uint32_t* tile) const {
        dispatch<PackLabels>(labels + first * places, std::min(kTile, rows - first), places, abstains, layout, tile);
    }
};

struct BitRows {
    PackedBits bits;
    int64_t rows;

    explicit BitRows(const PackedBits& packed) : bits(packed), rows(packed.rows) {}

    void pack(int64_t first, Layout layout, uint32_t* tile) const {
        const int64_t width = (bits.total + 7) / 8, count = std::min(kTile, rows - first), whole = width / 4;
        const uint8_t* source = bits.bytes + first * width;
        if (count < kTile) {
            std::fill(tile, tile + layout.tile(), 0u);
        }
        for (int64_t w = 0; w < whole; ++w) {
            for (int64_t row = 0; row < count; ++row) {
                tile[w * kTile + row] = word(source + row * width + 4 * w);
            }
        }
        for (int64_t row = 0; whole < layout.words && row < count; ++row) {
            uint8_t last[4] = {};
            std::copy(source + row * width + 4 * whole, source + (row + 1) * width, last);
            tile[whole * kTile + row] = word(last);
        }
    }

private:
    WM_INLINE uint32_t word(const uint8_t* bytes) {
        uint32_t value;
        std::memcpy(&value, bytes, sizeof value);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        value = __builtin_bswap32(value);
#endif
        return value;
    }
};

constexpr int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

template <typename Rows>
std::vector<uint32_t> packed(const Rows& rows, Layout layout) {
    const int64_t tiles = parts_of(rows.rows, kTile);
    std::vector<uint32_t> result(tiles * layout.tile());
    const int64_t step = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, layout.tile()));
    parallel_for(parts_of(tiles, step), [&](int64_t task) {
        for (int64_t tile = task * step; tile < std::min((task + 1) * step, tiles); ++tile) {
            rows.pack(tile * kTile, layout, result.data() + tile * layout.tile());
        }
    });
    return result;
}

// Compares suspects [from, to) with registry rows [first, end), part by part, and hands each suspect's differences
// over: consume(suspect, first row, rows, differences).
template <typename Rows, typename Consume>
void compare_part(const std::vector<uint32_t>& suspects, int64_t from, int64_t to, const Rows& registry, int64_t first,
                  int64_t end, int64_t rows_a_part, Layout layout, const Consume& consume) {
    std::vector<uint32_t> tiles(rows_a_part / kTile * layout.tile());
    std::vector<int32_t> differences(kGroup * kMostRows);
    for (int64_t row = first; row < end; row += rows_a_part) {
        const int64_t rows = std::min(rows_a_part, end - row), count = parts_of(rows, kTile);
        for (int64_t tile = 0; tile < count; ++tile) {
            registry.pack(row + tile * kTile, layout, tiles.data() + tile * layout.tile());
        }
        for (int64_t suspect = from; suspect < to; suspect += kGroup) {
            compare(suspects.data() + suspect / kTile * layout.tile() + suspect % kTile, tiles.data(), count, layout,
                    differences.data());
            for (int64_t i = 0; i < std::min(kGroup, to - suspect); ++i) {
                consume(suspect + i, row, rows, differences.data() + i * kMostRows);
            }
        }
    }
}

int64_t rows_a_part(Layout layout) {
    const int64_t fitting = kChunk / std::max<int64_t>(1, 4 * layout.words * layout.planes) / kTile * kTile;
    return std::min(std::max(fitting, kTile), kMostRows);
}

// Suspects a task: all of them, unless the registry has too few parts to keep the threads busy.
int64_t suspects_a_task(int64_t suspects, int64_t parts) {
    const int64_t splits = std::max<int64_t>(1, 8 / std::max<int64_t>(1, parts));
    return std::max(kTile, parts_of(parts_of(suspects, splits), kTile) * kTile);
}

template <typename Rows>
void count_matches(const Rows& suspects, const Rows& registry, int64_t places, Layout layout, int32_t* counts) {
    if (suspects.rows == 0 || registry.rows == 0) {
        return;
    }
    const std::vector<uint32_t> left = packed(suspects, layout);
    const int64_t step = rows_a_part(layout), parts = parts_of(registry.rows, step);
    const int64_t batch = suspects_a_task(suspects.rows, parts);
    parallel_for(parts_of(suspects.rows, batch) * parts, [&](int64_t task) {
        const int64_t from = task / parts * batch, first = task % parts * step;
        const int32_t all = static_cast<int32_t>(places);
        compare_part(left, from, std::min(from + batch, suspects.rows), registry, first,
                     std::min(first + step, registry.rows), step, layout,
                     [&](int64_t suspect, int64_t row, int64_t rows, const int32_t* differences) {
                         int32_t* target = counts + suspect * registry.rows + row;
                         for (int64_t k = 0; k < rows; ++k) {
                             target[k] = all - differences[k];
                         }
                     });
    });
}

// The fewest differences seen by one suspect, the lowest row first among equals: the worst of them is on top.
class Best {
public:
    void expect(int64_t count) { wanted_ = static_cast<size_t>(count); }

    int32_t worst() const {
        return found_.size() < wanted_ ? std::numeric_limits<int32_t>::max() : found_.front().first;
    }

    // Rows come in rising order: one that only ties with the worst is no better.
    void offer(int32_t differences, int64_t row) {
        if (differences >= worst()) {
            return;
        }
        if (found_.size() == wanted_) {
            std::pop_heap(found_.begin(), found_.end());
            found_.pop_back();
        }
        found_.emplace_back(differences, row);
        std::push_heap(found_.begin(), found_.end());
    }

    const std::vector<std::pair<int32_t, int64_t>>& found() const { return found_; }

private:
    size_t wanted_ = 0;
    std::vector<std::pair<int32_t, int64_t>> found_;
};

struct Smallest64 {
    template <Level>
    WM_INLINE int32_t run(const int32_t* differences) {
        int32_t smallest = differences[0];
        for (int i = 1; i < 64; ++i) {
            smallest = differences[i] < smallest ? differences[i] : smallest;
        }
        return smallest;
    }
};

}  // namespace

template <typename Label>
void label_matches(const Label* predicted, int64_t suspects, const Label* expected, int64_t sets, int64_t places,
                   int64_t largest, int32_t* counts) {
    const uint32_t abstains = static_cast<uint32_t>(largest + 1);  // and one more for the other side
    Layout layout{parts_of(places, 32), 1};
    while (((abstains + 1) >> layout.planes) != 0) {
        ++layout.planes;
    }
    count_matches(LabelRows<Label>{predicted, suspects, places, abstains},
                  LabelRows<Label>{expected, sets, places, abstains + 1}, places, layout, counts);
}

template void label_matches(const int32_t*, int64_t, const int32_t*, int64_t, int64_t, int64_t, int32_t*);
template void label_matches(const int64_t*, int64_t, const int64_t*, int64_t, int64_t, int64_t, int32_t*);

void bit_matches(const PackedBits& messages, const PackedBits& registry, int32_t* counts) {
    count_matches(BitRows(messages), BitRows(registry), messages.total, Layout{parts_of(messages.total, 32), 1},
                  counts);
}

void best_bit_matches(const PackedBits& messages, const PackedBits& registry, int64_t best, int32_t* counts,
                      int64_t* indices) {
    const Layout layout{parts_of(messages.total, 32), 1};
    const std::vector<uint32_t> left = packed(BitRows(messages), layout);
    // Parts of the registry have lists of their own, merged at the end: few enough that the lists stay small.
    const int64_t step = rows_a_part(layout);
    const int64_t batch = std::min<int64_t>(suspects_a_task(messages.rows, 1), 256);
    const int64_t batches = parts_of(messages.rows, batch);
    const int64_t wanted_parts = std::max<int64_t>(1, 8 / std::max<int64_t>(1, batches));
    const int64_t rows = parts_of(std::max(parts_of(registry.rows, wanted_parts), 16 * best), step) * step;
    const int64_t parts = parts_of(registry.rows, rows);
    std::vector<Best> found(messages.rows * parts);
    parallel_for(batches * parts, [&](int64_t task) {
        const int64_t part = task % parts, from = task / parts * batch, first = part * rows;
        const int64_t to = std::min(from + batch, messages.rows);
        for (int64_t message = from; message < to; ++message) {
            found[message * parts + part].expect(best);
        }
        compare_part(left, from, to, BitRows(registry), first, std::min(first + rows, registry.rows), step, layout,
                     [&](int64_t message, int64_t row, int64_t count, const int32_t* differences) {
                         Best& list = found[message * parts + part];
                         int64_t k = 0;
                         for (; k + 64 <= count; k += 64) {
                             if (dispatch<Smallest64>(differences + k) < list.worst()) {
                                 for (int64_t i = k; i < k + 64; ++i) {
                                     list.offer(differences[i], row + i);
                                 }
                             }
                         }
                         for (; k < count; ++k) {
                             list.offer(differences[k], row + k);
                         }
                     });
    });
    parallel_for(messages.rows, [&](int64_t message) {
        std::vector<std::pair<int32_t, int64_t>> all;
        for (int64_t part = 0; part < parts; ++part) {
            const auto& some = found[message * parts + part].found();
            all.insert(all.end(), some.begin(), some.end());
        }
        std::partial_sort(all.begin(), all.begin() + best, all.end());
        for (int64_t i = 0; i < best; ++i) {
            counts[message * best + i] = static_cast<int32_t>(messages.total) - all[i].first;
            indices[message * best + i] = all[i].second;
        }
    });
}

}  // namespace wmengine
