// Threads of one CUDA block as fibers on one CPU thread, and what they wait for.
//
// Each CUDA thread has a stack of its own and runs until it meets something it must wait at: a block barrier, or an
// operation of its warp. The last thread to arrive does what is to be done for all and wakes the others. Nothing runs at
// the same time, so a block is a plain sequential program; a missing barrier shows because whoever runs first sees
// what was there before (shared memory starts as NaN), and because blocks can be run with their threads in another order.
//
//     main loop:  take the next ready thread, switch to it; it comes back when it waits or is done
//     at the end: threads that still wait will do so for ever: an error that says where they wait
//
// Errors do not unwind: the message is kept, the block is abandoned, and the launch returns the message.
#pragma once

#include <signal.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr int kBarriers = 16;              // as many as the hardware has for a block
constexpr std::size_t kStackBytes = 128 << 10;
constexpr std::size_t kCanaryBytes = 256;  // after the end of shared memory: writing there is noticed
constexpr std::size_t kStaticBytes = 64 << 10;
constexpr unsigned char kPoison = 0xFF;    // NaN as float32, float16 and bfloat16; -1 as a signed integer

#if defined(__x86_64__)
// Saves what a callee must preserve, exchanges stacks, and returns into the other one.
extern "C" void exl2_emu_switch(void** from, void* to);
asm(R"(
    .text
    .local exl2_emu_switch
    .type exl2_emu_switch, @function
exl2_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size exl2_emu_switch, .-exl2_emu_switch
)");
#endif

enum class State { ready, waits_at_barrier, waits_for_warp, done };

struct AsyncCopy {
    void* target;
    const void* source;
    int bytes;       // written
    int from_source; // of these, copied; the rest becomes 0
};

struct Thread {
    State state;
    dim3 index;
    int linear;
    const char* where_file;  // what it waits at
    int where_line;
    const void* input;       // of the warp operation it waits for
    void* output;
    unsigned wanted_mask;
    bool vote;               // of __syncthreads_or and relatives
    int vote_result;
    std::vector<AsyncCopy> copies;        // cp.async not yet carried out, oldest first
    std::vector<std::size_t> group_ends;  // number of copies at each commit
    char* stack;
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
};

struct Barrier {
    int arrived;
    const char* file;
    int line;
    int votes;
};

// One operation that lanes of a warp do together, while not all of them have come.
struct WarpOperation {
    unsigned mask;     // who takes part; 0: none in progress
    unsigned arrived;
    const void* kind;  // which operation: lanes that meet at different ones are an error
    int line;
};

struct Warp {
    WarpOperation operations[4];  // disjoint groups of lanes may be at different ones
};

struct Block {
    dim3 grid_dim, block_dim, block_index;
    int n_threads, n_done;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    std::vector<int> ready;  // a ring would do; blocks are short
    std::size_t next_ready;
    Thread* current;
    void (*body)(void*);
    void* arguments;
    char* shared;            // dynamic shared memory, then the canary, static shared memory: see SharedArray
    std::size_t shared_bytes, shared_capacity;
    char* static_shared;
    std::size_t static_used;
    std::vector<std::pair<std::size_t, std::size_t>> static_gaps;  // first and last byte of what lies between arrays
    int order;               // 0 first to last, 1 last to first, 2 shuffled
    std::uint64_t random;
    bool failed;
    char message[1024];
#if defined(__x86_64__)
    void* main_stack_pointer;
#else
    ucontext_t main_context;
#endif
};

inline Block block;
inline std::mutex launch_mutex;

inline void switch_to_main(Thread& from) {
#if defined(__x86_64__)
    exl2_emu_switch(&from.stack_pointer, block.main_stack_pointer);
#else
    swapcontext(&from.context, &block.main_context);
#endif
}

inline void switch_to(Thread& to) {
    block.current = &to;
#if defined(__x86_64__)
    exl2_emu_switch(&block.main_stack_pointer, to.stack_pointer);
#else
    swapcontext(&block.main_context, &to.context);
#endif
}

