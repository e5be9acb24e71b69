// Tensors as Python hands them to a compiled entry, and the checks without which none of their memory is touched: the
// dtype, the device, that they are contiguous where that is taken for granted, and that all elements to be read or
// written are there. A tensor is asked through its own methods, so no torch headers are needed. What does not fit is
// refused by name: TypeError for a dtype or a layout, ValueError for a size, a place or a number.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/dtypes.h"

namespace rlhf_fast {

enum class Kind : int { f32, bf16, f16, f64, i32, i64, boolean, other };
constexpr int kKinds = static_cast<int>(Kind::other);
constexpr const char* kKindNames[kKinds + 1] = {"float32", "bfloat16", "float16", "float64",
                                                "int32",   "int64",    "bool",    "another dtype"};

template <class T>
struct KindOf;
template <>
struct KindOf<float> : std::integral_constant<Kind, Kind::f32> {};
template <>
struct KindOf<double> : std::integral_constant<Kind, Kind::f64> {};
template <>
struct KindOf<int32_t> : std::integral_constant<Kind, Kind::i32> {};
template <>
struct KindOf<int64_t> : std::integral_constant<Kind, Kind::i64> {};
template <>
struct KindOf<bool> : std::integral_constant<Kind, Kind::boolean> {};

// A tensor, or None.
struct Given {
    bool there = false;
    const char* type = nullptr;  // what came, if it is no tensor
    char* data = nullptr;
    Kind kind = Kind::other;
    int64_t elements = 0;  // between its first and its last element in memory, those two included
    bool contiguous = true;
    int64_t last_stride = 1;  // along its last dimension
    bool on_cpu = false;
    int cuda = -1;  // the index of its device, if that is a CUDA device
};

namespace given {

namespace py = pybind11;

// Names and torch's own objects, looked up once.
struct Torch {
    py::object tensor, dtypes[kKinds];
    PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* const numel = PyUnicode_InternFromString("numel");
    PyObject* const is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* const dtype = PyUnicode_InternFromString("dtype");
    PyObject* const is_cpu = PyUnicode_InternFromString("is_cpu");
    PyObject* const is_cuda = PyUnicode_InternFromString("is_cuda");

    Torch() {
        const py::module_ torch = py::module_::import("torch");
        tensor = torch.attr("Tensor");
        for (int i = 0; i < kKinds; ++i) dtypes[i] = torch.attr(kKindNames[i]);
    }
    static const Torch& instance() {
        static const Torch* const one = new Torch;  // never destroyed: Python may be gone by then
        return *one;
    }
};

inline py::object owned(PyObject* x) {
    if (x == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(x);
}
inline py::object call(py::handle x, PyObject* method) { return owned(PyObject_CallMethodNoArgs(x.ptr(), method)); }
inline py::object get(py::handle x, PyObject* name) { return owned(PyObject_GetAttr(x.ptr(), name)); }

// What is looked at of a tensor of some elements that is not contiguous.
inline void look_at_strides(py::handle x, Given& found) {
    const py::tuple shape = x.attr("shape"), stride = x.attr("stride")();
    found.elements = 1;
    for (std::size_t i = 0; i < shape.size(); ++i) {
        const auto size = shape[i].cast<int64_t>();
        found.elements += (size - 1) * stride[i].cast<int64_t>();
        found.last_stride = size > 1 ? stride[i].cast<int64_t>() : 1;
    }
}

inline Given look_at(py::handle x) {
    Given found;
    if (x.is_none()) return found;
    found.there = true;
    const Torch& torch = Torch::instance();
    const int is_tensor = PyObject_IsInstance(x.ptr(), torch.tensor.ptr());
    if (is_tensor < 0) throw py::error_already_set();
    if (is_tensor == 0) {
        found.type = Py_TYPE(x.ptr())->tp_name;
        return found;
    }
    const py::object dtype = get(x, torch.dtype);
    for (int i = 0; i < kKinds && found.kind == Kind::other; ++i)
        if (dtype.is(torch.dtypes[i])) found.kind = static_cast<Kind>(i);
    found.on_cpu = get(x, torch.is_cpu).ptr() == Py_True;
    if (!found.on_cpu && get(x, torch.is_cuda).ptr() == Py_True) found.cuda = x.attr("get_device")().cast<int>();
    if (!found.on_cpu && found.cuda < 0) return found;  // it has no memory that anything here could touch
    found.data = reinterpret_cast<char*>(call(x, torch.data_ptr).cast<std::uintptr_t>());
    found.elements = call(x, torch.numel).cast<int64_t>();
    found.contiguous = call(x, torch.is_contiguous).ptr() == Py_True;
    if (!found.contiguous && found.elements > 0) look_at_strides(x, found);
    return found;
}

}  // namespace given

// a * b, both sizes.
inline int64_t times(const char* name, int64_t a, int64_t b) {
    int64_t product = 0;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product))
        throw pybind11::value_error(std::string(name) + ": a size of " + std::to_string(a) + " times " +
                                    std::to_string(b));
    return product;
}

