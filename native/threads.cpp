#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <set>
#include <thread>

#include "wipe.h"

#if VA_X86
#include <immintrin.h>
#endif

namespace va {
namespace {

// A caller that flushes subnormals or rounds otherwise (some libraries set this for the whole process) must not change
// our results; and our choice must not leak into the caller.
class FloatEnvironment {
  public:
#if VA_X86
    FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~FloatEnvironment() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
    FloatEnvironment() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"((uint64_t)0));
    }
    ~FloatEnvironment() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

  private:
    uint64_t saved_;
#endif
};

struct Job {
    void (*fn)(void*, i64);
    void* ctx;
    i64 n;
    std::atomic<i64> next{0};
    std::atomic<bool> failed{false};
};

void work(Job& job) {
    FloatEnvironment environment;
    try {
        for (;;) {
            i64 i = job.next.fetch_add(1, std::memory_order_relaxed);
            if (i >= job.n) return;
            job.fn(job.ctx, i);
        }
    } catch (const std::bad_alloc&) {
        job.failed = true;
    }
}

inline void relax() {
#if VA_X86
    _mm_pause();
#else
    asm volatile("yield");
#endif
}

// A step of a model is hundreds of short loops in a row, so threads look out for the next loop, or for the end of one, for
// a moment before they sleep: waking takes longer than such a loop. Not for longer, and without giving the CPU away in
// between: on a busy machine a thread that yields comes back a scheduler's period later, one that is woken at once.
class Patience {
  public:
    // False once the time is up.
    bool wait() {
        relax();
        if (++rounds_ % 32) return true;
        const auto now = std::chrono::steady_clock::now();
        if (rounds_ == 32) since_ = now;
        return now - since_ < std::chrono::microseconds(60);
    }

  private:
    unsigned rounds_ = 0;
    std::chrono::steady_clock::time_point since_;
};

struct Pool {
    std::mutex use;  // held by the caller whose loop is running
    std::mutex m;    // of the sleepers
    std::condition_variable wake, done;
    // A worker counts itself active before it looks at `job`, and the caller takes `job` away before it looks at
    // `active`: either the worker finds nothing, or the caller waits for it. Hence sequential consistency.
    std::atomic<Job*> job{nullptr};
    std::atomic<uint64_t> generation{0};
    std::atomic<int> wanted{0}, active{0}, sleeping{0};
    std::atomic<bool> awaited{false};  // the caller sleeps until nobody is active
    int workers = 0;

    bool called(int index, uint64_t seen) { return generation != seen && index < wanted && job != nullptr; }

    void loop(int index) {
        uint64_t seen = 0;
        for (;;) {
            Patience patience;
            bool ready;
            while (!(ready = called(index, seen)) && patience.wait()) {
            }
            if (!ready) {
                std::unique_lock<std::mutex> lock(m);
                sleeping++;
                wake.wait(lock, [&] { return called(index, seen); });
                sleeping--;
            }
            active++;
            seen = generation;
            Job* mine = job;
            if (mine && index < wanted) work(*mine);
            if (--active == 0 && awaited) {
                std::lock_guard<std::mutex> lock(m);
                done.notify_all();
            }
        }
    }

    void post(Job& next, int helpers) {
        wanted = helpers;
        job = &next;
        generation++;
        if (sleeping > 0) {
            std::lock_guard<std::mutex> lock(m);
            wake.notify_all();
        }
    }

    void finish() {
        job = nullptr;
        Patience patience;
        while (active != 0) {
            if (patience.wait()) continue;
            std::unique_lock<std::mutex> lock(m);
            awaited = true;
            done.wait(lock, [&] { return active == 0; });
            awaited = false;
        }
    }
};

// A loop inside a loop runs on the thread that meets it.
thread_local bool inside = false;

// Never destroyed: detached workers may outlive static destructors.
Pool* pool = new Pool;
std::atomic<int> thread_count{0};

// What each thread keeps between calls. Listed, so that another thread can overwrite it while no kernel runs.
struct Buffers {
    void* data[S_SLOTS] = {};
    size_t size[S_SLOTS] = {};

    void drop(int slot) {
        if (data[slot]) wipe_block(data[slot], size[slot]);
        free(data[slot]);
        data[slot] = nullptr;
        size[slot] = 0;
    }
};

struct Registry {
    std::mutex m;
    std::set<Buffers*> all;
};
Registry* registry = new Registry;  // never destroyed, as the pool

struct OwnBuffers {
    Buffers* b = new Buffers;
    OwnBuffers() {
        std::lock_guard<std::mutex> lock(registry->m);
        registry->all.insert(b);
    }
    ~OwnBuffers() {
        {
            std::lock_guard<std::mutex> lock(registry->m);
            registry->all.erase(b);
        }
        for (int slot = 0; slot < S_SLOTS; slot++) b->drop(slot);
        delete b;
    }
};

// The lists themselves stay right in a child: only the locks may have been held by threads that it does not have.
void forget_workers_after_fork() {
    pool = new Pool;
    Registry* fresh = new Registry;
    fresh->all = registry->all;
    registry = fresh;
}

void register_fork_handler() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_workers_after_fork);
    (void)registered;
}

int count_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return n < 1 ? 1 : n > 256 ? 256 : n;
}

// Asked once: a loop of a few microseconds has no time for a system call.
int default_threads() {
    static const int n = count_cpus();
    return n;
}

}  // namespace

void set_threads(int n) { thread_count = n; }

int get_threads() {
    int n = thread_count;
    return n > 0 ? n : default_threads();
}

void parallel_for_raw(i64 n, bool worth_it, void (*fn)(void*, i64), void* ctx) {
    register_fork_handler();
    if (n <= 0) return;
    Job job;
    job.fn = fn;
    job.ctx = ctx;
    job.n = n;
    const int helpers = worth_it && !inside ? (int)min64(get_threads(), n) - 1 : 0;
    Pool& p = *pool;
    // Where another caller has the pool, this one just does its own work.
    std::unique_lock<std::mutex> use(p.use, std::defer_lock);
    const bool outer = inside;
    inside = true;
    if (helpers > 0 && use.try_lock()) {
        while (p.workers < helpers) {
            std::thread(&Pool::loop, &p, p.workers).detach();
            p.workers++;
        }
        p.post(job, helpers);
        work(job);
        p.finish();
    } else {
        work(job);
    }
    inside = outer;
    if (job.failed) throw std::bad_alloc();
}

void* scratch(Slot slot, size_t bytes) {
    thread_local OwnBuffers own;
    Buffers& b = *own.b;
#ifdef __SANITIZE_ADDRESS__
    // Exactly what was asked for, afresh each time: overruns and use of an old buffer show.
    const bool grow = true;
    const size_t size = bytes ? bytes : 1;
#else
    const bool grow = b.size[slot] < bytes;
    const size_t size = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
#endif
    if (grow) {
        b.drop(slot);
        if (posix_memalign(&b.data[slot], 64, size) != 0) {
            b.data[slot] = nullptr;
            throw std::bad_alloc();
        }
        b.size[slot] = size;
    }
    return b.data[slot];
}

void wipe_scratch() {
    register_fork_handler();
    std::lock_guard<std::mutex> none_runs(pool->use);
    std::lock_guard<std::mutex> lock(registry->m);
    for (Buffers* b : registry->all) {
        for (int slot = 0; slot < S_SLOTS; slot++) {
            // With what the allocator gave beyond: an earlier owner's bytes may stand there.
            if (b->data[slot]) wipe_block(b->data[slot], b->size[slot]);
        }
    }
}

}  // namespace va
