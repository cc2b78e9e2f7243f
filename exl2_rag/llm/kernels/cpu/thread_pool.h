// Shares the tasks of one op among threads. Tasks must not depend on which thread runs them, or in which order.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace exl2 {

// One task; false: out of memory.
using Task = bool (*)(const void* context, int64_t index);

// Run tasks 0 to count - 1, here if the work is small or the threads are busy with another caller's, else on all threads.
//   cost: about how many multiply-adds all tasks are together.
// Returns false if any task did.
bool run_tasks(int64_t count, int64_t cost, Task task, const void* context);

// While a Region is alive in the calling thread, its helpers stay awake between ops: they spin, so that an op costs a
// microsecond to hand out, not a wake-up. For a run of many small ops; never held while waiting for anything else.
class Region {
public:
    Region();
    ~Region();
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

private:
    bool held_;
};

// Memory of the calling thread, aligned to 64 bytes, that stays until the next call for the same slot (0 or 1).
// A task takes slot 0; slot 1 is for what the caller of run_tasks prepares. nullptr: out of memory.
float* scratch(int slot, size_t n_floats);

// Threads that work on one op, the caller's included. Takes effect with the next op.
void set_num_threads(int count);

}  // namespace exl2
