#include "arrays.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <optional>
#include <string_view>

#include "refusal.h"

namespace annulus::python {
namespace {

struct NamedType {
  DType dtype;
  nb::dlpack::dtype_code code;
};
constexpr NamedType kTypes[] = {
    {DType::kFloat32, nb::dlpack::dtype_code::Float},
    {DType::kBFloat16, nb::dlpack::dtype_code::Bfloat},
    {DType::kFloat16, nb::dlpack::dtype_code::Float},
    {DType::kInt64, nb::dlpack::dtype_code::Int},
    {DType::kInt32, nb::dlpack::dtype_code::Int},
    {DType::kInt8, nb::dlpack::dtype_code::Int},
    {DType::kUInt8, nb::dlpack::dtype_code::UInt},
    {DType::kBool, nb::dlpack::dtype_code::Bool},
};

nb::dlpack::dtype dlpack_type(DType dtype) {
  for (const NamedType& type : kTypes) {
    if (type.dtype != dtype) continue;
    return {static_cast<std::uint8_t>(type.code), static_cast<std::uint8_t>(8 * size_bytes(dtype)),
            1};
  }
  return {};
}

std::optional<DType> dtype_of(nb::dlpack::dtype found) {
  for (const NamedType& type : kTypes)
    if (dlpack_type(type.dtype) == found) return type.dtype;
  return {};
}

// str(object), or nothing where Python has no answer.
std::string text_of(nb::handle object) {
  try {
    return nb::str(object).c_str();
  } catch (const nb::python_error&) {
    return {};
  }
}

std::string attribute_text(nb::handle object, const char* name) {
  return nb::hasattr(object, name) ? text_of(object.attr(name)) : std::string();
}

std::string type_text(nb::handle object) {
  const std::string module = attribute_text(object.type(), "__module__");
  const std::string name = attribute_text(object.type(), "__qualname__");
  return module.empty() || module == "builtins" ? name : module + "." + name;
}

// ml_dtypes' bfloat16 in NumPy has no DLPack code; its bits do.
bool is_numpy_bfloat16(nb::handle object) {
  return nb::hasattr(object, "__array_interface__") &&
         attribute_text(object, "dtype") == "bfloat16";
}

[[noreturn]] void refuse_dtype(const Argument& argument, const std::string& type,
                               const std::string& dtype) {
  refuse_with_fix(
      "convert it: numbers to float32, bfloat16 or float16, ids to int32, masks to bool",
      argument.operation, argument.name, type, " has dtype ", dtype, ", which Annulus cannot read");
}

[[noreturn]] void refuse_object(nb::handle object, const Argument& argument) {
  const char *operation = argument.operation, *name = argument.name;
  const std::string type = type_text(object);
  if (type.find("Tracer") != std::string::npos) {
    refuse_with_fix("call annulus.jax." + std::string(operation) + " inside jit, grad and vmap",
                    operation, name, " is a tracer of jax (", type, ")");
  }
  const std::string device = attribute_text(object, "device");
  const bool elsewhere = !device.empty() && device.find("cpu") == std::string::npos &&
                         device.find("Cpu") == std::string::npos &&
                         device.find("CPU") == std::string::npos;
  if (elsewhere) {
    refuse_with_fix("move it to the CPU, e.g. with .cpu()", operation, name, " is on device ",
                    device, ", Annulus computes on CPUs");
  }
  const std::string dtype = attribute_text(object, "dtype");
  if (!dtype.empty()) refuse_dtype(argument, " (" + type + ")", dtype);
  refuse_with_fix("pass an array of NumPy, PyTorch or JAX", operation, name, " is a ", type,
                  ", expected an array");
}

// Not valid where the object is no array, or none that may be written. Without conversion: what an
// output's copy receives would be thrown away.
nb::ndarray<> imported(nb::handle object, bool writable) {
  nb::ndarray<> array;
  nb::ndarray<nb::ro> read_only;
  if (writable) {
    nb::try_cast(object, array, false);
  } else if (nb::try_cast(object, read_only, false)) {
    array = nb::ndarray<>(read_only.handle());
  }
  return array;
}

// A tensor of PyTorch by its attributes, which takes a third of the time of its __dlpack__. None
// for everything else, and for tensors whose memory is not what it seems: those go the long way.
struct PlainTensor {
  nb::object tensor;
  DType dtype = DType::kFloat32;
  std::uintptr_t data = 0;
  nb::object shape, strides;
};

struct Names {
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* layout = PyUnicode_InternFromString("layout");
  PyObject* is_nested = PyUnicode_InternFromString("is_nested");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
};

std::optional<DType> torch_dtype(nb::handle dtype) {
  // PyTorch's dtypes are singletons that live as long as the process.
  static std::map<PyObject*, std::optional<DType>> known;
  const auto found = known.find(dtype.ptr());
  if (found != known.end()) return found->second;
  const std::string text = text_of(dtype);
  std::optional<DType> result;
  for (const NamedType& type : kTypes)
    if (text == "torch." + std::string(name(type.dtype))) result = type.dtype;
  return known[dtype.ptr()] = result;
}

std::optional<PlainTensor> plain_tensor(nb::handle object) {
  PyTypeObject* type = Py_TYPE(object.ptr());
  const std::string_view type_name(type->tp_name);
  if (type_name != "Tensor" && type_name != "Parameter") return {};
  // The two types whose methods are PyTorch's own.
  static PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
  if (tensor_type == nullptr) {
    const nb::object torch =
        nb::module_::import_("sys").attr("modules").attr("get")("torch", nb::none());
    if (torch.is_none() || !nb::hasattr(torch, "nn")) return {};
    tensor_type = reinterpret_cast<PyTypeObject*>(torch.attr("Tensor").ptr());
    parameter_type = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
  }
  if (type != tensor_type && type != parameter_type) return {};
  // Attributes by interned names: some hundred nanoseconds less a tensor.
  static const Names names;
  const auto get = [&](PyObject* name) { return nb::steal(PyObject_GetAttr(object.ptr(), name)); };
  const auto call = [&](PyObject* name) {
    return nb::steal(PyObject_CallMethodNoArgs(object.ptr(), name));
  };
  static PyObject* const strided =
      nb::object(nb::module_::import_("torch").attr("strided")).release().ptr();
  if (get(names.is_cpu).ptr() != Py_True || get(names.layout).ptr() != strided ||
      get(names.is_nested).ptr() == Py_True || call(names.is_neg).ptr() == Py_True)
    return {};
  const auto dtype = torch_dtype(get(names.dtype));
  if (!dtype) return {};
  const nb::object data = call(names.data_ptr);
  if (!data.is_valid()) throw nb::python_error();
  return PlainTensor{nb::borrow(object), *dtype, nb::cast<std::uintptr_t>(data), get(names.shape),
                     call(names.stride)};
}

std::shared_ptr<void> shared(nb::ndarray<> array) {
  return std::make_shared<nb::ndarray<>>(std::move(array));
}

// Memory that kernels like and JAX takes without a copy.
constexpr std::align_val_t kAlignment{64};
struct Free {
  void operator()(void* p) const noexcept { ::operator delete(p, kAlignment); }
};
void* allocate(std::int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(std::max<std::int64_t>(bytes, 64)), kAlignment);
}

}  // namespace

