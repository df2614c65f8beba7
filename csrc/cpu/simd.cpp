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
    if (__builtin_cpu_supports("x86-64-v4")) {
        return Level::kV4;
    }
    if (__builtin_cpu_supports("x86-64-v3")) {
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
