// Equal bits of every message with every registered one, as counts or as the best of each message.
//
// A thread owns one registered message and meets several messages with it: the registry is read once for all of them,
// in pieces of 16 bytes where its rows are that even, and the messages' words are the same address for a whole warp.
//
// The best: a match is one 64-bit key, count above and the index's complement below, so the greater key is the better
// match, equal counts go to the lower index, and no two keys are equal: whatever order threads come in, the greatest
// keys are the same. A thread block keeps a message's candidates in shared memory; one that beats the worst of the best
// so far is appended, and when the buffer fills up it is sorted and cut. A second kernel does the same with the lists
// of all thread blocks.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace wmengine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 3;     // thread blocks that a multiprocessor runs at a time
constexpr int kMessages = 8;     // messages that a thread meets with a registered one when all counts are wanted
constexpr int kAhead = 8;        // keys that a thread of the merge has on their way
constexpr int kIndexBits = 40;   // of a key; the count has the other 24
constexpr int kMostBest = 1024;  // the largest buffer holds twice as many keys
constexpr int64_t kLeastRegistry = 2048;  // registered messages below which a list of its own is not worth merging

// The 32 bits that begin at byte 4 * word of a row, without those from `total` on; a row is ceil(total / 8) bytes.
__device__ __forceinline__ uint32_t used_bits(int word, int total) {
    const int left = total - word * 32;
    return left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1u;
}

template <typename Piece>
struct Words {
    static constexpr int kCount = sizeof(Piece) < 4 ? 1 : sizeof(Piece) / 4;
    uint32_t values[kCount];

    // Piece number `piece` of a row: 16 or 4 bytes in one load, or what is left of 4 bytes, one by one.
    __device__ __forceinline__ Words(const uint8_t* __restrict__ row, int piece, int bytes) {
        if constexpr (sizeof(Piece) == 16) {
            const uint4 line = reinterpret_cast<const uint4*>(row)[piece];
            values[0] = line.x, values[1] = line.y, values[2] = line.z, values[3] = line.w;
        } else if constexpr (sizeof(Piece) == 4) {
            values[0] = reinterpret_cast<const uint32_t*>(row)[piece];
        } else {
            values[0] = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = piece * 4 + i;
                values[0] |= (at < bytes ? uint32_t{row[at]} : 0u) << (8 * i);
            }
        }
    }
};

