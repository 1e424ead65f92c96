// Checked views of Python buffers: type, number of dimensions, contiguity, alignment. The only way data comes in.
#pragma once
#include <Python.h>

#include <stdexcept>
#include <string>

#include "common.h"

namespace va {

template <class T>
struct Code;
template <>
struct Code<int8_t> { static constexpr const char *codes = "b", *name = "int8"; };
template <>
struct Code<uint8_t> { static constexpr const char *codes = "B?", *name = "uint8"; };
template <>
struct Code<uint16_t> { static constexpr const char *codes = "H", *name = "uint16"; };
template <>
struct Code<int32_t> { static constexpr const char *codes = "i", *name = "int32"; };
template <>
struct Code<int64_t> { static constexpr const char *codes = "lq", *name = "int64"; };
template <>
struct Code<uint64_t> { static constexpr const char *codes = "LQ", *name = "uint64"; };
template <>
struct Code<float> { static constexpr const char *codes = "f", *name = "float32"; };
template <>
struct Code<double> { static constexpr const char *codes = "d", *name = "float64"; };

// Holds the buffer while it lives; must be made and destroyed with the GIL held.
class BufferBase {
  public:
    BufferBase(const BufferBase&) = delete;
    BufferBase& operator=(const BufferBase&) = delete;

    i64 dim(int i) const { return view_.shape[i]; }
    i64 size() const { return view_.len / view_.itemsize; }

  protected:
    BufferBase() { view_.obj = nullptr; }
    ~BufferBase() {
        if (view_.obj) PyBuffer_Release(&view_);
    }

    void take(PyObject* object, const char* name, int ndim, bool writable, const char* codes, size_t itemsize,
              const char* type) {
        int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object, &view_, flags) != 0) {
            PyErr_Clear();
            view_.obj = nullptr;
            fail(name, ndim, type, writable);
        }
        const char* f = view_.format ? view_.format : "B";
        if (*f == '<' || *f == '=' || *f == '@') f++;
        bool known = f[0] != 0 && f[1] == 0;
        if (known) {
            known = false;
            for (const char* c = codes; *c; c++) known |= *c == *f;
        }
        if (!known || view_.ndim != ndim || (size_t)view_.itemsize != itemsize ||
            (view_.len > 0 && (uintptr_t)view_.buf % itemsize != 0))
            fail(name, ndim, type, writable);
    }

    Py_buffer view_;

  private:
    [[noreturn]] static void fail(const char* name, int ndim, const char* type, bool writable) {
        throw std::invalid_argument(std::string(name) + " must be a C-contiguous, aligned " +
                                    (writable ? "writable " : "") + type + " array of " + std::to_string(ndim) +
                                    " dimensions");
    }
};

// T const: read only. `optional` accepts None and leaves data null.
template <class T>
class Buffer : public BufferBase {
  public:
    typedef typename std::remove_const<T>::type Value;

    Buffer(PyObject* object, const char* name, int ndim, bool optional = false) : name_(name) {
        if (optional && object == Py_None) return;
        take(object, name, ndim, !std::is_const<T>::value, Code<Value>::codes, sizeof(T), Code<Value>::name);
        data = static_cast<T*>(view_.buf);
        given = true;
    }

    // Raises unless the shape is this one; -1 stands for anything.
    void shape(std::initializer_list<i64> want) const {
        if (!given) return;
        int i = 0;
        for (i64 n : want) {
            if (n >= 0 && view_.shape[i] != n)
                throw std::invalid_argument(std::string(name_) + " has " + std::to_string(view_.shape[i]) +
                                            " elements along axis " + std::to_string(i) + ", not " + std::to_string(n));
            i++;
        }
    }

    T* data = nullptr;
    bool given = false;

  private:
    const char* name_;
};

}  // namespace va
