// Copying out of shared memory: claims of hundreds of megabytes on all threads.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace va {

// Copies n bytes that another process may be changing. Nothing is read after the call, and what stands in `to` then is
// what will be used. From 1 MiB on they are cut over the pool where that is free. whole: size of the message that
// the bytes belong to, which says whether it can stay in a cache.
void copy_in(uint8_t* to, const uint8_t* from, size_t n, size_t whole);

}  // namespace va
