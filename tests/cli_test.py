#!/usr/bin/env python3
"""Tests of the command line, as scripts of users see it: files, exit codes, text, JSON.

    cli_test.py PATH_OF_ANNULUS [unittest options]
"""

import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import unittest

sys.dont_write_bytecode = True  # of what follows, into the source tree

from cli_testing import CliTest, Tensor, inputs, normal, read_file, write_file
from cli_training import Backward, BackwardErrors  # noqa: F401 - unittest finds them here


class Run(CliTest):
    def test_matches_the_formula(self):
        tensors = inputs(q_len=19, heads=2, kv_heads=1, v_dim=8)
        self.call("run", self.file(tensors), "--causal", "-o", self.path("out"))
        output, metadata = read_file(self.path("out"))
        self.assertEqual(output["out"].shape, [1, 19, 2, 8])
        self.assertEqual(output["lse"].shape, [1, 2, 19])
        self.assert_rows(output, tensors, lambda b, i, j: j <= i)
        self.assertEqual(metadata["version"], self.call("--version").stdout.split()[1])
        self.assertEqual(metadata["options"], "--causal=true")
        self.assertEqual((metadata["world_size"], metadata["partition"]), ("1", "contiguous"))
        self.assertTrue(metadata["target"])

    def test_segments_lengths_and_padding_match_the_formula(self):
        tensors = inputs(batch=2, q_len=17, heads=1)
        ids = [[0] * 5 + [1] * 6 + [9] * 6, [2] * 10 + [0] * 7]
        lengths = [14, 12]
        tensors["q_segment_ids"] = Tensor("I32", [2, 17], sum(ids, []))  # one of the two serves both
        tensors["kv_lengths"] = Tensor("I32", [2], lengths)
        self.call("run", self.file(tensors), "--padding-segment-id=9", "--workers=3", "--partition=striped",
                  "-o", self.path("out"))
        output, _ = read_file(self.path("out"))
        self.assert_rows(output, tensors, lambda b, i, j: ids[b][i] == ids[b][j] != 9 and j < lengths[b])

    def test_every_ring_gives_the_single_pass(self):
        source = self.file(inputs(q_len=41, kv_len=53, heads=4, kv_heads=2))
        self.call("run", source, "--causal", "-o", self.path("one"))
        for options in (["--workers=2"], ["--workers=3", "--partition=striped"], ["--workers=4", "--partition=zigzag"],
                        ["--workers=5", "--topology=linear"], ["--workers=64", "--partition=zigzag"]):
            self.call("run", source, "--causal", *options, "-o", self.path("ring"))
            self.call("check", self.path("one"), self.path("ring"), "--tolerance=1e-6")

    def test_positions_partition(self):
        tensors = inputs(q_len=7, kv_len=5)
        order = [6, 0, 3, -1, 5, 1, 2, 4]
        tensors["positions"] = Tensor("I64", [2, 4], order)
        source = self.file(tensors)
        self.call("run", source, "--workers=2", "--partition=positions", "--check", "--causal")
        tensors["kv_positions"] = Tensor("I64", [2, 4], [4, 0, -1, -1, 1, 3, 2, -1])
        source = self.file(tensors)
        self.call("run", source, "--workers=2", "--partition=positions", "--check")
        self.fails(64, "InvalidArgument", "run", source, "--workers=3", "--partition=positions", says="--workers=2")
        tensors["positions"] = Tensor("I64", [2, 4], [6, 0, 3, -1, 5, 1, 2, 2])
        self.fails(64, "InvalidArgument", "run", self.file(tensors), "--workers=2", "--partition=positions")
        self.fails(64, "InvalidArgument", "run", "--workers=2", "--partition=positions", says="positions")

    def test_layouts(self):
        batch, q_len, kv_len, heads, kv_heads, dim, v_dim = 2, 5, 7, 4, 2, 16, 8
        shapes = {"bshd": [[batch, q_len, heads, dim], [batch, kv_len, kv_heads, dim], [batch, kv_len, kv_heads, v_dim]],
                  "bhsd": [[batch, heads, q_len, dim], [batch, kv_heads, kv_len, dim], [batch, kv_heads, kv_len, v_dim]],
                  "bhds": [[batch, heads, dim, q_len], [batch, kv_heads, dim, kv_len], [batch, kv_heads, kv_len, v_dim]]}
        outs = {"bshd": [batch, q_len, heads, v_dim], "bhsd": [batch, heads, q_len, v_dim], "bhds": [batch, heads, q_len, v_dim]}
        for layout, (q, k, v) in shapes.items():
            source = self.file({"q": normal(q, 1, "BF16"), "k": normal(k, 2, "BF16"), "v": normal(v, 3, "BF16")})
            result = self.json("run", source, f"--layout={layout}", "--check", "-o", self.path("out"))
            self.assertTrue(result["check"]["passed"])
            self.assertEqual(result["shapes"], {"q": q, "k": k, "v": v, "out": outs[layout], "lse": [batch, heads, q_len]})
            output, _ = read_file(self.path("out"))
            self.assertEqual((output["out"].shape, output["out"].dtype), (outs[layout], "BF16"))
            self.assertEqual((output["lse"].shape, output["lse"].dtype), ([batch, heads, q_len], "F32"))
            self.call("check", source, self.path("out"), "--against-oracle", f"--layout={layout}")

    def test_layouts_hold_the_same_numbers(self):
        tensors = inputs(q_len=6, heads=2, dim=16)
        turned = {name: Tensor("F32", [1, 2, 6, 16], (t.at(0, s, h, d) for h in range(2) for s in range(6) for d in range(16)))
                  for name, t in tensors.items()}
        self.call("run", self.file(tensors), "-o", self.path("bshd"))
        self.call("run", self.file(turned), "--layout=bhsd", "-o", self.path("bhsd"))
        plain, other = read_file(self.path("bshd"))[0], read_file(self.path("bhsd"))[0]
        for h in range(2):
            for s in range(6):
                self.assertEqual([plain["out"].at(0, s, h, d) for d in range(16)], [other["out"].at(0, h, s, d) for d in range(16)])

    def test_dtypes_of_inputs_and_output(self):
        for dtype, short in (("BF16", "bf16"), ("F16", "f16"), ("F32", "f32")):
            source = self.file(inputs(dtype=dtype))
            self.assertEqual(self.json("run", source, "--check", "-o", self.path("out"))["dtype"], short)
            self.assertEqual(read_file(self.path("out"))[0]["out"].dtype, dtype)
            self.call("run", source, "--out-dtype=float32", "--check", "-o", self.path("out"))
            self.assertEqual(read_file(self.path("out"))[0]["out"].dtype, "F32")
        self.fails(64, "InvalidArgument", "run", source, "--out-dtype=bf16", says="--out-dtype")

    def test_every_optional_tensor(self):
        tensors = inputs(batch=2, q_len=9, kv_len=11, heads=4, kv_heads=2)
        random_bits = random.Random(7)
        choices = {
            "softmax_aux": [normal([4], 4), normal([3], 4), normal([4, 2], 4)],
            "bias": [normal([2, 4, 9, 11], 5), normal([1, 1, 9, 11], 5)],
            "attention_mask": [Tensor("BOOL", [2, 1, 9, 11], (random_bits.random() < 0.5 for _ in range(198))),
                               Tensor("U8", [1, 4, 9, 11], (random_bits.random() < 0.5 for _ in range(396)))],
            "kv_lengths": [Tensor("I32", [2], [11, 0])],
        }
        for name, values in choices.items():
            for value in values:
                source = self.file({**tensors, name: value})
                self.call("run", source, "--workers=3", "--logits-soft-cap=5", "--check", "-o", self.path("out"))
                self.call("check", source, self.path("out"), "--against-oracle", "--logits-soft-cap=5")

    def test_options_with_an_equals_sign(self):
        source = self.file(inputs(batch=1, q_len=33, dtype="BF16"))
        common = ["--op=attention", "--layout=bshd", "--ignore-extra=true", "--workers=2", "--threads-per-worker=1",
                  "--partition=zigzag", "--topology=linear", "--num-links=1", "--all-gather=false", "--causal=true",
                  "--causal-alignment=top-left", "--sliding-window=9,-1", "--chunk-size=16", "--softmax-scale=0.3",
                  "--logits-soft-cap=20", "--dropout-prob=0", "--dropout-seed=5", "--repeat=2", "--check=4",
                  "--timeout-s=20", "--out-dtype=f32", "--backward=false"]
        result = self.json("run", source, *common, f"--output={self.path('out')}", f"--report={self.path('r.html')}",
                           f"--trace={self.path('t.json')}", "--quiet=true")
        self.assertTrue(result["check"]["passed"])
        made = ["--batch=2", "--tokens=20", "--kv-tokens=24", "--heads=4", "--kv-heads=2", "--head-dim=32",
                "--v-head-dim=16", "--seed=3"]
        for dtype in ("bf16", "f16", "f32", "bfloat16", "float16", "float32"):
            result = self.json("run", *made, f"--dtype={dtype}", "--check")
            self.assertEqual(result["shapes"]["k"], [2, 24, 2, 32])
            self.assertEqual(result["shapes"]["out"], [2, 20, 4, 16])
        for target in self.json("doctor")["targets"]:
            if target["available"]:
                self.assertTrue(self.json("run", "--tokens=20", f"--isa={target['name']}", "--check")["check"]["passed"])

    def test_json_has_the_fields_of_the_contract(self):
        result = self.json("run", "--tokens=300", "--workers=2", "--causal", "--check=5", "--partition=zigzag")
        self.assertEqual(list(result), ["op", "shapes", "dtype", "target", "workers", "partition", "seconds", "flops",
                                        "bytes_sent_per_rank", "pairs_visible", "pairs_computed", "peak_bytes_planned",
                                        "peak_bytes_measured", "check"])
        self.assertEqual(list(result["check"]), ["rows", "max_abs_err", "rms_err", "rounding_max", "rounding_rms", "passed"])
        self.assertEqual(result["pairs_visible"], 300 * 301 // 2)
        self.assertEqual(result["pairs_computed"], result["pairs_visible"])
        self.assertEqual(result["flops"], 2 * result["pairs_visible"] * 128)
        self.assertEqual(len(result["bytes_sent_per_rank"]), 2)
        self.assertEqual(result["check"]["rows"], 5)
        self.assertIsNone(self.json("run", "--tokens=10")["check"])

    def test_memory_stays_below_the_plan(self):
        self.skip_with_a_sanitizer()
        for options in (["--tokens=60000", "--head-dim=128", "--sliding-window=64,0"],
                        ["--tokens=30000", "--workers=4", "--dtype=f32", "--sliding-window=64,0", "--partition=striped"],
                        ["--tokens=3000", "--workers=16", "--check=4"]):
            result = self.json("run", *options)
            self.assertGreater(result["peak_bytes_measured"], 0)
            self.assertLessEqual(result["peak_bytes_measured"], result["peak_bytes_planned"])

    def test_made_inputs_depend_on_the_seed_alone(self):
        for name, options in (("a", ["--workers=1"]), ("b", ["--workers=1", "--threads-per-worker=1"]), ("c", ["--seed=1"])):
            self.call("run", "--tokens=50", "--dtype=f32", *options, "-o", self.path(name))
        self.call("check", self.path("a"), self.path("b"))
        self.call("check", self.path("a"), self.path("c"), code=1)

    def test_empty_tensors(self):
        for options in (["--tokens=0"], ["--batch=0"], ["--heads=0"], ["--tokens=3", "--kv-tokens=0"], ["--tokens=1", "--workers=4"]):
            result = self.json("run", *options, "--check", "-o", self.path("out"))
            self.assertTrue(result["check"]["passed"])
        write_file(self.path("empty"), {"q": Tensor("F32", [1, 2, 1, 4], [1.0] * 8), "k": Tensor("F32", [1, 0, 1, 4], []),
                                        "v": Tensor("F32", [1, 0, 1, 4], [])})
        self.call("run", self.path("empty"), "-o", self.path("out"))
        output, _ = read_file(self.path("out"))
        self.assertEqual(output["out"].values, [0.0] * 8)
        self.assertEqual(output["lse"].values, [-math.inf] * 2)

    def test_real_tensors_give_the_stored_results(self):
        data = pathlib.Path(__file__).resolve().parent.parent / "examples" / "data"
        for name, mask in (("minilm_small", []), ("smollm2_layer15_causal", ["--causal"])):
            source = data / f"{name}.safetensors"
            self.call("run", source, "--ignore-extra", *mask, "--workers=3", "--partition=zigzag", "--check=3",
                      "-o", self.path("out"))
            self.call("check", self.path("out"), source, "--pair=out=expected_out", "--any-dtype", "--tolerance=0.02",
                      "--rms-tolerance=1e-3")
            self.call("check", self.path("out"), source, "--pair=lse=expected_lse", "--tolerance=1e-4")

    def test_report_and_trace(self):
        self.call("run", "--tokens=200", "--workers=3", "--causal", "--check=2", "--report", self.path("r.html"),
                  "--trace", self.path("t.json"))
        page = pathlib.Path(self.path("r.html")).read_text()
        self.assertIn("<html", page)
        self.assertIn("3 workers", page)
        self.assertNotIn("<script", page)
        trace = json.loads(pathlib.Path(self.path("t.json")).read_text())
        self.assertTrue(trace["traceEvents"] if isinstance(trace, dict) else trace)

    def test_human_output(self):
        text = self.call("run", "--tokens=100", "--check=2", "--workers=2", "-o", self.path("out")).stdout
        for word in ("call", "mask", "target", "planned", "time", "FLOP/s", "memory", "check", "passed", "wrote"):
            self.assertIn(word, text)
        self.assertEqual(self.call("run", "--tokens=100", "--quiet").stdout, "")


class RunErrors(CliTest):
    def test_unknown_tensor(self):
        tensors = {**inputs(), "expected_out": normal([1], 1)}
        source = self.file(tensors)
        self.fails(64, "InvalidArgument", "run", source, says="kv_segment_ids")
        self.call("run", source, "--ignore-extra")
        self.fails(64, "InvalidArgument", "run", self.file({**inputs(), "q_segment_id": Tensor("I32", [1, 37], [0] * 37)}),
                   says="did you mean q_segment_ids?")
        self.fails(64, "InvalidArgument", "run", self.file({**inputs(), "joint_q": normal([1], 1)}), says="--op=joint")
        self.call("run", self.file({**inputs(), "dout": normal([1, 37, 2, 16], 1)}))

    def test_tensors_that_do_not_fit(self):
        good = inputs()
        cases = {
            "k": [normal([1, 37, 2, 15], 2), normal([2, 37, 2, 16], 2), normal([37, 2, 16], 2), normal([1, 37, 2, 16], 2, "F16"),
                  normal([1, 37, 3, 16], 2)],
            "v": [normal([1, 36, 2, 16], 3), normal([1, 37, 1, 16], 3)],
            "q": [normal([1, 37, 2, 16], 1, "F64"), Tensor("I32", [1, 37, 2, 16], [0] * 1184)],
            "q_segment_ids": [Tensor("I32", [1, 36], [0] * 36), Tensor("I64", [1, 37], [0] * 37)],
            "softmax_aux": [normal([3, 2], 4), normal([2], 4, "F64")],
            "bias": [normal([1, 3, 37, 37], 5), normal([1, 1, 37, 36], 5)],
            "attention_mask": [normal([1, 1, 37, 37], 6)],
            "kv_lengths": [Tensor("I32", [2], [1, 1]), Tensor("I32", [1], [-1])],
        }
        for name, tensors in cases.items():
            for tensor in tensors:
                with self.subTest(name=name, dtype=tensor.dtype, shape=tensor.shape):
                    self.fails(64, "InvalidArgument", "run", self.file({**good, name: tensor}), says=name)
        del good["v"]
        self.fails(64, "InvalidArgument", "run", self.file(good), says="'v' is missing")

    def test_wrong_arguments(self):
        source = self.file(inputs())
        for arguments in (["--tokns=5"], ["--tokens=x"], ["--tokens=-1"], ["--heads=3", "--kv-heads=2"],
                          ["--dtype=f64"], ["--partition=round"], ["--workers=0"], ["--sliding-window=1,2,3"],
                          ["--sliding-window=-2"], ["--sliding-window=x"], ["--check=0"], ["--check=x"], ["--timeout-s=0"],
                          ["--timeout-s=x"], ["--softmax-scale=nan"], ["--logits-soft-cap=-1"], ["--dropout-prob=1"],
                          ["--dropout-prob=-0.1"], ["--padding-segment-id=1"], ["--isa=sse9"], ["--head-dim=0"],
                          ["--logical-n=5"], ["--logical-l=5"], ["--joint-strategy=rear"], ["--op=chunked", "--partition=zigzag"],
                          ["--op=nothing"], ["--ring-backward=both"], ["--ignore-extra"], ["a", "b"],
                          [source, "--tokens=5"], [source, "--seed=5"], [source, "-o", source],
                          ["--tokens=100000000000000", "--heads=100000000"]):
            with self.subTest(arguments=arguments):
                self.fails(64, "InvalidArgument", "run", *arguments)
        self.fails(64, "InvalidArgument", "run", "--tokns=5", says="--tokens")
        self.fails(64, "InvalidArgument", "run", "--logical-n=5", says="kv_lengths")
        self.assertIn("verb", self.call(code=64).stderr)
        self.assertIn("--tokens", self.call("run", "--tokens", code=64).stderr)
        self.fails(64, "InvalidArgument", "rnu", says="run")

    def test_what_is_not_in_this_build(self):
        for arguments in (["--op=spmd"], ["--op=spmd", "--backward"], ["--op=joint"], ["--op=joint", "--logical-n=5"],
                          ["--op=chunked"], ["--num-links=2"], ["--all-gather"]):
            with self.subTest(arguments=arguments):
                self.fails(69, "Unsupported", "run", *arguments)
                self.fails(69, "Unsupported", "explain", *arguments)
        for verb in ("prefill", "launch", "convert"):
            self.fails(69, "Unsupported", verb)
        self.fails(69, "Unsupported", "bench", "--suite=decode")
        missing = [target["name"] for target in self.json("doctor")["targets"] if not target["available"]]
        for name in missing:
            self.fails(69, "Unsupported", "run", "--tokens=5", f"--isa={name}")

    def test_files(self):
        self.fails(74, "IoError", "run", self.path("absent"))
        self.fails(74, "IoError", "run", "--tokens=5", "-o", self.path("no/folder/out"))
        self.fails(74, "IoError", "run", "--tokens=5", "--report", self.path("no/folder/r.html"))
        self.fails(74, "IoError", "run", "--tokens=5", "-o", str(self.folder))
        broken = self.path("broken")
        pathlib.Path(broken).write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
        self.fails(65, "BadData", "run", broken)
        source = self.file(inputs())
        content = pathlib.Path(source).read_bytes()
        pathlib.Path(source).write_bytes(content[:-1])
        self.fails(65, "BadData", "run", source)

    def test_control_characters_do_not_reach_the_terminal(self):
        source = self.file({**inputs(), "bad\x1b[31m\nname": normal([1], 1)})
        for arguments, code in (([source], 65), ([self.path("absent\x1b[31m\nfile")], 74), (["--to\x1bkens=1"], 64)):
            error = self.call("run", *arguments, code=code).stderr
            self.assertNotIn("\x1b", error)
            self.assertEqual(len(error.splitlines()), 2)

    def test_environment(self):
        self.assertEqual(self.json("run", "--tokens=50", ANNULUS_WORKERS="3")["workers"], 3)
        self.assertEqual(self.json("run", "--tokens=50", "--workers=2", ANNULUS_WORKERS="3")["workers"], 2)
        self.fails(78, "ConfigError", "run", "--tokens=5", ANNULUS_WORKERS="many")
        self.fails(78, "ConfigError", "run", "--tokens=5", ANNULUS_ISA="sse9")
        self.fails(78, "ConfigError", "run", "--tokens=5", ANNULUS_THREDS="2")
        self.fails(78, "ConfigError", "run", "--tokens=5", "--workers=2", ANNULUS_TIMEOUT_S="0")

    def test_no_lonely_ranks_under_a_launcher(self):
        self.fails(69, "Unsupported", "run", "--tokens=5", OMPI_COMM_WORLD_SIZE="4", says="OMPI_COMM_WORLD_SIZE")
        self.fails(69, "Unsupported", "run", "--tokens=5", PMI_SIZE="2", says="PMI_SIZE")
        self.call("run", "--tokens=5", OMPI_COMM_WORLD_SIZE="1")
        self.call("run", "--tokens=5", OMPI_COMM_WORLD_SIZE="4", ANNULUS_TRANSPORT="inproc")

    def test_too_much_memory_is_refused_before_it_is_taken(self):
        self.fails(71, "OutOfMemory", "run", "--tokens=1000000000", "--heads=64")

    def test_output_is_all_or_nothing(self):
        target = self.path("out")
        pathlib.Path(target).write_text("precious")
        self.fails(64, "InvalidArgument", "run", self.file({**inputs(), "extra": normal([1], 1)}), "-o", target)
        self.assertEqual(pathlib.Path(target).read_text(), "precious")
        self.call("run", "--tokens=20", "-o", target)
        self.assertIn("out", read_file(target)[0])
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["in.safetensors", "out"])

    def test_signals(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            for workers in ("1", "2"):
                process = subprocess.Popen([self.annulus, "run", "--tokens=400000", "--head-dim=128", f"--workers={workers}",
                                            "--isa=scalar", "-o", self.path("out")], stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, text=True, env=self.environment)
                self.assertTrue(process.stdout.readline())  # the plan is there: handlers are, too
                time.sleep(0.7)
                process.send_signal(number)
                begin = time.monotonic()
                _, error = process.communicate(timeout=60)
                self.assertEqual(process.returncode, 130, error)
                self.assertTrue(error.startswith("annulus: Interrupted: "), error)
                self.assertLess(time.monotonic() - begin, 20)
                self.assertEqual(list(self.folder.iterdir()), [])


class Check(CliTest):
    def test_equal_and_different_files(self):
        a = self.file({"x": Tensor("F32", [2, 2], [1, 2, 3, math.nan]), "n": Tensor("I64", [2], [1, 2**60])}, "a")
        self.assertTrue(self.json("check", a, a)["passed"])
        b = self.file({"x": Tensor("F32", [2, 2], [1, 2.5, 3, math.nan]), "n": Tensor("I64", [2], [1, 2**60 + 1])}, "b")
        result = self.json("check", a, b, code=1)
        by_name = {tensor["name"]: tensor for tensor in result["tensors"]}
        x = by_name["x"]
        self.assertEqual((x["differing"], x["max_abs_err"], x["rms_err"], x["worst_index"], x["a"], x["b"]),
                         (1, 0.5, 0.25, [0, 1], 2, 2.5))
        self.assertEqual(x["max_ulp"], 2**21)
        self.assertEqual(by_name["n"]["differing"], 1)
        self.assertIn("DIFFER", self.call("check", a, b, code=1).stdout)
        self.call("check", a, b, "--pair=x", "--tolerance=0.5")
        self.call("check", a, b, "--pair=x", "--tolerance=0.4", code=1)
        self.call("check", a, b, "--pair=x", "--tolerance=0.5", "--rms-tolerance=0.1", code=1)
        self.call("check", a, b, "--pair=x", f"--max-ulp={2**21}")
        self.call("check", a, b, "--pair=x", f"--max-ulp={2**21 - 1}", code=1)

    def test_shapes_dtypes_and_names_must_agree(self):
        a = self.file({"x": Tensor("F32", [4], [1, 2, 3, 4])}, "a")
        for other in ({"x": Tensor("F32", [2, 2], [1, 2, 3, 4])}, {"x": Tensor("BF16", [4], [1, 2, 3, 4])},
                      {"y": Tensor("F32", [4], [1, 2, 3, 4])}, {}):
            self.call("check", a, self.file(other, "b"), code=1)
        self.call("check", a, self.file({"x": Tensor("BF16", [4], [1, 2, 3, 4])}, "b"), "--any-dtype")
        self.call("check", a, self.file({"y": Tensor("F32", [4], [1, 2, 3, 4])}, "b"), "--pair=x=y")
        self.fails(64, "InvalidArgument", "check", a, a, "--pair=z")
        self.fails(64, "InvalidArgument", "check", a, a, "--causal", says="--against-oracle")
        self.fails(64, "InvalidArgument", "check", a)
        self.fails(74, "IoError", "check", a, self.path("absent"))

    def test_a_tampered_result_fails_against_the_oracle(self):
        source = self.file(inputs(q_len=50, dtype="BF16"))
        self.call("run", source, "--causal", "-o", self.path("out"))
        self.call("check", source, self.path("out"), "--against-oracle", "--causal")
        self.call("check", source, self.path("out"), "--against-oracle", "--causal", "--rows=5")
        self.call("check", source, self.path("out"), "--against-oracle", code=1)
        tensors, metadata = read_file(self.path("out"))
        tensors["out"].values[777] += 0.25
        tampered = self.file(tensors, "tampered", metadata)
        result = self.json("check", source, tampered, "--against-oracle", "--causal", code=1)
        self.assertFalse(result["passed"])
        self.assertIn("--causal", self.call("check", source, tampered, "--against-oracle", "--causal", code=1).stdout)
        tensors["out"].values[777] -= 0.25
        tensors["lse"].values[13] += 0.01
        self.call("check", source, self.file(tensors, "tampered", metadata), "--against-oracle", "--causal", code=1)
        self.fails(64, "InvalidArgument", "check", self.file(inputs(q_len=49, dtype="BF16")), self.path("out"), "--against-oracle")


class OtherVerbs(CliTest):
    def test_explain(self):
        plan = self.json("explain", "--tokens=1000", "--workers=4", "--partition=zigzag", "--causal", "--head-dim=128")
        self.assertEqual(plan["pairs_visible"], 1000 * 1001 // 2)
        self.assertEqual(plan["pairs_total"], 1000000)
        self.assertEqual(sum(step["pairs"] for step in plan["steps"]), plan["pairs_visible"])
        self.assertEqual(sum(plan["q_rows"]), 1000)
        self.assertEqual(plan["flops"], 2 * plan["pairs_visible"] * 256)
        text = self.call("explain", "--tokens=1000", "--workers=4", "--partition=zigzag", "--causal").stdout
        for word in ("rank", "step", "mask", "causal", "note"):
            self.assertIn(word, text)

    def test_explain_agrees_with_run_and_writes_nothing(self):
        source = self.file({**inputs(q_len=64), "kv_segment_ids": Tensor("I32", [1, 64], [i // 10 for i in range(64)])})
        options = [source, "--workers=4", "--sliding-window=5,0", "-o", self.path("out"), "--report", self.path("r.html")]
        plan = self.json("explain", *options)
        self.assertEqual(os.listdir(self.folder), ["in.safetensors"])
        result = self.json("run", *options)
        for field in ("shapes", "target", "pairs_visible", "bytes_sent_per_rank", "flops"):
            self.assertEqual(plan[field], result[field])

    def test_explain_needs_no_memory_for_tensors(self):
        plan = self.json("explain", "--tokens=2000000", "--heads=512", "--head-dim=128", "--causal")
        self.assertGreater(plan["peak_bytes_planned"], 2**39)

    def test_doctor(self):
        begin = time.monotonic()
        diagnosis = self.json("doctor")
        self.assertLess(time.monotonic() - begin, 20)
        self.assertTrue(diagnosis["passed"])
        self.assertEqual(set(diagnosis["chosen"]), {"bf16", "f16", "f32"})
        self.assertEqual(diagnosis["problems"], [])
        self.assertTrue(all(test["passed"] for test in diagnosis["self_test"]))
        self.assertTrue({test["dtype"] for test in diagnosis["self_test"]} >= {"bf16", "f16", "f32"})
        self.assertIn("ready", self.call("doctor").stdout)
        self.assertIn("NOT READY", self.call("doctor", code=1, ANNULUS_ISA="sse9").stdout)

    def test_bench_of_one_row(self):
        result = self.json("bench", "--tokens=300", "--head-dim=32", "--causal", "--dtype=f32", "--heads=2", "--kv-heads=1")
        self.assertEqual(set(result["machine"]), {"cpu", "targets", "cores", "version"})
        row, = result["rows"]
        fields = {"op", "dtype", "target", "mask", "batch", "heads", "kv_heads", "head_dim", "v_head_dim", "tokens", "threads",
                  "workers", "partition", "seconds", "tflops", "peak_kind", "peak_tflops", "share_of_peak", "ratio_to_full",
                  "ratio_to_one_thread", "ratio_to_single_pass", "check_passed"}
        self.assertTrue(fields <= set(row), fields - set(row))
        self.assertEqual((row["op"], row["dtype"], row["mask"], row["tokens"], row["heads"]), ("forward", "f32", "causal", 300, 2))
        self.assertTrue(row["check_passed"])
        self.assertGreater(row["seconds"], 0)
        self.assertIsNone(row["ratio_to_full"])
        row, = self.json("bench", "--tokens=200", "--head-dim=32", "--causal", "--backward", "--dropout-prob=0.1",
                         "--workers=2", "--heads=2", "--kv-heads=1")["rows"]
        self.assertTrue(fields <= set(row), fields - set(row))
        self.assertEqual((row["op"], row["workers"], row["check_passed"]), ("backward", 2, True))
        self.assertAlmostEqual(row["tflops"] * row["seconds"] * 1e12, 2.5 * 2 * 64 * 2 * 200 * 201 / 2, delta=1)
        self.fails(64, "InvalidArgument", "bench", "--backward", "--dbias")
        self.fails(64, "InvalidArgument", "bench", "--suite=quick", "--tokens=5")
        self.fails(64, "InvalidArgument", "bench", "--repeat=3")

    def test_help_and_version(self):
        self.assertRegex(self.call("--version").stdout, r"^annulus \d+\.\d+\.\d+\n$")
        self.assertIn("doctor", self.call("--help").stdout)
        for verb in ("run", "check", "explain", "bench", "doctor"):
            text = self.call(verb, "--help").stdout
            self.assertIn("Examples:", text)
            self.assertIn("annulus " + verb, text)
        options = """op backward no-fused-backward ring-backward workers threads-per-worker partition topology num-links
            all-gather causal causal-alignment sliding-window chunk-size padding-segment-id logical-n logical-l joint-strategy
            softmax-scale logits-soft-cap dropout-prob dropout-seed isa report trace json check repeat quiet timeout-s batch
            tokens kv-tokens heads kv-heads head-dim v-head-dim dtype seed layout out-dtype ignore-extra dbias"""
        text = self.call("run", "--help").stdout
        for option in options.split():
            self.assertIn("--" + option, text)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    CliTest.annulus = os.path.abspath(sys.argv.pop(1))
    unittest.main()
