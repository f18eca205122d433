#include "common/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define PK_HAS_FORK 1
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pk {
namespace {

std::atomic<bool> forked{false};

#ifdef PK_HAS_FORK
[[maybe_unused]] const int fork_handler_registered =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif

#ifdef _OPENMP
constexpr int max_workers = 256;
#endif
constexpr std::size_t kept_bytes = std::size_t{16} << 20;

struct KeptBlock {
    void* data = nullptr;
    std::size_t bytes = 0;
    bool in_use = false;
    ~KeptBlock() { std::free(data); }
};

thread_local KeptBlock kept;

void* allocate(std::size_t bytes) {
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (data == nullptr) throw std::bad_alloc();
    return data;
}

}  // namespace

int usable_threads(int threads) {
#ifdef _OPENMP
    if (threads > 1 && !forked.load(std::memory_order_relaxed)) return std::min(threads, max_workers);
#endif
    (void)threads;
    return 1;
}

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

#ifdef _OPENMP
namespace {

// Tasks of one worker that are still to be handed out, on a cache line of its own.
struct alignas(64) Share {
    std::atomic<std::int64_t> next{0};
    std::int64_t end = 0;
};

}  // namespace
#endif

void parallel_tasks(std::int64_t tasks, int threads, TaskBody body, const void* context) {
#ifdef _OPENMP
    const int workers = static_cast<int>(std::min<std::int64_t>(usable_threads(threads), tasks));
    if (workers > 1) {
        Share shares[max_workers];
        for (int w = 0; w < workers; ++w) {
            shares[w].next = tasks * w / workers;
            shares[w].end = tasks * (w + 1) / workers;
        }
#pragma omp parallel num_threads(workers)
        {
            const int worker = omp_get_thread_num();
            for (int i = 0; i < workers; ++i) {  // its own share first, then what others have left
                Share& share = shares[(worker + i) % workers];
                for (std::int64_t task = share.next++; task < share.end; task = share.next++)
                    body(context, task, worker);
            }
        }
        return;
    }
#endif
    (void)threads;
    for (std::int64_t task = 0; task < tasks; ++task) body(context, task, 0);
}

void expect_writes(void* data, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr std::uintptr_t page = std::uintptr_t{2} << 20;
    if (bytes < 4 * page) return;  // smaller blocks mostly come from memory that is already there
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a wish
#else
    (void)data;
    (void)bytes;
#endif
}

void throw_out_of_memory() { throw std::bad_alloc(); }

Scratch::Scratch(std::size_t bytes) : owned_(bytes > kept_bytes || kept.in_use) {
    if (owned_) {
        data_ = allocate(bytes);
        return;
    }
    if (bytes > kept.bytes) {
        std::free(kept.data);
        kept.data = nullptr;
        kept.bytes = 0;
        kept.data = allocate(bytes);
        kept.bytes = bytes;
    }
    kept.in_use = true;
    data_ = kept.data;
}

void* Scratch::data() const { return data_; }

Scratch::~Scratch() {
    if (owned_)
        std::free(data_);
    else
        kept.in_use = false;
}

}  // namespace pk
