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

size_t top_bytes() {
#if __GLIBC_PREREQ(2, 33)
    return mallinfo2().keepcost;
#else
    return (unsigned)mallinfo().keepcost;
#endif
}

Taken* take(void* p, Taken* taken) {
    explicit_bzero(p, malloc_usable_size(p));
    Taken* piece = static_cast<Taken*>(p);
    piece->next = taken;
    return piece;
}

void give_back(Taken* taken) {
    while (taken != nullptr) {
        Taken* next = taken->next;
        taken->next = nullptr;
        free(taken);
        taken = next;
    }
}

// Takes pieces of this size for as long as the heap has free ones, overwriting each: until one is cut from the part that
// was never given out. Ends, too, where a mapping or another arena answers (its flags are in the word before the piece).
void take_all(size_t size, Taken*& taken, Taken*& from_top) {
    constexpr size_t mapped = 2, other_arena = 4;
    const uintptr_t top = (uintptr_t)sbrk(0) - top_bytes();
    for (;;) {
        void* p = malloc(size);
        if (p == nullptr) return;
        size_t flags;
        memcpy(&flags, (const void*)((uintptr_t)p - sizeof flags), sizeof flags);
        if (flags & (mapped | other_arena)) {
            free(p);
            return;
        }
        if ((uintptr_t)p >= top) {
            from_top = take(p, from_top);
            return;
        }
        taken = take(p, taken);
    }
}

// Leaves the heap as large as it is.
void wipe_heap() {
    Taken *taken = nullptr, *from_top = nullptr;
    // From half of what the allocator would map on its own.
    for (size_t size = 64 * 1024; size > 1032; size /= 2) take_all(size, taken, from_top);
    for (size_t size = 1032; size >= 24; size -= 16) take_all(size, taken, from_top);  // each has a cache of its own
    // Nothing else is free now: this comes from the top, of which the allocator needs 32 bytes.
    const size_t top = top_bytes();
    void* rest = top > 128 ? malloc(top - 64) : nullptr;
    if (rest != nullptr) from_top = take(rest, from_top);
    // In this order: the caches are full when the top's pieces come, which so become the top again.
    give_back(taken);
    give_back(from_top);
    void* volatile large = malloc(100 * 1024);  // freeing one makes the allocator join small pieces
    free(large);
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