// Ends the launch with this message. Does not return.
[[noreturn]] inline void fail(const char* format, ...) {
    if (!block.failed) {
        const Thread& at = *block.current;
        const int used = std::snprintf(block.message, sizeof block.message, "block (%u, %u, %u), thread (%u, %u, %u): ",
                                       block.block_index.x, block.block_index.y, block.block_index.z, at.index.x,
                                       at.index.y, at.index.z);
        std::va_list list;
        va_start(list, format);
        std::vsnprintf(block.message + used, sizeof block.message - used, format, list);
        va_end(list);
        block.failed = true;
    }
    switch_to_main(*block.current);
    std::abort();  // an abandoned thread is never resumed
}

inline const char* base_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

inline std::uint64_t next_random() {
    block.random = block.random * 6364136223846793005ull + 1442695040888963407ull;
    return block.random >> 33;
}

// Makes the listed threads ready, in the order of this launch.
inline void wake(int* list, int count) {
    if (block.order == 1) {
        for (int i = 0; i < count / 2; ++i) std::swap(list[i], list[count - 1 - i]);
    } else if (block.order == 2) {
        for (int i = count - 1; i > 0; --i) std::swap(list[i], list[next_random() % (i + 1)]);
    }
    for (int i = 0; i < count; ++i) {
        block.threads[list[i]].state = State::ready;
        block.ready.push_back(list[i]);
    }
}

inline void release_barrier(int id) {
    int list[kMaxThreads], count = 0;
    for (int i = 0; i < block.n_threads; ++i) {
        Thread& thread = block.threads[i];
        if (thread.state == State::waits_at_barrier && thread.wanted_mask == static_cast<unsigned>(id)) {
            thread.vote_result = block.barriers[id].votes;
            list[count++] = i;
        }
    }
    block.barriers[id] = Barrier{};
    wake(list, count);
}

// Waits until `expected` threads (0: all that are not done) have come to barrier `id`; returns the number of true votes.
inline int sync_block(int id, int expected, bool vote, const char* file, int line) {
    Barrier& barrier = block.barriers[id];
    Thread& self = *block.current;
    if (barrier.arrived == 0) {
        barrier.file = file;
        barrier.line = line;
    } else if (barrier.line != line || barrier.file != file) {
        fail("divergent barrier: this thread is at %s:%d, others are at %s:%d", base_name(file), line,
             base_name(barrier.file), barrier.line);
    }
    ++barrier.arrived;
    barrier.votes += vote ? 1 : 0;
    self.state = State::waits_at_barrier;
    self.wanted_mask = static_cast<unsigned>(id);
    self.where_file = file;
    self.where_line = line;
    if (barrier.arrived == (expected > 0 ? expected : block.n_threads - block.n_done)) release_barrier(id);
    switch_to_main(self);
    return self.vote_result;
}

// What the lanes of a warp operation gave; entries of lanes outside the mask are null.
struct Lanes {
    unsigned mask;
    const void* input[kWarpSize];
    void* output[kWarpSize];

    template <class T>
    const T& in(int lane) const {
        return *static_cast<const T*>(input[lane]);
    }
    template <class T>
    T& out(int lane) const {
        return *static_cast<T*>(output[lane]);
    }
    bool has(int lane) const { return (mask >> lane) & 1u; }
};