DType dtype_named(const std::string& wanted) {
  for (const NamedType& type : kTypes)
    if (name(type.dtype) == wanted) return type.dtype;
  refuse("annulus", "no dtype is named '", wanted, "'");
}

void Array::describe(const ArraySpec& spec) {
  static const std::byte zeros[64]{};
  const auto* known = std::find_if(std::begin(kTypes), std::end(kTypes),
                                   [&](const NamedType& t) { return name(t.dtype) == spec.dtype; });
  if (known == std::end(kTypes)) refuse_dtype(argument_, "", spec.dtype);
  dtype_ = known->dtype, data_ = const_cast<std::byte*>(zeros);
  shape_ = spec.shape, strides_.assign(spec.shape.size(), 0);
  require_few_axes();
}

Array::Array(nb::handle object, const Argument& argument, bool writable) : argument_(argument) {
  if (nb::isinstance<ArraySpec>(object)) {
    describe(nb::cast<const ArraySpec&>(object));
    return;
  }
  if (const auto plain = plain_tensor(object)) {
    dtype_ = plain->dtype, data_ = reinterpret_cast<void*>(plain->data);
    for (const nb::handle extent : plain->shape) shape_.push_back(nb::cast<std::int64_t>(extent));
    for (const nb::handle stride : plain->strides)
      strides_.push_back(nb::cast<std::int64_t>(stride));
    keep_alive_ = std::make_shared<nb::object>(plain->tensor);
    require_few_axes();
    return;
  }
  nb::object source = nb::borrow(object);
  nb::ndarray<> array = imported(source, writable);
  std::optional<DType> dtype;
  if (!array.is_valid() && is_numpy_bfloat16(object)) {
    source = object.attr("view")("uint16"), dtype = DType::kBFloat16;
    array = imported(source, writable);
  }
  if (!array.is_valid() && writable && imported(source, false).is_valid()) {
    refuse_with_fix("pass an array that may be written", argument.operation, argument.name,
                    " is read-only");
  }
  if (array.is_valid() && !dtype) dtype = dtype_of(array.dtype());
  if (!dtype || array.device_type() != nb::device::cpu::value) refuse_object(object, argument);
  const bool of_numpy = std::string_view(Py_TYPE(object.ptr())->tp_name) == "numpy.ndarray";
  if (!of_numpy && nb::hasattr(object, "is_neg") && nb::cast<bool>(object.attr("is_neg")())) {
    refuse_with_fix("call resolve_neg() on it", argument.operation, argument.name,
                    " is a view whose signs are not in its memory");
  }
  dtype_ = *dtype, data_ = array.data();
  for (std::size_t axis = 0; axis < array.ndim(); ++axis) {
    shape_.push_back(static_cast<std::int64_t>(array.shape(axis)));
    strides_.push_back(array.stride(axis));
  }
  keep_alive_ = shared(std::move(array));
  require_few_axes();
}

