#include "dispatch.h"

#include <atomic>

#if VA_X86
#include <cpuid.h>

#include "amx.h"
#include "selftest.h"
#endif

namespace va {
namespace {

struct Isa {
    const char* name;
    const Kernels* table;
};

#if VA_X86

struct Features {
    bool avx2 = false, avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false, avx512_vnni = false,
         avx512_ifma = false, avx512_vbmi = false, avx_vnni = false, amx_tile = false, amx_int8 = false;
    bool os_avx = false, os_avx512 = false, os_amx = false;

    Features() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
        unsigned lo, hi;
        asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
        // Register state that the operating system saves: without it the instructions fault.
        os_avx = (lo & 0x6) == 0x6;
        os_avx512 = (lo & 0xe6) == 0xe6;
        os_amx = (lo & 0x60000) == 0x60000;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = b >> 5 & 1;
        avx512f = b >> 16 & 1;
        avx512dq = b >> 17 & 1;
        avx512_ifma = b >> 21 & 1;
        avx512bw = b >> 30 & 1;
        avx512vl = b >> 31 & 1;
        avx512_vbmi = c >> 1 & 1;
        avx512_vnni = c >> 11 & 1;
        amx_tile = d >> 24 & 1;
        amx_int8 = d >> 25 & 1;
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx_vnni = a >> 4 & 1;
    }
};

const Features& features() {
    static const Features f;
    return f;
}

#endif

std::vector<Isa> probe() {
    std::vector<Isa> found{{"portable", &portable_kernels}};
#if VA_X86
    const Features& f = features();
    if (f.os_avx && f.avx2) found.push_back({"avx2", &avx2_kernels});
    if (found.size() == 2 && f.os_avx512 && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl && f.avx512_vnni &&
        f.avx512_ifma)
        found.push_back({"avx512", &avx512_kernels});
#ifdef VERIATTN_EMULATE_AMX
    const bool amx = found.size() == 3;
#else
    const bool amx = found.size() == 3 && f.os_amx && f.amx_tile && f.amx_int8 && amx::permitted();
#endif
    // Whatever a first machine of its kind may do to it, a wrong kernel is never used.
    if (amx && self_test(amx::kernels())) found.push_back({"amx", &amx::kernels()});
#endif
    return found;
}

const std::vector<Isa>& isas() {
    static const std::vector<Isa> found = probe();
    return found;
}

std::atomic<const Isa*> active{nullptr};

const Isa& current() {
    const Isa* isa = active.load(std::memory_order_acquire);
    if (!isa) {
        isa = &isas().back();
        active.store(isa, std::memory_order_release);
    }
    return *isa;
}

}  // namespace

std::vector<std::string> cpu_features() {
    std::vector<std::string> names;
#if VA_X86
    const Features& f = features();
    auto add = [&](bool has, const char* name) {
        if (has) names.push_back(name);
    };
    add(f.os_avx && f.avx2, "avx2");
    add(f.os_avx && f.avx_vnni, "avx_vnni");
    add(f.os_avx512 && f.avx512f, "avx512f");
    add(f.os_avx512 && f.avx512bw, "avx512bw");
    add(f.os_avx512 && f.avx512dq, "avx512dq");
    add(f.os_avx512 && f.avx512vl, "avx512vl");
    add(f.os_avx512 && f.avx512_vnni, "avx512_vnni");
    add(f.os_avx512 && f.avx512_ifma, "avx512_ifma");
    add(f.os_avx512 && f.avx512_vbmi, "avx512_vbmi");
    add(f.os_amx && f.amx_tile, "amx_tile");
    add(f.os_amx && f.amx_int8, "amx_int8");
#else
    names.push_back("neon");
#endif
    return names;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas()) names.push_back(isa.name);
    return names;
}

const Kernels& kernels() { return *current().table; }

const char* active_isa() { return current().name; }

bool set_isa(const std::string& name) {
    for (const Isa& isa : isas()) {
        if (name == isa.name) {
            active.store(&isa, std::memory_order_release);
            return true;
        }
    }
    return false;
}

}  // namespace va
