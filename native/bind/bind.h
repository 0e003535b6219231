// bind.h: shared helpers of the bindings. A binding checks its arguments, unlocks the interpreter and calls.
//
// Checks throw std::invalid_argument, which Python sees as ValueError. The message says what was found and
// what was expected.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels/kernel_table.h"
#include "kernels/tuning.h"
#include "ops/rows.h"

namespace argosy {

namespace nb = nanobind;

void bind_cached_experts(nb::module_& m);
void bind_cluster(nb::module_& m);
void bind_expert_table(nb::module_& m);
void bind_encoder(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_recurrent(nb::module_& m);
void bind_mixers(nb::module_& m);
void bind_residual(nb::module_& m);
void bind_stack_adapter(nb::module_& m);
void bind_stack(nb::module_& m);
void bind_tables(nb::module_& m);
void bind_probe(nb::module_& m);
void bind_replay(nb::module_& m);
void bind_store(nb::module_& m);
void bind_watermark(nb::module_& m);

// The kernels of the named instruction set; without a name, of the best one here.
inline const KernelTable& kernels_named(const std::optional<std::string>& instruction_set) {
  return instruction_set ? kernel_table(*instruction_set) : best_kernels();
}

// Arrays. nanobind accepts every element type, so that read_array and write_array can say what they found.
class Array : public nb::ndarray<nb::ro, nb::device::cpu> {  // read only
 public:
  using Base = nb::ndarray<nb::ro, nb::device::cpu>;
  Array() = default;
  explicit Array(Base&& array) : Base(std::move(array)) {}
};
using OutArray = nb::ndarray<nb::device::cpu>;  // written to

// A Base whose elements must be T: Python's type checkers see NDArray[T].
template <class T, class Base>
class TypedArray : public Base {
 public:
  using Base::Base;
  TypedArray() = default;
  explicit TypedArray(Base array) : Base(std::move(array)) {}
};
template <class T>
using ArrayOf = TypedArray<T, Array>;
template <class T>
using OutArrayOf = TypedArray<T, OutArray>;
template <class T>  // returned; const T: Python must not write to it
using View = TypedArray<std::remove_const_t<T>, nb::ndarray<nb::numpy, T>>;

// Text as a template argument.
template <size_t size>
struct Text {
  char chars[size] = {};
  consteval Text(const char (&text)[size]) { std::copy_n(text, size, chars); }
};

// A Base that signatures call `name`: an alias in native/bind/stubs.pat, or any type as Python writes it.
template <class Base, Text name>
struct Named : Base {
  using Base::Base;
  Named() = default;
  Named(Base base) : Base(std::move(base)) {}
  const Base& base() const { return *this; }
};

// The type of nb::typed<nb::object, TypeName<name>>, an object that signatures call `name`.
template <Text name>
struct TypeName {};

using InstructionSetName = Named<std::string, "InstructionSet">;
// ask_ahead, few_ask_ahead, two_panels_from, amx_from.
using NamedTuning = Named<std::tuple<std::string, std::string, int64_t, int64_t>, "Tuning">;

// Throws std::invalid_argument for an unknown name, or a number out of range.
inline Tuning parse_tuning(const NamedTuning& named) {
  const auto& [ask_ahead, few_ask_ahead, two_panels_from, amx_from] = named.base();
  if (two_panels_from < kFewestForTwoPanels || two_panels_from > kMostForOnePanel + 1) {
    throw std::invalid_argument("two_panels_from is " + std::to_string(two_panels_from) + ", expected " +
                                std::to_string(kFewestForTwoPanels) + " to " +
                                std::to_string(kMostForOnePanel + 1));
  }
  if (amx_from < 0)
    throw std::invalid_argument("amx_from is " + std::to_string(amx_from) + ", expected 0 or more");
  return {.ask_ahead = ask_ahead_named(ask_ahead),
          .few_ask_ahead = ask_ahead_named(few_ask_ahead),
          .two_panels_from = two_panels_from,
          .amx_from = amx_from};
}

constexpr int64_t kAnySize = -1;

[[noreturn]] inline void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

inline void require_size(std::string_view name, int64_t found, int64_t expected) {
  if (found != expected) {
    refuse(std::string(name) + " is " + std::to_string(found) + ", expected " + std::to_string(expected));
  }
}

inline void require_range(std::string_view name, int64_t found, int64_t lowest, int64_t highest) {
  if (found < lowest || found > highest) {
    refuse(std::string(name) + " is " + std::to_string(found) + ", expected " + std::to_string(lowest) +
           " to " + std::to_string(highest));
  }
}

// An element of a Python list. nanobind turns None into a null pointer.
template <class T>
const T& require_item(const std::string& name, const T* item) {
  if (item == nullptr) {
    refuse(name + " is None, expected " + nb::cast<std::string>(nb::type_name(nb::type<T>())));
  }
  return *item;
}

inline std::string item_name(const char* list, size_t at) {
  return std::string(list) + "[" + std::to_string(at) + "]";
}

inline std::string dtype_name(nb::dlpack::dtype dtype) {
  switch (nb::dlpack::dtype_code(dtype.code)) {
    case nb::dlpack::dtype_code::Float:
      return "float" + std::to_string(dtype.bits);
    case nb::dlpack::dtype_code::Int:
      return "int" + std::to_string(dtype.bits);
    case nb::dlpack::dtype_code::UInt:
      return "uint" + std::to_string(dtype.bits);
    case nb::dlpack::dtype_code::Bool:
      return "bool";
    default:
      return "dtype code " + std::to_string(dtype.code) + " of " + std::to_string(dtype.bits) + " bits";
  }
}

template <class ArrayType>
std::string shape_text(const ArrayType& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

inline std::string shape_text(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (const int64_t size : shape) {
    text += (text.size() > 1 ? ", " : "") + (size == kAnySize ? std::string("any") : std::to_string(size));
  }
  return text + "]";
}

enum class Order { c, rows };  // C order in all, or in each row, with any stride of the first axis

// Checks element type, shape (kAnySize accepts any size), order and alignment.
template <class T, class ArrayType>
void require_array(const char* name, const ArrayType& array, std::initializer_list<int64_t> shape,
                   Order order = Order::c) {
  if (array.dtype() != nb::dtype<T>()) {
    refuse(std::string(name) + " is " + dtype_name(array.dtype()) + ", expected " +
           dtype_name(nb::dtype<T>()));
  }
  bool fits = array.ndim() == shape.size();
  size_t i = 0;
  for (const int64_t size : shape) {
    fits = fits && (size == kAnySize || int64_t(array.shape(i)) == size);
    ++i;
  }
  if (!fits)
    refuse(std::string(name) + " has shape " + shape_text(array) + ", expected " + shape_text(shape));
  int64_t stride = 1;
  for (i = array.ndim(); i-- > (order == Order::rows ? 1 : 0);) {
    if (array.size() > 0 && array.shape(i) != 1 && array.stride(i) != stride) {
      refuse((order == Order::rows ? "a row of " : "") + std::string(name) + " is not C-contiguous");
    }
    stride *= int64_t(array.shape(i));
  }
  if (reinterpret_cast<uintptr_t>(array.data()) % alignof(T) != 0) {
    refuse(std::string(name) + " is not aligned to its elements");
  }
}

template <class T>
const T* read_array(const char* name, const ArrayOf<T>& array, std::initializer_list<int64_t> shape) {
  require_array<T>(name, array, shape);
  return static_cast<const T*>(array.data());
}

template <class T>
T* write_array(const char* name, const OutArrayOf<T>& array, std::initializer_list<int64_t> shape) {
  require_array<T>(name, array, shape);
  return static_cast<T*>(array.data());
}

template <class ArrayType>
int64_t row_stride(const ArrayType& array) {
  return array.size() > 0 ? array.stride(0) : 0;
}

inline Rows<const float> read_rows(const char* name, const ArrayOf<float>& array,
                                   std::initializer_list<int64_t> shape) {
  require_array<float>(name, array, shape, Order::rows);
  return {static_cast<const float*>(array.data()), row_stride(array)};
}

// Refuses rows that overlap.
inline Rows<float> write_rows(const char* name, const OutArrayOf<float>& array,
                              std::initializer_list<int64_t> shape) {
  require_array<float>(name, array, shape, Order::rows);
  const int64_t stride = row_stride(array);
  if (array.size() > 0 && array.shape(0) > 1 && std::abs(stride) < int64_t(array.size() / array.shape(0))) {
    refuse("rows of " + std::string(name) + " overlap: they are " + std::to_string(stride) +
           " elements apart");
  }
  return {static_cast<float*>(array.data()), stride};
}

}  // namespace argosy

// Refuses numpy's scalars of dates, which export a buffer without strides: nanobind reads the strides
// unchecked.
template <>
struct nanobind::detail::type_caster<argosy::Array> {
  NB_TYPE_CASTER(argosy::Array, make_caster<argosy::Array::Base>::Name)

  bool from_python(handle source, uint8_t flags, cleanup_list* cleanup) noexcept {
    const object type = steal(PyType_GetName(Py_TYPE(source.ptr())));
    if (!type.is_valid()) return PyErr_Clear(), false;
    for (const char* refused : {"datetime64", "timedelta64"}) {
      if (PyUnicode_CompareWithASCIIString(type.ptr(), refused) == 0) return false;
    }
    make_caster<argosy::Array::Base> caster;
    if (!caster.from_python(source, flags, cleanup)) return false;
    value = argosy::Array(std::move(caster.value));
    return true;
  }

  static handle from_cpp(const argosy::Array& array, rv_policy policy, cleanup_list* cleanup) noexcept {
    return make_caster<argosy::Array::Base>::from_cpp(array, policy, cleanup);
  }
};

template <class T, class Base>
struct nanobind::detail::type_caster<argosy::TypedArray<T, Base>> {
  using Array = argosy::TypedArray<T, Base>;
  NB_TYPE_CASTER(Array, const_name("numpy.ndarray[dtype=") + dtype_traits<T>::name + const_name("]"))

  bool from_python(handle source, uint8_t flags, cleanup_list* cleanup) noexcept {
    make_caster<Base> caster;
    if (!caster.from_python(source, flags, cleanup)) return false;
    value = Array(std::move(caster.value));
    return true;
  }

  static handle from_cpp(const Array& array, rv_policy policy, cleanup_list* cleanup) noexcept {
    return make_caster<Base>::from_cpp(array, policy, cleanup);
  }
};

template <class Base, argosy::Text name>
struct nanobind::detail::type_caster<argosy::Named<Base, name>> {
  using NamedBase = argosy::Named<Base, name>;
  NB_TYPE_CASTER(NamedBase, const_name(name.chars))

  bool from_python(handle source, uint8_t flags, cleanup_list* cleanup) noexcept {
    make_caster<Base> caster;
    if (!caster.from_python(source, flags, cleanup)) return false;
    value = NamedBase(caster.operator cast_t<Base>());
    return true;
  }

  static handle from_cpp(const NamedBase& named, rv_policy policy, cleanup_list* cleanup) noexcept {
    return make_caster<Base>::from_cpp(named.base(), policy, cleanup);
  }
};

template <argosy::Text name>
struct nanobind::detail::type_caster<argosy::TypeName<name>> {
  static constexpr auto Name = const_name(name.chars);
};