// Waits until all lanes of `mask` have come here, then does `operation` once for all of them.
// The address of `operation` names it: lanes of one mask that meet at different operations are an error.
inline void warp_collective(unsigned mask, void (*operation)(const Lanes&, long long), long long parameter,
                            const void* input, void* output, const char* file, int line) {
    Thread& self = *block.current;
    const int lane = self.linear % kWarpSize, first = self.linear - lane;
    if (!((mask >> lane) & 1u)) {
        fail("%s:%d: the mask 0x%08x does not hold the calling lane %d", base_name(file), line, mask, lane);
    }
    Warp& warp = block.warps[self.linear / kWarpSize];
    WarpOperation* found = nullptr;
    for (WarpOperation& one : warp.operations) {
        if (one.mask == mask) found = &one;
        else if (one.mask & mask) fail("%s:%d: lanes of mask 0x%08x wait at line %d with mask 0x%08x", base_name(file), line, mask, one.line, one.mask);
    }
    const void* kind = reinterpret_cast<const void*>(operation);
    if (found == nullptr) {
        for (WarpOperation& one : warp.operations) {
            if (one.mask == 0) found = &one;
        }
        if (found == nullptr) fail("%s:%d: more groups of lanes wait than this emulation keeps", base_name(file), line);
        *found = WarpOperation{mask, 0, kind, line};
    } else if (found->kind != kind || found->line != line) {
        fail("%s:%d: other lanes of the warp are at another operation, in line %d", base_name(file), line, found->line);
    }
    found->arrived |= 1u << lane;
    self.input = input;
    self.output = output;
    self.where_file = file;
    self.where_line = line;
    if (found->arrived != mask) {
        self.state = State::waits_for_warp;
        switch_to_main(self);
        return;
    }
    *found = WarpOperation{};
    Lanes lanes{mask, {}, {}};
    int list[kWarpSize], count = 0;
    for (int i = 0; i < kWarpSize; ++i) {
        if (!lanes.has(i)) continue;
        lanes.input[i] = block.threads[first + i].input;
        lanes.output[i] = block.threads[first + i].output;
        list[count++] = first + i;
    }
    operation(lanes, parameter);
    wake(list, count);
    switch_to_main(self);
}

inline void thread_main() {
    block.body(block.arguments);
    Thread& self = *block.current;
    self.state = State::done;
    ++block.n_done;
    // Barriers wait for those threads only that are still there.
    Barrier& barrier = block.barriers[0];
    if (barrier.arrived > 0 && barrier.arrived == block.n_threads - block.n_done) release_barrier(0);
    switch_to_main(self);
    std::abort();
}

