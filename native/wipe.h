// Overwriting what a process has already given back.
#pragma once
#include <stddef.h>

namespace va {

// Overwrites scratch buffers, every free piece of the heap and the unused part of this thread's stack, so that nothing
// of finished work can be read out of this process. What is in use stays. Call it from the main thread, while no kernel
// runs. Elsewhere than glibc only scratch and stack: its heap is walked by allocating all that is free.
void wipe_free_memory();

// Overwrites a block from malloc, with what was added to its size to round it up.
void wipe_block(void* p, size_t size);

}  // namespace va
