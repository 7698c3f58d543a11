#!/usr/bin/env python3
"""Compares what annulus computed with the exact results stored in an example file. Standard library only.

    compare_expected.py INPUT.safetensors OUTPUT.safetensors

INPUT holds expected_out and expected_lse (float32), OUTPUT holds out and lse as `annulus run` wrote them. The unit of
the bars is "rounding": the error of the exact result when it is rounded once to the dtype of out. No program that
returns bfloat16 can do better than 1.0 x rounding; one that also rounds the probabilities to bfloat16, as the matrix
units demand, adds at most as much again:

    out    largest error <= 2.0 x largest rounding, rms <= 1.6 x rms of the rounding
           float32 out: as if it were bfloat16, because bfloat16 inputs bring bfloat16 probabilities
    lse    error <= 4e-6 max(1, |lse|), plus half a unit in the last place of the stored float32
"""

import array
import json
import math
import struct
import sys

MOST_OF_LARGEST = 2.0
MOST_OF_RMS = 1.6
LSE_ERROR = 4e-6
FLOAT32_HALF_ULP = 2.0 ** -24


def read_tensors(path):
    """{name: (dtype, shape, bytes)} of a safetensors file."""
    with open(path, "rb") as file:
        data = file.read()
    (header_bytes,) = struct.unpack_from("<Q", data)
    body = 8 + header_bytes
    tensors = {}
    for name, entry in json.loads(data[8:body]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = (entry["dtype"], entry["shape"], data[body + begin : body + end])
    return tensors


def words(code, data):
    values = array.array(code)
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def bits_to_floats(bits):
    return array.array("f", array.array("I", bits).tobytes())


def floats(dtype, data):
    if dtype == "F32":
        return words("f", data)
    if dtype == "F16":
        return array.array("f", struct.unpack(f"<{len(data) // 2}e", data))
    if dtype == "BF16":
        return bits_to_floats(bits << 16 for bits in words("H", data))
    sys.exit(f"compare_expected: dtype {dtype} is not a float type")


def rounded_to_bf16(values):
    """Nearest, ties to even."""
    words32 = array.array("I", array.array("f", values).tobytes())
    return bits_to_floats((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000 for bits in words32)


def errors(found, expected):
    """(largest, rms) difference; a NaN counts as infinitely wrong."""
    largest = squares = 0.0
    for a, b in zip(found, expected):
        error = abs(a - b) if a != b else 0.0
        error = math.inf if math.isnan(error) else error
        largest = max(largest, error)
        squares += error * error
    return largest, math.sqrt(squares / max(len(expected), 1))


def tensor(tensors, name, path):
    if name not in tensors:
        sys.exit(f"compare_expected: {path} has no tensor {name}")
    return tensors[name]


def check_out(expected, dtype, found):
    rounded = rounded_to_bf16(expected) if dtype != "F16" else floats("F16", struct.pack(f"<{len(expected)}e", *expected))
    largest, rms = errors(found, expected)
    rounding_largest, rounding_rms = errors(rounded, expected)
    passed = largest <= MOST_OF_LARGEST * rounding_largest and rms <= MOST_OF_RMS * rounding_rms
    print(f"out: {len(expected)} values, largest error {largest:.3g} = {largest / rounding_largest:.2f} x rounding "
          f"(bar {MOST_OF_LARGEST}), rms {rms:.3g} = {rms / rounding_rms:.2f} x rounding (bar {MOST_OF_RMS})")
    return passed


def check_lse(expected, _dtype, found):
    share = 0.0
    for a, b in zip(found, expected):
        bar = LSE_ERROR * max(1.0, abs(b)) + FLOAT32_HALF_ULP * abs(b)
        error = abs(a - b) if a != b else 0.0
        share = max(share, math.inf if math.isnan(error) else error / bar)
    print(f"lse: {len(expected)} values, largest error {share:.2f} x bar (4e-6 max(1, |lse|))")
    return share <= 1


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    inputs, outputs = read_tensors(sys.argv[1]), read_tensors(sys.argv[2])
    results = []
    for name, check in (("out", check_out), ("lse", check_lse)):
        dtype, expected_shape, data = tensor(inputs, "expected_" + name, sys.argv[1])
        found_dtype, shape, found_data = tensor(outputs, name, sys.argv[2])
        if shape != expected_shape:
            sys.exit(f"compare_expected: {name} has shape {shape}, expected {expected_shape}")
        expected, found = floats(dtype, data), floats(found_dtype, found_data)
        results.append(check(expected, found_dtype, found))
    print("matches the exact results" if all(results) else "DOES NOT MATCH the exact results")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
