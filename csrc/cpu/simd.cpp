#include "simd.h"

#include <atomic>
#include <stdexcept>

namespace wmengine {
namespace {

std::atomic<Level>& chosen() {
    static std::atomic<Level> level{best_level()};
    return level;
}

}  // namespace

Level best_level() {
#if defined(WM_X86_64)
    __builtin_cpu_init();
#if defined(__clang__)  // which learnt the levels' names late; no processor has these without the rest of its level
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
#else
    const bool v3 = __builtin_cpu_supports("x86-64-v3"), v4 = __builtin_cpu_supports("x86-64-v4");
#endif
    if (v4) {
        return Level::kV4;
    }
    if (v3) {
        return Level::kV3;
    }
#endif
    return Level::kBaseline;
}

Level level() { return chosen().load(std::memory_order_relaxed); }

void set_level(Level level) {
    if (level > best_level()) {
        throw std::invalid_argument("this processor does not have that instruction set");
    }
    chosen().store(level, std::memory_order_relaxed);
}

}  // namespace wmengine