void Array::require_few_axes() const {
  if (rank() > 4)
    refuse(argument_.operation, argument_.name, " has ", rank(), " axes, expected at most 4");
}

void Array::require_rank(std::int64_t expected, const char* axes) const {
  if (rank() == expected) return;
  std::string shape;
  for (const std::int64_t extent : shape_)
    shape += (shape.empty() ? "" : ", ") + std::to_string(extent);
  refuse(argument_.operation, argument_.name, " has shape [", shape, "], expected ", expected,
         " axes ", axes);
}

void Array::require_dtype(std::initializer_list<DType> accepted) const {
  if (std::find(accepted.begin(), accepted.end(), dtype_) != accepted.end()) return;
  std::string names;
  for (const DType dtype : accepted)
    names += (names.empty() ? "" : " or ") + std::string(name(dtype));
  refuse_with_fix("convert it to " + std::string(name(*accepted.begin())), argument_.operation,
                  argument_.name, " has dtype ", name(dtype_), ", expected ", names);
}

MutableTensorView Array::view() const {
  // Frameworks may give empty tensors no memory; views without data stand for "not given".
  static std::byte nothing[64];
  const bool empty = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();
  if (data_ == nullptr && !empty) {
    refuse_with_fix("pass an array with memory of its own", argument_.operation, argument_.name,
                    " has no memory");
  }
  MutableTensorView view{data_ != nullptr ? data_ : nothing, dtype_, {1, 1, 1, 1}, {}};
  for (std::size_t axis = 0; axis < shape_.size(); ++axis)
    view.shape[axis] = shape_[axis], view.strides[axis] = strides_[axis];
  return view;
}

MutableTensorView Array::lse_view() const {
  require_rank(3, "[batch, heads, seq]");
  require_dtype({DType::kFloat32});
  MutableTensorView view = this->view();
  std::swap(view.shape[1], view.shape[2]), std::swap(view.strides[1], view.strides[2]);
  return view;
}

MutableTensorView Array::sinks_view() const {
  if (rank() != 1) require_rank(2, "[num_heads, n], or one axis [num_heads] or [num_sinks]");
  MutableTensorView view = this->view();
  if (rank() == 1) view.shape[1] = 0;
  return view;
}

Array Array::narrowed() const {
  const TensorView from = view();
  Array result(*this);
  std::int64_t count = 1;
  for (std::size_t axis = shape_.size(); axis-- > 0; count *= shape_[axis])
    result.strides_[axis] = count;
  result.keep_alive_ = std::shared_ptr<void>(allocate(count * 4), Free());
  result.data_ = result.keep_alive_.get(), result.dtype_ = DType::kInt32;
  narrow(from, argument_, static_cast<std::int32_t*>(result.data_));
  return result;
}

void narrow(const TensorView& from, const Argument& argument, std::int32_t* to) {
  for (std::int64_t a = 0; a < from.shape[0]; ++a) {
    for (std::int64_t b = 0; b < from.shape[1]; ++b) {
      std::int64_t wide = 0;
      std::memcpy(&wide, from.at(a, b, 0, 0), 8);
      *to = static_cast<std::int32_t>(wide);
      if (*to++ != wide)
        refuse(argument.operation, argument.name, " holds ", wide, ", which int32 cannot");
    }
  }
}

nb::object aligned_array(const std::vector<std::int64_t>& shape, const std::string& dtype) {
  const DType type = dtype_named(dtype);
  std::int64_t bytes = size_bytes(type);
  std::vector<std::size_t> extents;
  for (const std::int64_t extent : shape)
    bytes *= extent, extents.push_back(static_cast<std::size_t>(extent));
  void* memory = allocate(bytes);
  const nb::capsule owner(memory, [](void* p) noexcept { Free()(p); });
  return nb::cast(nb::ndarray<nb::array_api>(memory, extents.size(), extents.data(), owner, nullptr,
                                             dlpack_type(type)));
}

}  // namespace annulus::python