// Different bits of one registered row with each of `present` <= kCount messages, one after the other in memory.
//
// Bits are counted at a quarter of the pace of other operations, so what is left over of two words and of all before
// them, and what is carried, stand for the words: half as many are counted.
template <typename Piece, bool kAll, int kCount>
__device__ __forceinline__ void differences(const uint8_t* __restrict__ messages, int present,
                                            const uint8_t* __restrict__ row, int bytes, int total,
                                            int (&different)[kCount]) {
    constexpr int kWords = Words<Piece>::kCount;
    const int pieces = (bytes + 4 * kWords - 1) / (4 * kWords);
    uint32_t over[kCount] = {};
    int pairs[kCount] = {};
    Words<Piece> next(row, 0, bytes);
    for (int piece = 0; piece < pieces; ++piece) {
        const Words<Piece> registered = next;
        if (piece + 1 < pieces) {  // on its way while this one is counted
            next = Words<Piece>(row, piece + 1, bytes);
        }
        uint32_t used[kWords];
#pragma unroll
        for (int j = 0; j < kWords; ++j) {
            used[j] = used_bits(piece * kWords + j, total);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (kAll || i < present) {
                const Words<Piece> message(messages + i * bytes, piece, bytes);
                const auto bits = [&](int j) { return (registered.values[j] ^ message.values[j]) & used[j]; };
#pragma unroll
                for (int j = 0; j < kWords; j += 2) {
                    const uint32_t a = bits(j), b = j + 1 < kWords ? bits(j + 1) : 0;
                    pairs[i] += __popc((a & b) | (over[i] & (a | b)));
                    over[i] ^= a ^ b;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        different[i] = 2 * pairs[i] + __popc(over[i]);
    }
}

template <typename Piece, int kCount>
__device__ __forceinline__ void differences(const uint8_t* __restrict__ messages, int present,
                                            const uint8_t* __restrict__ row, int bytes, int total,
                                            int (&different)[kCount]) {
    if (present == kCount) {
        differences<Piece, true>(messages, present, row, bytes, total, different);
    } else {
        differences<Piece, false>(messages, present, row, bytes, total, different);
    }
}

template <typename Piece>
__global__ void __launch_bounds__(kThreads, kResident)
    counts_kernel(const uint8_t* __restrict__ messages, int64_t suspects, const uint8_t* __restrict__ registry,
                  int64_t registered, int total, int32_t* __restrict__ counts) {
    const int bytes = (total + 7) / 8;
    const int64_t tiles = (registered + kThreads - 1) / kThreads;
    const int64_t items = tiles * ((suspects + kMessages - 1) / kMessages);
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int64_t index = item % tiles * kThreads + threadIdx.x, first = item / tiles * kMessages;
        if (index < registered) {
            const int present = static_cast<int>(min(int64_t{kMessages}, suspects - first));
            int different[kMessages];
            differences<Piece>(messages + first * bytes, present, registry + index * bytes, bytes, total, different);
#pragma unroll
            for (int i = 0; i < kMessages; ++i) {
                if (i < present) {
                    counts[(first + i) * registered + index] = total - different[i];
                }
            }
        }
    }
}

// The greatest keys of one message, in shared memory; 0 is no key. kTeam threads sort them, a warp or a whole block.
template <int kCapacity, int kTeam>
struct Selection {
    uint64_t keys[kCapacity];
    uint64_t least;  // a key that does not exceed it is not among the best
    int count;

    __device__ __forceinline__ void clear() {
        if (threadIdx.x == 0) {
            least = 0;
            count = 0;
        }
    }

    __device__ __forceinline__ void offer(uint64_t key) {
        if (key > least) {
            keys[atomicAdd(&count, 1)] = key;
        }
    }

    // Sorts the keys, greatest first, and keeps `best`; every thread of the team calls it, behind a barrier.
    __device__ __forceinline__ void cut(int best) {
        const int member = threadIdx.x % kTeam, held = count;
        int sorted = 2;
        while (sorted < max(held, best)) {
            sorted *= 2;
        }
        for (int i = held + member; i < sorted; i += kTeam) {
            keys[i] = 0;
        }
        synchronize(true);
        for (int size = 2; size <= sorted; size *= 2) {
            for (int distance = size / 2; distance > 0; distance /= 2) {
#pragma unroll 2
                for (int pair = member; pair < sorted / 2; pair += kTeam) {
                    const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
                    const bool descending = (low & size) == 0;
                    const uint64_t a = keys[low], b = keys[high];
                    if ((a < b) == descending) {
                        keys[low] = b;
                        keys[high] = a;
                    }
                }
                // The 32 pairs of a warp are the same 64 keys at all distances up to 32.
                synchronize(distance > kLanes || (distance == 1 && size > kLanes));
            }
        }
        if (member == 0) {
            count = min(held, best);
            least = keys[best - 1];
        }
        synchronize(true);
    }

    // Room for another round in which every thread offers one key at most, and a first `least` as soon as there can be
    // one; call it between two barriers.
    __device__ __forceinline__ void make_room(int best) {
        if (count + (least == 0) > kCapacity - kThreads) {
            cut(best);
        }
    }

private:
    __device__ __forceinline__ static void synchronize(bool across_warps) {
        if (kTeam > kLanes && across_warps) {
            __syncthreads();
        } else {
            __syncwarp();
        }
    }
};

// lists[suspects, groups, best]: the greatest keys of each message in each group's part of the registry.
template <typename Piece, int kCount, int kCapacity, int kTeam>
__global__ void __launch_bounds__(kThreads, kResident)
    best_kernel(const uint8_t* __restrict__ messages, int64_t suspects, const uint8_t* __restrict__ registry,
                int64_t registered, int total, int best, int64_t groups, uint64_t* __restrict__ lists) {
    __shared__ Selection<kCapacity, kTeam> selections[kCount];
    const int team = threadIdx.x / kTeam;
    constexpr int kTeams = kThreads / kTeam, kTogether = kCount < 4 ? kCount : 4;
    const int bytes = (total + 7) / 8;
    const int64_t items = (suspects + kCount - 1) / kCount * groups;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int64_t first = item / groups * kCount, group = item % groups;
        const int64_t begin = registered * group / groups, end = registered * (group + 1) / groups;
        const int present = static_cast<int>(min(int64_t{kCount}, suspects - first));
        for (int i = 0; i < present; ++i) {
            selections[i].clear();
        }
        __syncthreads();
        for (int64_t round = begin; round < end; round += kThreads) {
            const int64_t index = round + threadIdx.x;
            if (index < end) {
                const uint64_t below = (uint64_t{1} << kIndexBits) - 1 - static_cast<uint64_t>(index);
#pragma unroll 1
                for (int part = 0; part < present; part += kTogether) {
                    int different[kTogether];
                    differences<Piece, false>(messages + (first + part) * bytes, min(present - part, kTogether),
                                              registry + index * bytes, bytes, total, different);
#pragma unroll
                    for (int i = 0; i < kTogether; ++i) {
                        if (part + i < present) {
                            selections[part + i].offer(static_cast<uint64_t>(total - different[i]) << kIndexBits |
                                                       below);
                        }
                    }
                }
            }
            __syncthreads();
            for (int i = team; i < present; i += kTeams) {
                selections[i].make_room(best);
            }
            __syncthreads();
        }
        for (int i = team; i < present; i += kTeams) {
            selections[i].cut(best);
            uint64_t* list = lists + ((first + i) * groups + group) * best;
            for (int place = threadIdx.x % kTeam; place < best; place += kTeam) {
                list[place] = selections[i].keys[place];
            }
        }
        __syncthreads();
    }
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const uint64_t* __restrict__ lists, int64_t suspects, int64_t groups, int best,
                 int32_t* __restrict__ counts, int64_t* __restrict__ indices) {
    __shared__ Selection<kCapacity, kThreads> selection;
    const int64_t keys = groups * best;
    for (int64_t suspect = blockIdx.x; suspect < suspects; suspect += gridDim.x) {
        selection.clear();
        __syncthreads();
        for (int64_t first = threadIdx.x; first - threadIdx.x < keys; first += kAhead * kThreads) {
            uint64_t ahead[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int64_t at = first + i * kThreads;
                ahead[i] = at < keys ? lists[suspect * keys + at] : 0;
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                selection.offer(ahead[i]);
                __syncthreads();
                selection.make_room(best);
                __syncthreads();
            }
        }
        selection.cut(best);
        for (int place = threadIdx.x; place < best; place += kThreads) {
            const uint64_t key = selection.keys[place], mask = (uint64_t{1} << kIndexBits) - 1;
            counts[suspect * best + place] = static_cast<int32_t>(key >> kIndexBits);
            indices[suspect * best + place] = static_cast<int64_t>(mask - (key & mask));
        }
        __syncthreads();
    }
}

// Calls body with a value of the widest type in which rows of so many bytes can be read at both addresses.
template <typename Body>
void with_piece(const void* a, const void* b, int64_t bytes, Body body) {
    const uintptr_t even = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | bytes;
    if (even % 16 == 0) {
        body(uint4{});
    } else if (even % 4 == 0) {
        body(uint32_t{});
    } else {
        body(uint8_t{});
    }
}

void check_sizes(int64_t suspects, int64_t registered, int64_t total) {
    if (suspects < 0 || registered < 0 || registered >= (int64_t{1} << kIndexBits)) {
        throw std::invalid_argument("there are " + std::to_string(suspects) + " messages and " +
                                    std::to_string(registered) +
                                    " in the registry: sizes must not be negative and the registry below 2^40");
    }
    if (total < 1 || total >= (int64_t{1} << (63 - kIndexBits))) {
        throw std::invalid_argument("total is " + std::to_string(total) + ": it must lie between 1 and 2^23 - 1 bits");
    }
}

void check_best(int64_t registered, int64_t best) {
    if (best < 1 || best > kMostBest || best > registered) {
        throw std::invalid_argument("best is " + std::to_string(best) + ": it must lie between 1 and " +
                                    std::to_string(std::min<int64_t>(kMostBest, registered)) + " for a registry of " +
                                    std::to_string(registered));
    }
}

// A list of 256 keys or fewer leaves room for a round in a buffer of 512, so that more messages fit beside each other.
constexpr int kFewBest = 256, kFewMessages = 8, kManyMessages = 2;

int64_t groups_of(int64_t suspects, int64_t registered, int64_t best) {
    const int64_t tiles = ceil_div(suspects, best <= kFewBest ? kFewMessages : kManyMessages);
    const int64_t wanted = ceil_div(kResident * kMultiprocessors, std::max<int64_t>(tiles, 1));
    return std::max<int64_t>(std::min(wanted, registered / std::max(kLeastRegistry, 8 * best)), 1);
}

}  // namespace

