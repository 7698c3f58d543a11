"""What the tests of the command line share: safetensors files, the formula, and calls that check how they end."""

import json
import math
import os
import pathlib
import random
import struct
import subprocess
import tempfile
import unittest

CODES = {"F16": "e", "F32": "f", "F64": "d", "I32": "i", "I64": "q", "U8": "B", "BOOL": "?"}


def bf16_bits(value):
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def from_bf16_bits(bits):
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def count(shape):
    return math.prod(shape)


class Tensor:
    """Flat values with a shape and a file dtype."""

    def __init__(self, dtype, shape, values):
        self.dtype, self.shape, self.values = dtype, list(shape), list(values)
        assert len(self.values) == count(shape)

    def encoded(self):
        if self.dtype == "BF16":
            return struct.pack(f"<{len(self.values)}H", *map(bf16_bits, self.values))
        return struct.pack(f"<{len(self.values)}{CODES[self.dtype]}", *self.values)

    def at(self, *index):
        flat = 0
        for i, extent in zip(index, self.shape):
            flat = flat * extent + i
        return self.values[flat]


def write_file(path, tensors, metadata=None):
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, tensor in tensors.items():
        encoded = tensor.encoded()
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(encoded)]}
        data += encoded
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_file(path):
    content = pathlib.Path(path).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        n = count(entry["shape"])
        if entry["dtype"] == "BF16":
            values = map(from_bf16_bits, struct.unpack(f"<{n}H", data[begin:end]))
        else:
            values = struct.unpack(f"<{n}{CODES[entry['dtype']]}", data[begin:end])
        tensors[name] = Tensor(entry["dtype"], entry["shape"], values)
    return tensors, metadata


def normal(shape, seed, dtype="F32"):
    source = random.Random(seed)
    return Tensor(dtype, shape, (source.gauss(0, 1) for _ in range(count(shape))))


def inputs(batch=1, q_len=37, kv_len=None, heads=2, kv_heads=None, dim=16, v_dim=None, dtype="F32"):
    kv_len, kv_heads, v_dim = kv_len or q_len, kv_heads or heads, v_dim or dim
    return {"q": normal([batch, q_len, heads, dim], 1, dtype), "k": normal([batch, kv_len, kv_heads, dim], 2, dtype),
            "v": normal([batch, kv_len, kv_heads, v_dim], 3, dtype)}


def attention_row(tensors, b, i, h, visible):
    """out and lse of one row by the formula, in double precision."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    dim, kv_head = q.shape[3], h // (q.shape[2] // k.shape[2])
    keys = [j for j in range(k.shape[1]) if visible(i, j)]
    scores = [sum(q.at(b, i, h, d) * k.at(b, j, kv_head, d) for d in range(dim)) / math.sqrt(dim) for j in keys]
    if not keys:
        return [0.0] * v.shape[3], -math.inf
    top = max(scores)
    lse = top + math.log(sum(math.exp(s - top) for s in scores))
    weights = [math.exp(s - lse) for s in scores]
    return [sum(w * v.at(b, j, kv_head, d) for w, j in zip(weights, keys)) for d in range(v.shape[3])], lse


class CliTest(unittest.TestCase):
    annulus = ""  # the program; set by main

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANNULUS_", "OMPI_", "PMI_"))}

    def path(self, name):
        return str(self.folder / name)

    def file(self, tensors, name="in.safetensors", metadata=None):
        write_file(self.path(name), tensors, metadata)
        return self.path(name)

    def call(self, *arguments, code=0, **variables):
        """Runs annulus; standard error must be empty exactly when the exit code is 0 or 1."""
        result = subprocess.run([self.annulus, *map(str, arguments)], capture_output=True, text=True, timeout=120,
                                env={**self.environment, **variables})
        self.assertEqual(result.returncode, code, f"{arguments}\n{result.stdout}\n{result.stderr}")
        if code in (0, 1):
            self.assertEqual(result.stderr, "")
        return result

    def json(self, *arguments, code=0, **variables):
        return json.loads(self.call(*arguments, "--json", code=code, **variables).stdout)

    def fails(self, code, name, *arguments, says="", **variables):
        """Checks both forms of an error: two lines, and an object."""
        result = self.call(*arguments, code=code, **variables)
        self.assertEqual(result.stdout, "")
        lines = result.stderr.splitlines()
        self.assertEqual(len(lines), 2, result.stderr)
        self.assertTrue(lines[0].startswith(f"annulus: {name}: "), lines[0])
        self.assertTrue(lines[1].startswith("fix: ") and len(lines[1]) > 10, lines[1])
        self.assertIn(says, result.stderr)
        error = self.json(*arguments, code=code, **variables)["error"]
        self.assertEqual(list(error), ["code", "name", "message", "fix"])
        self.assertEqual((error["code"], error["name"]), (code, name))
        self.assertEqual(lines[0], f"annulus: {name}: {error['message']}")
        self.assertEqual(lines[1], f"fix: {error['fix']}")

    def skip_with_a_sanitizer(self):
        program = pathlib.Path(self.annulus).read_bytes()
        if b"__asan_init" in program or b"__tsan_init" in program:
            self.skipTest("a sanitizer keeps a memory of its own")

    def assert_rows(self, output, tensors, visible, tolerance=1e-5):
        """Compares every row of bshd tensors with the formula."""
        for b in range(tensors["q"].shape[0]):
            for i in range(tensors["q"].shape[1]):
                for h in range(tensors["q"].shape[2]):
                    out, lse = attention_row(tensors, b, i, h, lambda i, j: visible(b, i, j))
                    for d, expected in enumerate(out):
                        self.assertAlmostEqual(output["out"].at(b, i, h, d), expected, delta=tolerance)
                    found = output["lse"].at(b, h, i)
                    self.assertTrue(found == lse or abs(found - lse) < tolerance, (b, i, h, found, lse))
