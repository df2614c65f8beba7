// A small pool of our own: it sleeps between calls, so it never spins beside torch's or ONNX Runtime's threads.
#pragma once

#include <cstdint>
#include <functional>

namespace wmengine {

// Threads a call may use, the caller's own included; at first the processors this process may run on.
int thread_count();
void set_thread_count(int count);

// Runs task(0) … task(tasks - 1), each once, in no particular order, and returns when all are done. Each must own what
// it writes: results then never depend on the number of threads. What a task throws is thrown here, once none is
// running. A call from inside a task, or from a second thread while the pool is busy, runs its tasks by itself.
void parallel_for(int64_t tasks, const std::function<void(int64_t)>& task);

}  // namespace wmengine
