#include "wipe.h"

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "threads.h"

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define VA_WALKABLE_HEAP 1
#include <malloc.h>
#endif

namespace va {
namespace {

// Frames of calls that have returned, as far below as ours ever reached.
__attribute__((noinline)) void wipe_stack() {
    char below[256 * 1024];
    explicit_bzero(below, sizeof below);
}

#ifdef VA_WALKABLE_HEAP

struct Taken {
    Taken* next;
};

// Takes pieces of this size for as long as the heap has free ones, overwriting each. The break moves, or a mapping or
// another arena answers, when it has none.
Taken* take_all(size_t size, Taken* taken) {
    constexpr size_t mapped = 2, other_arena = 4;  // flags of a chunk, in the word before it
    for (;;) {
        const void* before = sbrk(0);
        void* p = malloc(size);
        if (p == nullptr) return taken;
        size_t flags;
        memcpy(&flags, (const void*)((uintptr_t)p - sizeof flags), sizeof flags);
        if (flags & (mapped | other_arena)) {
            free(p);
            return taken;
        }
        explicit_bzero(p, malloc_usable_size(p));
        Taken* piece = static_cast<Taken*>(p);
        piece->next = taken;
        taken = piece;
        if (sbrk(0) != before) return taken;
    }
}

void wipe_heap() {
    Taken* taken = nullptr;
    // From half of what the allocator would map on its own.
    for (size_t size = 64 * 1024; size > 1032; size /= 2) taken = take_all(size, taken);
    for (size_t size = 1032; size >= 24; size -= 16) taken = take_all(size, taken);  // each has a cache of its own
    while (taken != nullptr) {
        Taken* next = taken->next;
        taken->next = nullptr;
        free(taken);
        taken = next;
    }
}

#else

void wipe_heap() {}

#endif

}  // namespace

void wipe_block(void* p, size_t size) {
#ifdef VA_WALKABLE_HEAP
    size = malloc_usable_size(p);
#endif
    explicit_bzero(p, size);
}

void wipe_free_memory() {
    wipe_scratch();
    wipe_heap();
    wipe_stack();
}

}  // namespace va
