// What our handlers need of XLA's foreign function interface, the C ABI by which XLA calls code
// that it was not built with. Written down here, not copied from a jaxlib, so that one build serves
// every jaxlib; a test compares each size and offset with the headers of the jaxlib at hand.
//
// How the ABI stays compatible: every struct begins with its size as its maker knows it and a list
// of extensions, and functions of the API table are only ever appended, so a table that is long
// enough has the function. The one exception is StateArgs, see there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace annulus::xla {

// The version these declarations follow, and the oldest one with which they are of use: before it,
// state had no registered types.
inline constexpr int kMajorVersion = 0;
inline constexpr int kMinorVersion = 3;
inline constexpr int kOldestMinorVersion = 2;

// Made and owned by XLA.
struct Error;
struct Future;
struct ExecutionContext;

struct Extension {
  std::size_t struct_size;
  std::int32_t type;  // kMetadataExtension
  Extension* next;
};
inline constexpr std::int32_t kMetadataExtension = 1;

struct Header {
  std::size_t struct_size;
  Extension* extensions;
};

struct Version {
  Header header;
  int major;
  int minor;
};

// XLA asks a handler for these once, when it is registered.
struct Metadata {
  std::size_t struct_size;
  Version version;       // that the handler was built for
  std::uint32_t traits;  // 0: none
};
struct MetadataExtension {
  Extension extension;
  Metadata* metadata;
};

enum class Code : std::int32_t {
  kCancelled = 1,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kResourceExhausted = 8,
  kUnimplemented = 12,
  kInternal = 13,
};

enum class DataType : std::int32_t {
  kPred = 1,  // bool, one byte
  kS8 = 2,
  kS32 = 4,
  kS64 = 5,
  kU8 = 6,
  kU32 = 8,
  kF16 = 10,
  kF32 = 11,
  kF64 = 12,
  kBF16 = 16,
};

// A dense array, the last axis fastest.
struct Buffer {
  Header header;
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;  // [rank]
};
inline constexpr std::int32_t kBuffer = 1;  // the type of an argument or result

struct Arguments {
  Header header;
  std::int64_t size;
  std::int32_t* types;  // [size]
  void** values;        // [size] Buffer*
};
using Results = Arguments;

struct Text {  // not terminated
  const char* data;
  std::size_t size;
};
struct Scalar {
  DataType dtype;
  void* value;
};

// What a call was compiled with, sorted by name.
struct Attributes {
  Header header;
  std::int64_t size;
  std::int32_t* types;  // [size]
  Text** names;         // [size]
  void** values;        // [size] Scalar* or Text*
};
inline constexpr std::int32_t kScalarAttribute = 3;
inline constexpr std::int32_t kTextAttribute = 4;

enum class Stage : std::int32_t {
  kInstantiate = 0,  // once per call site of a compiled program, before anything runs
  kExecute = 3,
};

struct Api;

// What a handler is called with. Gone when it returns; the memory of buffers stays until its future
// is complete.
struct CallFrame {
  Header header;
  const Api* api;
  ExecutionContext* context;
  Stage stage;
  Arguments arguments;
  Results results;
  Attributes attributes;
  Future* future;  // set by the handler if it goes on after it has returned
};

using Handler = Error*(CallFrame*);  // null: done, or the future says when

struct CreateErrorArgs {
  Header header;
  const char* message;  // copied
  Code code;
};
struct DestroyErrorArgs {
  Header header;
  Error* error;
};
struct TypeId {
  std::int64_t id;  // 0: to be given
};
struct TypeInfo {
  Header header;
  void (*deleter)(void*);
};
struct RegisterTypeArgs {
  Header header;
  Text name;
  TypeId* type;
  const TypeInfo* info;  // must stay
};
// State that a call site keeps from kInstantiate on. Version 0.3 put the stage into the middle;
// XLA takes the older layout by its size.
struct StateArgs {
  Header header;
  ExecutionContext* context;
  Stage stage;  // to which the state belongs
  TypeId* type;
  void* state;
};
struct OldStateArgs {
  Header header;
  ExecutionContext* context;
  TypeId* type;
  void* state;
};
struct CreateFutureArgs {
  Header header;
  Future* future;  // out
};
struct CompleteArgs {
  Header header;
  Future* future;
};
struct CompleteWithErrorArgs {
  Header header;
  Future* future;
  Error* error;  // taken
};
// One execution of a program on all its devices has one id, which no other execution has.
struct RunIdArgs {
  Header header;
  ExecutionContext* context;
  std::int64_t run_id;  // out
};
struct DeviceOrdinalArgs {
  Header header;
  ExecutionContext* context;
  std::int32_t device_ordinal;  // out
};

using Unused = void();

struct Api {
  Header header;
  Version version;
  const void* internal;
  Error* (*create_error)(CreateErrorArgs*);
  Unused* get_error_message;
  void (*destroy_error)(DestroyErrorArgs*);
  Unused* register_handler;
  Unused* get_stream;
  Error* (*register_type)(RegisterTypeArgs*);
  Unused* get_context;
  Error* (*set_state)(void*);  // StateArgs or OldStateArgs
  Error* (*get_state)(void*);
  Unused* allocate;
  Unused* free;
  Unused* schedule;
  Unused* num_threads;
  Error* (*create_future)(CreateFutureArgs*);
  Error* (*complete)(CompleteArgs*);
  Error* (*complete_with_error)(CompleteWithErrorArgs*);
  Error* (*get_run_id)(RunIdArgs*);
  Error* (*get_device_ordinal)(DeviceOrdinalArgs*);
};

// 64-bit machines only, as XLA itself.
static_assert(sizeof(void*) == 8 && sizeof(std::size_t) == 8 && sizeof(int) == 4);
static_assert(sizeof(Extension) == 24 && sizeof(Header) == 16 && sizeof(Version) == 24);
static_assert(offsetof(Metadata, version) == 8 && offsetof(Metadata, traits) == 32);
static_assert(sizeof(MetadataExtension) == 32);
static_assert(offsetof(Buffer, data) == 24 && sizeof(Buffer) == 48);
static_assert(sizeof(Arguments) == 40 && sizeof(Attributes) == 48 && sizeof(Scalar) == 16);
static_assert(offsetof(CallFrame, stage) == 32 && offsetof(CallFrame, arguments) == 40 &&
              offsetof(CallFrame, attributes) == 120 && offsetof(CallFrame, future) == 168);
static_assert(sizeof(StateArgs) == 48 && sizeof(OldStateArgs) == 40);
static_assert(offsetof(Api, create_error) == 48 && offsetof(Api, get_device_ordinal) == 184);

}  // namespace annulus::xla
