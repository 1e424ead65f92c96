// The common case of wire/ring.py in one call: whole messages that fit, or that lie there complete. Everything else - waiting,
// counters out of range, unexpected headers - is left as it was found, for the code in Python to meet and to name.
#include "module_ring.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "common.h"
#include "copy.h"

namespace nb = nanobind;

namespace va {
namespace {

const size_t HEADER = 32;                                          // docs/wire.md section 2
const size_t HEAD = 0, TAIL = 64, READER_WAITS = 128, WRITER_WAITS = 192, BLOCK = 256;  // a ring's counters
const size_t LARGE = 512 * 1024;  // counters move no more often than that inside a message

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

class Bytes {
  public:
    Bytes(nb::handle object, bool writable) {
        if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE : PyBUF_C_CONTIGUOUS) != 0) {
            PyErr_Clear();
            throw std::invalid_argument("a contiguous buffer is needed");
        }
        data = static_cast<uint8_t*>(view_.buf);
        size = (size_t)view_.len;
    }
    Bytes(Bytes&& other) noexcept : data(other.data), size(other.size), view_(other.view_) { other.view_.obj = nullptr; }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    ~Bytes() {
        if (view_.obj) PyBuffer_Release(&view_);
    }
    uint8_t* data;
    size_t size;

  private:
    Py_buffer view_;
};

// One ring and the messages of a call.
struct Ring {
    Ring(nb::handle page_, size_t base, nb::handle data_, size_t slot, nb::handle headers_, nb::list payloads_, bool reading)
        : page(page_, true), data(data_, true), headers(headers_, false), slot(slot) {
        require(slot >= 4096 && slot % 4096 == 0 && data.size >= slot && data.size % slot == 0, "a ring of an odd size");
        require(base % 64 == 0 && base + BLOCK <= page.size && (uintptr_t)page.data % 8 == 0, "counters outside their page");
        require(headers.size == HEADER * payloads_.size(), "one header for each message");
        for (nb::handle payload : payloads_) payloads.emplace_back(payload, reading);
        words = page.data + base;
    }

    uint64_t load(size_t word) const { return __atomic_load_n(reinterpret_cast<uint64_t*>(words + word), __ATOMIC_SEQ_CST); }
    void store(size_t word, uint64_t value) { __atomic_store_n(reinterpret_cast<uint64_t*>(words + word), value, __ATOMIC_SEQ_CST); }

    // Bytes that message i takes, in whole slots.
    size_t span(size_t i) const { return (HEADER + payloads[i].size + slot - 1) / slot * slot; }

    // Copies private memory into the ring, over its end.
    void write(uint64_t at, const uint8_t* mine, size_t count) {
        while (count > 0) {
            const size_t offset = at % data.size, n = count < data.size - offset ? count : data.size - offset;
            memcpy(data.data + offset, mine, n);
            at += n, mine += n, count -= n;
        }
    }

    // Copies out of the ring into private memory, over its end; where it is the payload of a message that will be taken,
    // slots are given back on the way.
    void read(uint64_t at, uint8_t* mine, size_t count, bool give_back) {
        const size_t whole = count, piece = data.size / 4 > LARGE ? data.size / 4 : LARGE;
        while (count > 0) {
            const size_t offset = at % data.size, room = data.size - offset, most = room < piece ? room : piece;
            const size_t n = count < most ? count : most;
            copy_in(mine, data.data + offset, n, whole);
            at += n, mine += n, count -= n;
            if (give_back && count > 0) store(TAIL, at / slot);
        }
    }

    Bytes page, data, headers;
    const size_t slot;
    uint8_t* words;
    std::vector<Bytes> payloads;
};

// Writes messages for which there is room and publishes them together. pos: bytes since the start, at a slot; tail: the
// last counter of the reader. Returns (pos, tail, messages written, whether the reader waits).
nb::tuple ring_put(nb::handle page, size_t base, nb::handle data, size_t slot, uint64_t pos, uint64_t tail, nb::handle headers,
                   nb::list payloads) {
    Ring ring(page, base, data, slot, headers, payloads, false);
    require(pos % slot == 0 && tail <= pos / slot, "a place inside a message");
    size_t count = 0;
    bool waits = false;
    {
        nb::gil_scoped_release release;
        for (; count < ring.payloads.size(); count++) {
            const uint64_t end = pos + ring.span(count);
            if (end > tail * slot + ring.data.size) {
                const uint64_t now = ring.load(TAIL);
                if (now < tail || now > pos / slot) break;
                tail = now;
                if (end > tail * slot + ring.data.size) break;
            }
            ring.write(pos, ring.headers.data + HEADER * count, HEADER);
            ring.write(pos + HEADER, ring.payloads[count].data, ring.payloads[count].size);
            pos = end;
        }
        if (count > 0) {
            ring.store(HEAD, pos / slot);
            waits = ring.load(READER_WAITS) != 0;
        }
    }
    return nb::make_tuple(pos, tail, count, waits);
}

// Copies messages that are complete and have the expected headers into private memory. pos: as above; head: the last
// counter of the writer, freed: slots given back. Every byte is read once; the header that is compared is a private copy.
// Returns (pos, head, messages taken, whether the writer waits); freed is pos / slot afterwards.
nb::tuple ring_take(nb::handle page, size_t base, nb::handle data, size_t slot, uint64_t pos, uint64_t head, nb::handle headers,
                    nb::list payloads) {
    Ring ring(page, base, data, slot, headers, payloads, true);
    require(pos % slot == 0 && head >= pos / slot, "a place inside a message");
    size_t count = 0;
    bool waits = false;
    {
        nb::gil_scoped_release release;
        for (; count < ring.payloads.size(); count++) {
            const uint64_t end = pos + ring.span(count);
            if (end > head * slot) {
                const uint64_t now = ring.load(HEAD);
                if (now < head || now > pos / slot + ring.data.size / slot) break;
                head = now;
                if (end > head * slot) break;
            }
            uint8_t header[HEADER];
            ring.read(pos, header, HEADER, false);
            if (memcmp(header, ring.headers.data + HEADER * count, HEADER) != 0) break;
            ring.read(pos + HEADER, ring.payloads[count].data, ring.payloads[count].size, true);
            pos = end;
            ring.store(TAIL, pos / slot);
            waits |= ring.load(WRITER_WAITS) != 0;
        }
    }
    return nb::make_tuple(pos, head, count, waits);
}

// Copies count bytes from source[at:] to out[out_at:], on all threads where they are many.
void copy_bytes(nb::handle out_, size_t out_at, nb::handle source_, size_t at, size_t count) {
    Bytes out(out_, true), source(source_, false);
    require(out_at <= out.size && count <= out.size - out_at, "beyond the end of the destination");
    require(at <= source.size && count <= source.size - at, "beyond the end of the source");
    uint8_t* to = out.data + out_at;
    const uint8_t* from = source.data + at;
    require(from + count <= to || to + count <= from, "source and destination overlap");
    nb::gil_scoped_release release;
    copy_in(to, from, count, out.size);
}

}  // namespace

void bind_ring(nb::module_& m) {
    m.def("ring_put", &ring_put);
    m.def("ring_take", &ring_take);
    m.def("copy_in", &copy_bytes);
}

}  // namespace va
