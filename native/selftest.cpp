// Start-up comparison of a table of kernels with the portable one, for instruction sets that are used only if it holds.
#include "selftest.h"

#include <string.h>

#include <vector>

#include "pack.h"
#include "threads.h"

namespace va {
namespace {

struct Numbers {
    uint64_t state = 88172645463325252ull;
    uint64_t next() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return state;
    }
    int8_t byte() { return (int8_t)((int)(next() % 255) - 127); }
};

bool same_products(const Kernels& k, Numbers& numbers) {
    const i64 sizes[][3] = {{48, 112, 192}, {33, 83, 1216}, {7, 64, 70}};
    for (const auto& size : sizes) {
        const i64 m = size[0], n = size[1], in = size[2];
        std::vector<int8_t> a((size_t)(m * in)), w((size_t)(n * in));
        for (int8_t& x : a) x = numbers.byte();
        for (int8_t& x : w) x = numbers.byte();
        std::vector<int32_t> expected((size_t)(m * n)), got((size_t)(m * n), 1);
        std::vector<uint8_t> room(packed_bytes(k.format, n, in) + 64);
        uint8_t* packed = room.data() + (64 - (uintptr_t)room.data() % 64) % 64;
        for (i64 j = 0; j < n; j += 64) pack_rows(k.format, w.data(), n, in, j, min64(n, j + 64), packed);
        portable_kernels.gemm((const uint8_t*)w.data(), n, in, a.data(), m, 0, n, expected.data());
        k.gemm(packed, n, in, a.data(), m, 0, n, got.data());
        if (expected != got) return false;
    }
    return true;
}

bool same_attention_of(const Kernels& k, Numbers& numbers, i64 tokens, i64 d) {
    const i64 heads = 3, start = 270, pages = 2;
    std::vector<int8_t> q((size_t)(tokens * heads * d)), keys((size_t)(pages * PAGE * d)), values(keys.size());
    for (int8_t& x : q) x = numbers.byte();
    for (int8_t& x : keys) x = numbers.byte();
    for (int8_t& x : values) x = numbers.byte();
    std::vector<float> q_scale((size_t)(tokens * heads)), k_scale((size_t)(pages * PAGE));
    for (float& x : q_scale) x = (float)(1 + numbers.next() % 1000) * 0x1p-17f;
    for (float& x : k_scale) x = (float)(1 + numbers.next() % 1000) * 0x1p-10f;
    std::vector<uint64_t> g((size_t)(pages * PAGE * 2));
    for (uint64_t& x : g) x = numbers.next() % P;
    const int32_t table[] = {1, 0};
    std::vector<int64_t> o[2];
    std::vector<int32_t> l[2];
    std::vector<uint64_t> pg[2];
    const Kernels* tables[] = {&portable_kernels, &k};
    for (int x = 0; x < 2; x++) {
        o[x].assign(q.size(), 1);
        l[x].assign(q_scale.size(), 1);
        pg[x].assign(q_scale.size() * 2, 1);
        AttentionArgs s{q.data(), q_scale.data(), keys.data(), k_scale.data(), values.data(), g.data(), table, tokens,
                        heads, 1, d, start, o[x].data(), l[x].data(), pg[x].data(), nullptr, nullptr, nullptr};
        std::vector<uint8_t> prepared(tables[x]->prepare_bytes(s) + 64);
        s.prepared = prepared.size() > 64 ? prepared.data() + (64 - (uintptr_t)prepared.data() % 64) % 64 : nullptr;
        if (s.prepared) tables[x]->prepare(s, 0, 0, pages);
        const i64 tile = tables[x]->tile_queries(s);
        for (i64 i = 0; i < tokens; i += tile) tables[x]->attention(s, 0, i, min64(tokens, i + tile));
    }
    return o[0] == o[1] && l[0] == l[1] && pg[0] == pg[1];
}

bool same_attention(const Kernels& k, Numbers& numbers) {
    // A few rows have kernels of their own.
    for (i64 tokens : {2, 27})
        for (i64 d : {64, 128})
            if (!same_attention_of(k, numbers, tokens, d)) return false;
    return true;
}

}  // namespace

bool self_test(const Kernels& k) {
    bool same = false;
    // On the pool's terms, for its floating-point environment.
    parallel_for(1, false, [&](i64) {
        Numbers numbers;
        same = same_products(k, numbers) && same_attention(k, numbers);
    });
    return same;
}

}  // namespace va
