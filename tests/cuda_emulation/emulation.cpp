// Threads of a CUDA block as fibers that take turns at barriers, in rising or, where the environment variable
// CUDA_EMULATION_BACKWARDS is set, in falling order: what both orders agree on does not rest on who comes first.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

Index threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {
namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 64 * 1024;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done;
};

struct Barrier {
    unsigned arrived = 0, turn = 0;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
const std::function<void()>* body;
Barrier block;
Barrier warps[kMostThreads / kWarp];
uint64_t exchanged[kMostThreads];

void enter() {
    (*body)();
    fibers[threadIdx.x].done = true;
    swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

void wait(Barrier& barrier, unsigned members) {
    const unsigned turn = barrier.turn;
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.turn;
    }
    while (barrier.turn == turn) {
        swapcontext(&fibers[threadIdx.x].context, &scheduler);
    }
}

// One turn of every fiber that has not ended, until all have. A turn in which nobody ends or passes a barrier is a
// deadlock: some threads wait where others never come.
void run_block(unsigned threads, bool backwards) {
    block = Barrier();
    std::fill(std::begin(warps), std::end(warps), Barrier());
    for (unsigned thread = 0; thread < threads; ++thread) {
        Fiber& fiber = fibers[thread];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    const auto progress = [&] {
        uint64_t sum = block.turn;
        for (unsigned warp = 0; warp < threads / kWarp; ++warp) {
            sum += warps[warp].turn;
        }
        return sum;
    };
    for (unsigned left = threads; left > 0;) {
        const uint64_t before = progress();
        const unsigned left_before = left;
        for (unsigned i = 0; i < threads; ++i) {
            const unsigned thread = backwards ? threads - 1 - i : i;
            if (!fibers[thread].done) {
                threadIdx.x = thread;
                swapcontext(&scheduler, &fibers[thread].context);
                left -= fibers[thread].done;
            }
        }
        if (left == left_before && progress() == before) {
            std::fprintf(stderr, "deadlock: %u threads of block %u wait at different barriers\n", left, blockIdx.x);
            std::abort();
        }
    }
}

}  // namespace

void block_barrier() { wait(block, blockDim.x); }

void warp_barrier() { wait(warps[threadIdx.x / kWarp], kWarp); }

uint64_t shuffle(uint64_t value, int source) {
    const unsigned thread = threadIdx.x, warp = thread / kWarp;
    exchanged[thread] = value;
    wait(warps[warp], kWarp);
    const uint64_t result = exchanged[warp * kWarp + source];
    wait(warps[warp], kWarp);
    return result;
}

unsigned warp_or(unsigned value) {
    const unsigned thread = threadIdx.x, warp = thread / kWarp;
    exchanged[thread] = value;
    wait(warps[warp], kWarp);
    unsigned result = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        result |= static_cast<unsigned>(exchanged[warp * kWarp + lane]);
    }
    wait(warps[warp], kWarp);
    return result;
}

void launch(unsigned grid, unsigned threads, const std::function<void()>& kernel) {
    if (grid == 0 || threads % kWarp != 0 || threads > kMostThreads) {
        std::fprintf(stderr, "no GPU takes a grid of %u blocks of %u threads\n", grid, threads);
        std::abort();
    }
    if (fibers.size() < threads) {
        fibers = std::vector<Fiber>(threads);
    }
    const bool backwards = std::getenv("CUDA_EMULATION_BACKWARDS") != nullptr;
    body = &kernel;
    gridDim = {grid};
    blockDim = {threads};
    for (blockIdx = {0}; blockIdx.x < grid; ++blockIdx.x) {
        run_block(threads, backwards);
    }
}

}  // namespace emulation