// a + b, both sizes.
inline int64_t plus(const char* name, int64_t a, int64_t b) {
    int64_t sum = 0;
    if (a < 0 || b < 0 || __builtin_add_overflow(a, b, &sum))
        throw pybind11::value_error(std::string(name) + ": a size of " + std::to_string(a) + " and " +
                                    std::to_string(b));
    return sum;
}

inline void expect(bool fits, const char* name, int64_t came, const std::string& expected) {
    if (!fits) throw pybind11::value_error(std::string(name) + ": " + std::to_string(came) + ", expected " + expected);
}

// An option that Python numbers 0 to most.
template <class Option>
Option option(const char* name, int64_t number, Option most) {
    expect(number >= 0 && number <= static_cast<int>(most), name, number,
           "from 0 to " + std::to_string(static_cast<int>(most)));
    return static_cast<Option>(number);
}

// What an entry takes from tensors: its kernels read memory of a CPU, or of one CUDA device.
class Memories {
  public:
    explicit Memories(int cuda_device) : cuda_(cuda_device) {}  // -1: of a CPU

    bool on_cpu() const { return cuda_ < 0; }

    // `count` elements of T or more, one after another.
    template <class T>
    T* array(const char* name, const Given& x, int64_t count) const {
        return reinterpret_cast<T*>(contiguous(name, x, KindOf<T>::value, count));
    }
    template <class T>
    T* array_or_null(const char* name, const Given& x, int64_t count) const {
        return x.there ? array<T>(name, x, count) : nullptr;
    }
    // The same of another's dtype.
    char* like(const char* name, const Given& x, DType dtype, int64_t count) const {
        return contiguous(name, x, static_cast<Kind>(dtype), count);
    }
    char* like_or_null(const char* name, const Given& x, DType dtype, int64_t count) const {
        return x.there ? like(name, x, dtype, count) : nullptr;
    }

    // Rows of `columns` elements, one after another, whose first ones are `stride` apart.
    char* rows(const char* name, const Given& x, DType dtype, int64_t rows, int64_t columns, int64_t stride) const {
        check(name, x, static_cast<Kind>(dtype));
        last_contiguous(name, x);
        expect(stride >= 0, name, stride, "a stride of at least 0");
        const bool any = rows > 0 && columns > 0;
        return holds(name, x, any ? plus(name, times(name, rows - 1, stride), columns) : times(name, rows, columns));
    }

    // `count` elements or more that lie anywhere up to the last one of x.
    char* holds(const char* name, const Given& x, int64_t count) const {
        expect(count <= x.elements, name, x.elements, "at least " + std::to_string(count) + " elements");
        if (count > 0 && x.data == nullptr)
            throw pybind11::value_error(std::string(name) + ": no memory, as when a storage was freed");
        return x.data;
    }

    void last_contiguous(const char* name, const Given& x) const {
        if (x.last_stride != 1)
            throw pybind11::type_error(std::string(name) + ": strided along its last dimension, expected contiguous");
    }

    // One of the dtypes that logits may have.
    DType dtype(const char* name, const Given& x) const {
        place(name, x);
        if (static_cast<int>(x.kind) > static_cast<int>(DType::f16)) refuse(name, x, "float32, bfloat16 or float16");
        return static_cast<DType>(x.kind);
    }

    void check(const char* name, const Given& x, Kind kind) const {
        place(name, x);
        if (x.kind != kind) refuse(name, x, kKindNames[static_cast<int>(kind)]);
    }

  private:
    char* contiguous(const char* name, const Given& x, Kind kind, int64_t count) const {
        check(name, x, kind);
        if (!x.contiguous) throw pybind11::type_error(std::string(name) + ": strided, expected contiguous");
        return holds(name, x, count);
    }

    // A tensor, and on this device.
    void place(const char* name, const Given& x) const {
        if (!x.there || x.type != nullptr)
            throw pybind11::type_error(std::string(name) + ": " + (x.there ? x.type : "None") + ", expected a tensor");
        if (on_cpu() ? x.on_cpu : x.cuda == cuda_) return;
        throw pybind11::value_error(std::string(name) + ": on " +
                                    (x.on_cpu     ? "the CPU"
                                     : x.cuda < 0 ? "another device"
                                                  : "cuda:" + std::to_string(x.cuda)) +
                                    ", expected " + (on_cpu() ? "the CPU" : "cuda:" + std::to_string(cuda_)));
    }

    [[noreturn]] static void refuse(const char* name, const Given& x, const std::string& expected) {
        throw pybind11::type_error(std::string(name) + ": " + kKindNames[static_cast<int>(x.kind)] + ", expected " +
                                   expected);
    }

    int cuda_;
};

}  // namespace rlhf_fast

namespace pybind11::detail {

template <>
struct type_caster<rlhf_fast::Given> {
    PYBIND11_TYPE_CASTER(rlhf_fast::Given, const_name("torch.Tensor | None"));
    bool load(handle x, bool) {
        value = rlhf_fast::given::look_at(x);
        return true;
    }
};

}  // namespace pybind11::detail
