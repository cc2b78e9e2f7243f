// A pool that sleeps on condition variables and never spins: the machine may have other work to do.
//
// One op at a time has the pool. A second caller finds it busy and does its own work alone, which gives the same
// numbers. A forked child has none of its parent's threads and starts a pool of its own.
#include "thread_pool.h"

#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace exl2 {
namespace {

// Below this, waking a thread (some 10 microseconds) costs more than it saves.
constexpr int64_t kSmallWork = 1 << 17;

class Pool {
public:
    explicit Pool(int helpers) {
        for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { work(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    int helpers() const { return static_cast<int>(threads_.size()); }

    bool run(int64_t count, Task task, const void* context) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = task;
            context_ = context;
            count_ = count;
            next_.store(0);
            failed_.store(false);
            active_ = helpers();
            ++generation_;
        }
        wake_.notify_all();
        take_tasks();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return active_ == 0; });
        return !failed_.load();
    }

private:
    void take_tasks() {
        for (int64_t index; (index = next_.fetch_add(1)) < count_;) {
            if (!task_(context_, index)) failed_.store(true);
        }
    }

    void work() {
        uint64_t seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
                if (stop_) return;
                seen = generation_;
            }
            take_tasks();
            {
                std::lock_guard<std::mutex> lock(mutex_);
                if (--active_ > 0) continue;
            }
            done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    Task task_ = nullptr;
    const void* context_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<bool> failed_{false};
    int active_ = 0;
    uint64_t generation_ = 0;
    bool stop_ = false;
};

Pool* pool = nullptr;                    // held by whoever has set `busy`
std::atomic_flag busy = ATOMIC_FLAG_INIT;
std::atomic<int> wanted_threads{1};

void forget_pool_after_fork() {
    pool = nullptr;  // its threads are not in this process; freeing it would wait for them
    busy.clear();
}

// The pool with the threads that are wanted now, or nullptr if there is to be one thread or no more can be had.
Pool* ready_pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_after_fork);
    (void)registered;
    const int helpers = wanted_threads.load() - 1;
    if (pool != nullptr && pool->helpers() != helpers) {
        delete pool;
        pool = nullptr;
    }
    if (pool == nullptr && helpers > 0) {
        try {
            pool = new Pool(helpers);
        } catch (...) {
            wanted_threads.store(1);  // the system gives no more threads: go on with the caller's
        }
    }
    return pool;
}

bool run_here(int64_t count, Task task, const void* context) {
    bool good = true;
    for (int64_t index = 0; index < count; ++index) good &= task(context, index);
    return good;
}

struct Memory {
    float* data = nullptr;
    size_t size = 0;
    ~Memory() { free(data); }
};

thread_local Memory memory[2];

}  // namespace

bool run_tasks(int64_t count, int64_t cost, Task task, const void* context) {
    if (count <= 1 || cost < kSmallWork || wanted_threads.load() == 1 || busy.test_and_set()) {
        return run_here(count, task, context);
    }
    Pool* ready = ready_pool();
    const bool good = ready == nullptr ? run_here(count, task, context) : ready->run(count, task, context);
    busy.clear();
    return good;
}

float* scratch(int slot, size_t n_floats) {
    Memory& held = memory[slot];
    if (held.size < n_floats) {
        free(held.data);
        held.size = 0;
        const size_t n_bytes = (n_floats * sizeof(float) + 63) / 64 * 64;
        held.data = static_cast<float*>(aligned_alloc(64, n_bytes));
        if (held.data != nullptr) held.size = n_floats;
    }
    return held.data;
}

void set_num_threads(int count) { wanted_threads.store(count < 1 ? 1 : count); }

}  // namespace exl2
