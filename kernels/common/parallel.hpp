// A parallel loop over independent tasks, and the memory that such loops use and write.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pk {

// Calls body(context, task, worker) for every task in [0, tasks), on at most `threads` workers numbered from 0.
// Each worker starts with an equal run of consecutive tasks, so that operators that follow one another find in their
// own core's cache what they left there, and then takes over what others have not started: a result must not depend on
// which worker computes it. Runs on the calling thread alone when threads <= 1, and in a process forked from another
// (the OpenMP runtime's workers do not survive a fork). `body` must not throw.
using TaskBody = void (*)(const void* context, std::int64_t task, int worker);
void parallel_tasks(std::int64_t tasks, int threads, TaskBody body, const void* context);

// Workers that parallel_tasks would use: 1 where it would run on the calling thread.
int usable_threads(int threads);

bool has_openmp();

// Asks for huge pages behind `bytes` of memory that is about to be written: new memory of many megabytes otherwise costs more
// in page faults than a convolution in arithmetic. Does nothing where the system has no such request.
void expect_writes(void* data, std::size_t bytes);

// Throws std::bad_alloc.
[[noreturn]] void throw_out_of_memory();

// 64-byte aligned scratch memory of the calling thread. Small blocks are kept for the thread's next call, since giving
// pages back and faulting them in again costs more than a small convolution. One scratch may be alive per thread.
class Scratch {
public:
    explicit Scratch(std::size_t bytes);  // throws std::bad_alloc
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* data() const;

private:
    void* data_;
    bool owned_;
};

}  // namespace pk
