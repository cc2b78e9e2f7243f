// A pool that sleeps on condition variables between ops: the machine may have other work to do. Only within a Region, a run
// of ops that lasts milliseconds, do its threads spin.
//
// One caller at a time has the pool. A second one finds it busy and does its own work alone, which gives the same
// numbers. A forked child has none of its parent's threads and starts a pool of its own.
#include "thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif
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
constexpr int64_t kSmallAwakeWork = 1 << 14;  // when it is awake already, about one

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until `done` holds. Spins for about a hundred microseconds, longer than the threads of an op end apart, then gives
// the processor away between looks: the system may have put the thread that is waited for on this very processor.
template <typename Done>
void spin_until(Done done) {
    constexpr int kSpins = 4096;
    for (int i = 0; !done(); ++i) {
        if (i < kSpins) pause();
        else std::this_thread::yield();
    }
}

// Keeps a helper off the processor of its caller. The system sometimes wakes both on one and, with another program on the
// next processor, leaves them there; each op then takes as long as both their shares and the waits in between.
class Elsewhere {
public:
#if defined(__linux__)
    Elsewhere() { known_ = sched_getaffinity(0, sizeof(allowed_), &allowed_) == 0; }

    static int here() { return sched_getcpu(); }

    // Move this thread if it is on `processor` and may run on others.
    void leave(int processor) {
        if (!known_ || processor < 0 || processor >= CPU_SETSIZE || sched_getcpu() != processor) return;
        cpu_set_t others = allowed_;
        CPU_CLR(static_cast<size_t>(processor), &others);
        if (CPU_COUNT(&others) > 0) sched_setaffinity(0, sizeof(others), &others);
    }

private:
    cpu_set_t allowed_;  // what this thread started with
    bool known_;
#else
    static int here() { return -1; }
    void leave(int) {}
#endif
};

class Pool {
public:
    explicit Pool(int helpers) {
        for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { work(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_.store(true);
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    int helpers() const { return static_cast<int>(threads_.size()); }

    void keep_awake(bool awake) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            awake_.store(awake);
        }
        if (awake) wake_.notify_all();
    }

    bool run(int64_t count, Task task, const void* context) {
        task_ = task;
        context_ = context;
        count_ = count;
        next_.store(0);
        failed_.store(false);
        active_.store(helpers());
        if (awake_.load()) {
            caller_.store(Elsewhere::here());
            generation_.fetch_add(1);
        } else {
            caller_.store(-1);
            {
                std::lock_guard<std::mutex> lock(mutex_);
                generation_.fetch_add(1);
            }
            wake_.notify_all();
        }
        take_tasks();
        if (awake_.load()) {
            spin_until([this] { return active_.load() == 0; });
        } else {
            std::unique_lock<std::mutex> lock(mutex_);
            done_.wait(lock, [this] { return active_.load() == 0; });
        }
        return !failed_.load();
    }

private:
    // Takes runs of neighbouring tasks, long ones first: half of this thread's share of what is left. Neighbours mostly lie
    // side by side in memory, and what was fetched ahead of one is then used for the next by the same processor; short runs
    // at the end let the threads finish together.
    void take_tasks() {
        const int64_t shares = 2 * (static_cast<int64_t>(threads_.size()) + 1);
        for (int64_t first = next_.load(); first < count_;) {
            const int64_t wanted = (count_ - first) / shares, last = first + (wanted > 1 ? wanted : 1);
            if (!next_.compare_exchange_weak(first, last)) continue;  // `first` is now what another thread left
            for (int64_t index = first; index < last; ++index) {
                if (!task_(context_, index)) failed_.store(true);
            }
            first = next_.load();
        }
    }

    // Waits for the next op; false: the pool ends.
    bool wait_for_op(uint64_t seen) {
        for (;;) {
            spin_until([&] { return generation_.load() != seen || !awake_.load() || stop_.load(); });
            if (stop_.load()) return false;
            if (generation_.load() != seen) return true;
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stop_.load() || generation_.load() != seen || awake_.load(); });
        }
    }

    void work() {
        uint64_t seen = 0;
        Elsewhere elsewhere;
        while (wait_for_op(seen)) {
            seen = generation_.load();
            elsewhere.leave(caller_.load());
            take_tasks();
            if (active_.fetch_sub(1) > 1 || awake_.load()) continue;
            // The lock makes sure that the caller is not between looking and falling asleep.
            { std::lock_guard<std::mutex> lock(mutex_); }
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
    std::atomic<bool> failed_{false}, awake_{false}, stop_{false};
    std::atomic<int> active_{0}, caller_{-1};  // caller_: the processor that the caller is on, while awake
    std::atomic<uint64_t> generation_{0};
};

Pool* pool = nullptr;                    // held by whoever has set `busy`
thread_local bool in_region = false;     // this thread has set `busy` for the length of a Region
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
    if (in_region && pool != nullptr && count > 1 && cost >= kSmallAwakeWork) return pool->run(count, task, context);
    if (in_region || count <= 1 || cost < kSmallWork || wanted_threads.load() == 1 || busy.test_and_set()) {
        return run_here(count, task, context);
    }
    Pool* ready = ready_pool();
    const bool good = ready == nullptr ? run_here(count, task, context) : ready->run(count, task, context);
    busy.clear();
    return good;
}

Region::Region() : held_(!in_region && wanted_threads.load() > 1 && !busy.test_and_set()) {
    if (!held_) return;
    in_region = true;
    if (Pool* ready = ready_pool()) ready->keep_awake(true);
}

Region::~Region() {
    if (!held_) return;
    if (pool != nullptr) pool->keep_awake(false);
    in_region = false;
    busy.clear();
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
