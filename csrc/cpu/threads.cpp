#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace wmengine {
namespace {

// A woken thread may be put on its waker's processor although another is idle (seen on virtual machines), and then both
// take turns on it. It moves away by itself, and stays away until it meets its caller again.
void leave_processor(int processor, const cpu_set_t& allowed) {
    if (processor < 0 || sched_getcpu() != processor) {
        return;
    }
    cpu_set_t others = allowed;
    CPU_CLR(processor, &others);
    if (CPU_COUNT(&others) > 0) {
        sched_setaffinity(0, sizeof others, &others);
    }
}

class Pool {
public:
    void run(int64_t tasks, const std::function<void(int64_t)>& task, int threads) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                while (static_cast<int>(workers_.size()) < threads - 1) {
                    workers_.emplace_back([this] { work(); });
                }
            } catch (const std::system_error&) {
                // No further thread is to be had (a limit on memory or processes): the ones there are will do.
            }
            failure_ = nullptr;
            task_ = &task;
            tasks_ = tasks;
            next_.store(0, std::memory_order_relaxed);
            seats_ = threads - 1;
            caller_processor_ = sched_getcpu();
            ++generation_;
        }
        wake_.notify_all();
        drain(task, tasks);
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;  // a worker that wakes late finds no seat and never sees this call's task
        done_.wait(lock, [this] { return busy_ == 0; });
        task_ = nullptr;
        if (failure_ != nullptr) {
            std::rethrow_exception(failure_);
        }
    }

    std::mutex& one_call_at_a_time() { return call_; }

private:
    void drain(const std::function<void(int64_t)>& task, int64_t tasks) {
        try {
            for (int64_t i = next_.fetch_add(1); i < tasks; i = next_.fetch_add(1)) {
                task(i);
            }
        } catch (...) {  // out of memory, say: the caller hears of it once nobody uses the task any more
            next_.store(tasks);
            std::lock_guard<std::mutex> lock(mutex_);
            failure_ = std::current_exception();
        }
    }

    void work() {
        uint64_t seen = 0;
        // Where the process may run: the thread that happened to start this one may be bound to a single processor.
        cpu_set_t allowed;
        CPU_ZERO(&allowed);
        sched_getaffinity(getpid(), sizeof allowed, &allowed);
        sched_setaffinity(0, sizeof allowed, &allowed);
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (seats_ == 0) {
                continue;
            }
            --seats_;
            ++busy_;
            const std::function<void(int64_t)>& task = *task_;
            const int64_t tasks = tasks_;
            const int caller_processor = caller_processor_;
            lock.unlock();
            leave_processor(caller_processor, allowed);
            drain(task, tasks);
            lock.lock();
            if (--busy_ == 0) {
                done_.notify_one();
            }
        }
    }

    std::mutex call_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(int64_t)>* task_ = nullptr;
    int64_t tasks_ = 0;
    std::atomic<int64_t> next_{0};
    uint64_t generation_ = 0;
    std::exception_ptr failure_;
    int seats_ = 0, busy_ = 0, caller_processor_ = -1;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them, so it starts a pool anew.
Pool* pool = nullptr;
std::mutex* pool_mutex = nullptr;
std::atomic<int> configured{0};

void forget_pool_in_child() {
    pool = nullptr;
    pool_mutex = new std::mutex;
}

const bool prepared = [] {
    pool_mutex = new std::mutex;
    pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    return true;
}();

Pool& the_pool() {
    std::lock_guard<std::mutex> lock(*pool_mutex);
    if (pool == nullptr) {
        pool = new Pool;
    }
    return *pool;
}

int available_processors() {
    cpu_set_t set;
    if (sched_getaffinity(getpid(), sizeof set, &set) == 0) {
        return std::max(1, CPU_COUNT(&set));
    }
    return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

int thread_count() {
    int count = configured.load(std::memory_order_relaxed);
    if (count == 0) {
        count = available_processors();
        configured.store(count, std::memory_order_relaxed);
    }
    return count;
}

void set_thread_count(int count) { configured.store(count, std::memory_order_relaxed); }

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& task) {
    const int threads = static_cast<int>(std::min<int64_t>(thread_count(), tasks));
    if (threads > 1) {
        Pool& shared = the_pool();
        std::unique_lock<std::mutex> call(shared.one_call_at_a_time(), std::try_to_lock);
        if (call.owns_lock()) {
            shared.run(tasks, task, threads);
            return;
        }
    }
    for (int64_t i = 0; i < tasks; ++i) {
        task(i);
    }
}

}  // namespace wmengine