void bit_matches(Place place, const uint8_t* messages, int64_t suspects, const uint8_t* registry, int64_t registered,
                 int64_t total, int32_t* counts) {
    check_sizes(suspects, registered, total);
    if (suspects == 0 || registered == 0) {
        return;
    }
    const DeviceGuard guard(place.device, "bit_matches");
    const cudaStream_t stream = stream_of(place);
    const int64_t items = ceil_div(registered, kThreads) * ceil_div(suspects, kMessages);
    with_piece(messages, registry, ceil_div(total, 8), [&](auto piece) {
        counts_kernel<decltype(piece)><<<grid_for(items, 1), kThreads, 0, stream>>>(
            messages, suspects, registry, registered, static_cast<int>(total), counts);
    });
    check(cudaGetLastError(), "bit_matches");
}

int64_t best_bit_matches_workspace(int64_t suspects, int64_t registered, int64_t best) {
    check_sizes(suspects, registered, 1);
    check_best(registered, best);
    return suspects * groups_of(suspects, registered, best) * best;
}

void best_bit_matches(Place place, const uint8_t* messages, int64_t suspects, const uint8_t* registry,
                      int64_t registered, int64_t total, int64_t best, uint64_t* workspace, int32_t* counts,
                      int64_t* indices) {
    check_sizes(suspects, registered, total);
    check_best(registered, best);
    if (suspects == 0) {
        return;
    }
    const DeviceGuard guard(place.device, "best_bit_matches");
    const cudaStream_t stream = stream_of(place);
    const int64_t groups = groups_of(suspects, registered, best);
    const int bits = static_cast<int>(total), wanted = static_cast<int>(best);
    with_piece(messages, registry, ceil_div(total, 8), [&](auto piece) {
        using Piece = decltype(piece);
        if (best <= kFewBest) {
            best_kernel<Piece, kFewMessages, 512, kLanes>
                <<<grid_for(ceil_div(suspects, kFewMessages) * groups, 1), kThreads, 0, stream>>>(
                    messages, suspects, registry, registered, bits, wanted, groups, workspace);
        } else {
            best_kernel<Piece, kManyMessages, 2 * kMostBest, kThreads>
                <<<grid_for(ceil_div(suspects, kManyMessages) * groups, 1), kThreads, 0, stream>>>(
                    messages, suspects, registry, registered, bits, wanted, groups, workspace);
        }
    });
    check(cudaGetLastError(), "best_bit_matches");
    if (best <= kFewBest) {
        merge_kernel<512>
            <<<grid_for(suspects, 1), kThreads, 0, stream>>>(workspace, suspects, groups, wanted, counts, indices);
    } else {
        merge_kernel<2 * kMostBest>
            <<<grid_for(suspects, 1), kThreads, 0, stream>>>(workspace, suspects, groups, wanted, counts, indices);
    }
    check(cudaGetLastError(), "best_bit_matches");
}

}  // namespace wmengine::cuda