inline void start_thread(Thread& thread) {
    if (thread.stack == nullptr) {
        void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        thread.stack = static_cast<char*>(memory);
    }
#if defined(__x86_64__)
    // As if thread_main had been called: a return address slot keeps the stack aligned as the ABI wants it.
    void** top = reinterpret_cast<void**>(thread.stack + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&thread_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    thread.stack_pointer = top;
#else
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
#endif
}

inline void run_block() {
    block.n_done = 0;
    block.next_ready = 0;
    block.ready.clear();
    for (Warp& warp : block.warps) warp = Warp{};
    for (Barrier& barrier : block.barriers) barrier = Barrier{};
    std::memset(block.shared, kPoison, block.shared_bytes + kCanaryBytes);
    std::memset(block.static_shared, kPoison, kStaticBytes);
    int list[kMaxThreads];
    for (int i = 0; i < block.n_threads; ++i) {
        Thread& thread = block.threads[i];
        const int x = block.block_dim.x, y = block.block_dim.y;
        thread.index = dim3(i % x, i / x % y, i / (x * y));
        thread.linear = i;
        thread.copies.clear();
        thread.group_ends.clear();
        start_thread(thread);
        list[i] = i;
    }
    wake(list, block.n_threads);
    while (block.next_ready < block.ready.size() && !block.failed) {
        switch_to(block.threads[block.ready[block.next_ready++]]);
        if (block.next_ready > 65536) {  // forget those that have run
            block.ready.erase(block.ready.begin(), block.ready.begin() + block.next_ready);
            block.next_ready = 0;
        }
    }
    if (block.failed) return;
    const auto is_poison = [](const char* from, const char* to) {
        for (; from < to; ++from) {
            if (static_cast<unsigned char>(*from) != kPoison) return false;
        }
        return true;
    };
    bool static_whole = true;
    for (const auto& [first, last] : block.static_gaps) {
        static_whole = static_whole && is_poison(block.static_shared + first, block.static_shared + last);
    }
    const char* end = block.shared + block.shared_bytes;
    if (!static_whole) {
        std::snprintf(block.message, sizeof block.message, "block (%u, %u, %u) wrote beyond a static shared array",
                      block.block_index.x, block.block_index.y, block.block_index.z);
        block.failed = true;
    } else if (!is_poison(end, end + kCanaryBytes)) {
        std::snprintf(block.message, sizeof block.message,
                      "block (%u, %u, %u) wrote beyond its %zu bytes of dynamic shared memory", block.block_index.x,
                      block.block_index.y, block.block_index.z, block.shared_bytes);
        block.failed = true;
    } else if (block.n_done != block.n_threads) {
        for (int i = 0; i < block.n_threads; ++i) {
            const Thread& thread = block.threads[i];
            if (thread.state == State::done) continue;
            std::snprintf(block.message, sizeof block.message,
                          "block (%u, %u, %u): deadlock: thread (%u, %u, %u) waits for ever at %s:%d (%s); %d of %d "
                          "threads are done",
                          block.block_index.x, block.block_index.y, block.block_index.z, thread.index.x,
                          thread.index.y, thread.index.z, base_name(thread.where_file), thread.where_line,
                          thread.state == State::waits_at_barrier ? "block barrier" : "warp operation", block.n_done,
                          block.n_threads);
            break;
        }
        block.failed = true;
    }
}

// An access to memory that is not there ends the launch as any other mistake does. The stack is the thread's own.
inline void on_crash(int) { fail("access to an address outside of all memory"); }

// Runs a kernel: `body` is called once for each thread with `arguments`. Returns null, or what went wrong.
inline const char* launch(const unsigned grid[3], const unsigned dims[3], std::size_t shared_bytes, int order,
                          void (*body)(void*), void* arguments) {
    block.grid_dim = dim3(grid[0], grid[1], grid[2]);
    block.block_dim = dim3(dims[0], dims[1], dims[2]);
    block.n_threads = static_cast<int>(dims[0] * dims[1] * dims[2]);
    if (static_cast<int>(block.threads.size()) < block.n_threads) block.threads.resize(block.n_threads);
    block.warps.resize((block.n_threads + kWarpSize - 1) / kWarpSize);
    block.body = body;
    block.arguments = arguments;
    block.order = order;
    block.random = 1;
    block.failed = false;
    block.shared_bytes = shared_bytes;
    const std::size_t needed = shared_bytes + kCanaryBytes + 1024;
    if (block.shared_capacity < needed) {
        std::free(block.shared);
        block.shared = static_cast<char*>(std::aligned_alloc(1024, (needed + 1023) / 1024 * 1024));
        block.shared_capacity = needed;
    }
    if (block.static_shared == nullptr) block.static_shared = static_cast<char*>(std::aligned_alloc(1024, kStaticBytes));
    struct sigaction crash = {}, segv, bus;
    crash.sa_handler = on_crash;
    crash.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &crash, &segv);
    sigaction(SIGBUS, &crash, &bus);
    const std::uint64_t n_blocks = std::uint64_t(grid[0]) * grid[1] * grid[2];
    for (std::uint64_t i = 0; i < n_blocks && !block.failed; ++i) {
        const std::uint64_t at = order == 1 ? n_blocks - 1 - i : i;
        block.block_index = dim3(at % grid[0], at / grid[0] % grid[1], at / (std::uint64_t(grid[0]) * grid[1]));
        run_block();
    }
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    return block.failed ? block.message : nullptr;
}

// Room of one static shared array of the kernel; the same for all threads of a block.
class SharedArray {
  public:
    explicit SharedArray(std::size_t bytes) {
        offset_ = block.static_used;
        block.static_used += (bytes + 64 + 127) / 128 * 128;
        if (block.static_used > kStaticBytes) fail("more than 48 KiB of static shared memory");
        block.static_gaps.emplace_back(offset_ + bytes, block.static_used);
    }
    void* data() const { return block.static_shared + offset_; }

  private:
    std::size_t offset_;
};

}  // namespace emu
