"""The declarations of XLA's FFI in python/src/xla_ffi.h against the headers of the jaxlib at hand."""

import os
import re
import shutil
import subprocess

import pytest

jax = pytest.importorskip("jax")

pytestmark = pytest.mark.jax

# (ours, theirs, our fields by theirs)
STRUCTS = [
    ("Extension", "XLA_FFI_Extension_Base", "struct_size type next"),
    (
        "Version", "XLA_FFI_Api_Version",
        "header=struct_size header.extensions=extension_start major=major_version minor=minor_version",
    ),
    ("Metadata", "XLA_FFI_Metadata", "struct_size version=api_version traits"),
    ("MetadataExtension", "XLA_FFI_Metadata_Extension", "extension=extension_base metadata"),
    ("Buffer", "XLA_FFI_Buffer", "header=struct_size dtype data rank dims"),
    ("Arguments", "XLA_FFI_Args", "header=struct_size size types values=args"),
    ("Results", "XLA_FFI_Rets", "header=struct_size size types values=rets"),
    ("Text", "XLA_FFI_ByteSpan", "data=ptr size=len"),
    ("Scalar", "XLA_FFI_Scalar", "dtype value"),
    ("Attributes", "XLA_FFI_Attrs", "header=struct_size size types names values=attrs"),
    (
        "CallFrame", "XLA_FFI_CallFrame",
        "header=struct_size api context=ctx stage arguments=args results=rets attributes=attrs future",
    ),
    ("CreateErrorArgs", "XLA_FFI_Error_Create_Args", "header=struct_size message code=errc"),
    ("DestroyErrorArgs", "XLA_FFI_Error_Destroy_Args", "header=struct_size error"),
    ("TypeId", "XLA_FFI_TypeId", "id=type_id"),
    ("TypeInfo", "XLA_FFI_TypeInfo", "header=struct_size deleter"),
    ("RegisterTypeArgs", "XLA_FFI_Type_Register_Args", "header=struct_size name type=type_id info=type_info"),
    ("StateArgs", "XLA_FFI_State_Set_Args", "header=struct_size context=ctx stage type=type_id state"),
    ("StateArgs", "XLA_FFI_State_Get_Args", "header=struct_size context=ctx stage type=type_id state"),
    ("CreateFutureArgs", "XLA_FFI_Future_Create_Args", "header=struct_size future"),
    ("CompleteArgs", "XLA_FFI_Future_SetAvailable_Args", "header=struct_size future"),
    ("CompleteWithErrorArgs", "XLA_FFI_Future_SetError_Args", "header=struct_size future error"),
    ("RunIdArgs", "XLA_FFI_RunId_Get_Args", "header=struct_size context=ctx run_id"),
    ("DeviceOrdinalArgs", "XLA_FFI_DeviceOrdinal_Get_Args", "header=struct_size context=ctx device_ordinal"),
    (
        "Api", "XLA_FFI_Api",
        "header=struct_size version=api_version internal=internal_api create_error=XLA_FFI_Error_Create"
        " destroy_error=XLA_FFI_Error_Destroy register_type=XLA_FFI_Type_Register set_state=XLA_FFI_State_Set"
        " get_state=XLA_FFI_State_Get create_future=XLA_FFI_Future_Create complete=XLA_FFI_Future_SetAvailable"
        " complete_with_error=XLA_FFI_Future_SetError get_run_id=XLA_FFI_RunId_Get"
        " get_device_ordinal=XLA_FFI_DeviceOrdinal_Get",
    ),
]  # fmt: skip

# Metadata grew a field behind ours, and the table may grow at its end.
MAY_BE_LARGER = {"Metadata", "Api"}

NUMBERS = [
    ("kMetadataExtension", "XLA_FFI_Extension_Metadata"),
    ("kBuffer", "XLA_FFI_ArgType_BUFFER"),
    ("kBuffer", "XLA_FFI_RetType_BUFFER"),
    ("kScalarAttribute", "XLA_FFI_AttrType_SCALAR"),
    ("kTextAttribute", "XLA_FFI_AttrType_STRING"),
    ("kMajorVersion", "XLA_FFI_API_MAJOR"),
    ("Stage::kInstantiate", "XLA_FFI_ExecutionStage_INSTANTIATE"),
    ("Stage::kExecute", "XLA_FFI_ExecutionStage_EXECUTE"),
    ("Code::kCancelled", "XLA_FFI_Error_Code_CANCELLED"),
    ("Code::kInvalidArgument", "XLA_FFI_Error_Code_INVALID_ARGUMENT"),
    ("Code::kDeadlineExceeded", "XLA_FFI_Error_Code_DEADLINE_EXCEEDED"),
    ("Code::kResourceExhausted", "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED"),
    ("Code::kUnimplemented", "XLA_FFI_Error_Code_UNIMPLEMENTED"),
    ("Code::kInternal", "XLA_FFI_Error_Code_INTERNAL"),
    *((f"DataType::k{kind[0] + kind[1:].lower() if kind == 'PRED' else kind}", f"XLA_FFI_DataType_{kind}")
      for kind in ("PRED", "S8", "S32", "S64", "U8", "U32", "F16", "F32", "F64", "BF16")),
]  # fmt: skip


def older(ours, fields):
    """Before version 0.3 a state's stage was not said."""
    return ("OldStateArgs", fields.replace(" stage", "")) if ours == "StateArgs" else (ours, fields)


def program(version):
    """A C++ program that does not compile unless every size, offset and number agrees."""
    lines = ['#include "xla_ffi.h"', '#include "xla/ffi/api/c_api.h"', "using namespace annulus::xla;"]
    for ours, theirs, fields in STRUCTS:
        ours, fields = older(ours, fields) if version < 3 else (ours, fields)
        relation = "<=" if ours in MAY_BE_LARGER else "=="
        lines.append(f'static_assert(sizeof({ours}) {relation} sizeof({theirs}), "{theirs}");')
        for field in fields.split():
            mine, _, other = field.partition("=")
            other = other or mine
            lines.append(f'static_assert(offsetof({ours}, {mine}) == offsetof({theirs}, {other}), "{theirs}.{other}");')
            if "." not in mine and mine != "header":
                same = relation if mine == "metadata" else "=="
                sizes = f"sizeof({ours}::{mine}) {same} sizeof({theirs}::{other})"
                lines.append(f'static_assert({sizes}, "{theirs}.{other}");')
    lines += [f'static_assert(static_cast<int>({ours}) == {theirs}, "{theirs}");' for ours, theirs in NUMBERS]
    return "\n".join([*lines, "int main() {}"]) + "\n"


def test_our_declarations_are_xlas(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    headers = jax.ffi.include_dir()
    sources = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")
    if compiler is None or not os.path.exists(os.path.join(headers, "xla/ffi/api/c_api.h")):
        pytest.skip("needs a C++ compiler and jaxlib's headers")
    if not os.path.exists(os.path.join(sources, "xla_ffi.h")):
        pytest.skip("needs the sources of the package")
    path = tmp_path / "layout.cc"
    with open(os.path.join(headers, "xla/ffi/api/c_api.h")) as header:
        version = int(re.search(r"define XLA_FFI_API_MINOR (\d+)", header.read())[1])
    path.write_text(program(version))
    command = [
        compiler,
        "-std=c++20",
        "-Wno-invalid-offsetof",
        "-isystem",
        headers,
        "-I",
        sources,
        "-fsyntax-only",
        str(path),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
