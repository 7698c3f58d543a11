"""Tests of `annulus run --backward`; cli_test.py runs them."""

import math

from cli_testing import CliTest, Tensor, inputs, normal, read_file

GRADIENTS = ("dq", "dk", "dv")


def training(dtype="F32", **shape):
    """Inputs with a dout."""
    tensors = inputs(dtype=dtype, **shape)
    tensors["dout"] = normal(tensors["q"].shape[:3] + tensors["v"].shape[3:], 4, dtype)
    return tensors


def gradients(tensors, visible):
    """dq, dk, dv of one batch row by the formula, in double precision; keyed like Tensor.at."""
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    group, scale = q.shape[2] // k.shape[2], 1 / math.sqrt(q.shape[3])
    dq, dk, dv = {}, {}, {}

    def add(to, row, factor, vector):
        for d, x in enumerate(vector):
            to[(*row, d)] = to.get((*row, d), 0) + factor * x

    def row(tensor, seq, head):
        return [tensor.at(0, seq, head, d) for d in range(tensor.shape[3])]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b))

    for h in range(q.shape[2]):
        for i in range(q.shape[1]):
            keys = [j for j in range(k.shape[1]) if visible(i, j)]
            query, do = row(q, i, h), row(dout, i, h)
            weights = [math.exp(scale * dot(query, row(k, j, h // group))) for j in keys]
            p = [w / sum(weights) for w in weights]
            dp = [dot(do, row(v, j, h // group)) for j in keys]
            delta = dot(p, dp)
            for j, p_j, dp_j in zip(keys, p, dp):
                add(dq, (i, h), scale * p_j * (dp_j - delta), row(k, j, h // group))
                add(dk, (j, h // group), scale * p_j * (dp_j - delta), query)
                add(dv, (j, h // group), p_j, do)
    return {"dq": dq, "dk": dk, "dv": dv}


class Backward(CliTest):
    def test_matches_the_formula(self):
        tensors = training(q_len=9, heads=2, kv_heads=1, dim=8, v_dim=4)
        self.call("run", self.file(tensors), "--backward", "--causal", "-o", self.path("out"))
        output, metadata = read_file(self.path("out"))
        self.assertEqual(list(output), ["out", "lse", *GRADIENTS])
        self.assertEqual(metadata["options"], "--backward=true --causal=true")
        for name, expected in gradients(tensors, lambda i, j: j <= i).items():
            self.assertEqual((output[name].shape, output[name].dtype), (tensors[name[1:]].shape, "F32"))
            for index, value in expected.items():
                self.assertAlmostEqual(output[name].at(0, *index), value, delta=1e-5)

    def test_layouts_hold_the_same_numbers(self):
        orders = {"bshd": ("bshd", "bshd"), "bhsd": ("bhsd", "bhsd"), "bhds": ("bhds", "bhsd")}  # of q and k, of v and out
        logical = training(q_len=5, kv_len=7, heads=4, kv_heads=2, v_dim=8, dtype="BF16")
        plain = None
        for layout, (qk, vo) in orders.items():
            def order(name, to=qk, other=vo):
                return to if name in ("q", "k", "dq", "dk") else other

            source = self.file({name: turned(t, "bshd", order(name)) for name, t in logical.items()})
            result = self.json("run", source, "--backward", f"--layout={layout}", "--check", "-o", self.path("out"))
            self.assertTrue(result["check"]["passed"])
            output, _ = read_file(self.path("out"))
            for name in GRADIENTS:
                self.assertEqual(output[name].shape, result["shapes"][name])
                self.assertEqual(output[name].dtype, "BF16")
            back = {name: turned(output[name], order(name), "bshd").values for name in GRADIENTS}
            plain = plain or back
            self.assertEqual(back, plain)
            self.call("check", source, self.path("out"), "--against-oracle", f"--layout={layout}", "--rows=3")

    def test_every_ring_gives_the_single_pass(self):
        tensors = training(q_len=41, kv_len=53, heads=4, kv_heads=2)
        tensors["softmax_aux"] = normal([4, 2], 5)
        source = self.file(tensors)
        common = ["run", source, "--backward", "--causal", "--dropout-prob=0.2", f"--dropout-seed={2**64 - 1}", "--check=5"]
        self.call(*common, "-o", self.path("one"))
        self.assertEqual(read_file(self.path("one"))[0]["dsoftmax_aux"].shape, [4, 2])
        for options in (["--workers=4", "--partition=zigzag", "--ring-backward=kv"], ["--workers=4", "--ring-backward=q"],
                        ["--workers=3", "--partition=striped"], ["--workers=5", "--topology=linear", "--no-fused-backward"],
                        ["--no-fused-backward"], ["--workers=64"]):
            result = self.json(*common, *options, "-o", self.path("ring"))
            self.assertTrue(result["check"]["passed"])
            self.call("check", self.path("one"), self.path("ring"), "--tolerance=2e-6")
        self.call("check", source, self.path("one"), "--against-oracle", "--causal", "--dropout-prob=0.2",
                  f"--dropout-seed={2**64 - 1}")
        self.call("check", source, self.path("one"), "--against-oracle", "--causal", "--dropout-prob=0.2", code=1)
        for travels, words in (("kv", "k, v, dk and dv travelled"), ("q", "q, dout and dq travelled")):
            self.assertIn(words, self.call(*common, "--workers=2", f"--ring-backward={travels}").stdout)

    def test_dropout_without_gradients(self):
        for dtype in ("bf16", "f32"):
            one = self.json("run", "--tokens=70", f"--dtype={dtype}", "--dropout-prob=0.5", "--dropout-seed=7", "--check",
                            "-o", self.path("a"))
            self.assertTrue(one["check"]["passed"])
            self.call("run", "--tokens=70", f"--dtype={dtype}", "--dropout-prob=0.5", "--dropout-seed=8", "-o", self.path("b"))
            self.call("check", self.path("a"), self.path("b"), "--pair=lse")
            self.call("check", self.path("a"), self.path("b"), "--pair=out", "--tolerance=0.01", code=1)

    def test_dtypes(self):
        for dtype in ("BF16", "F16", "F32"):
            tensors = training(q_len=20, heads=2, dtype=dtype)
            tensors["softmax_aux"] = normal([3], 5)  # every head sees all of them
            tensors["bias"] = normal([1, 2, 20, 20], 6, dtype)
            source = self.file(tensors)
            for options, expected in (([], dtype), (["--out-dtype=f32"], "F32")):
                self.call("run", source, "--backward", "--dbias", "--check", "--workers=2", *options, "-o", self.path("out"))
                output, _ = read_file(self.path("out"))
                self.assertEqual({output[name].dtype for name in (*GRADIENTS, "dbias")}, {expected})
                self.assertEqual((output["dsoftmax_aux"].dtype, output["dsoftmax_aux"].shape), ("F32", [3]))
                self.assertEqual(output["dbias"].shape, [1, 2, 20, 20])
                for rows in ([], ["--rows=4"]):
                    self.call("check", source, self.path("out"), "--against-oracle", *rows)
        tensors["bias"] = normal([1, 1, 20, 20], 6)
        source = self.file({**tensors, "dout": normal([1, 20, 2, 16], 4)})
        self.call("run", source, "--backward", "--check", "-o", self.path("out"))  # bias, but not its gradient
        self.assertNotIn("dbias", read_file(self.path("out"))[0])

    def test_json(self):
        options = ["--backward", "--tokens=300", "--workers=2", "--causal", "--check=5", "--repeat=2"]
        result = self.json("run", *options)
        self.assertEqual(result["flops"], 3.5 * 2 * result["pairs_visible"] * 128)
        check = result["check"]
        self.assertEqual((check["rows"], check["passed"]), (5, True))
        fields = ["name", "rows", "max_abs_err", "rms_err", "rounding_max", "rounding_rms", "passed"]
        self.assertEqual([gradient["name"] for gradient in check["gradients"]], list(GRADIENTS))
        for gradient in check["gradients"]:
            self.assertEqual(list(gradient), fields)
            self.assertTrue(gradient["passed"] and gradient["rows"] == 5)
        forward = self.json("run", *options[1:])
        self.assertGreater(result["bytes_sent_per_rank"][0], forward["bytes_sent_per_rank"][0])
        plan = self.json("explain", *options)
        for field in ("shapes", "target", "pairs_visible", "flops"):
            self.assertEqual(plan[field], result[field])
        self.assertEqual(plan["backward"]["flops"], 2.5 * forward["flops"])
        self.assertIn("of these GFLOP", self.call("explain", *options).stdout)

    def test_memory_stays_below_the_plan(self):
        self.skip_with_a_sanitizer()
        for options in (["--tokens=20000", "--head-dim=128"], ["--tokens=3000", "--workers=64", "--check=4"],
                        ["--tokens=30000", "--workers=8", "--dtype=f32", "--partition=striped"],
                        ["--tokens=20000", "--workers=6", "--heads=2", "--kv-heads=1", "--ring-backward=q"]):
            result = self.json("run", "--backward", "--sliding-window=64,0", *options)
            self.assertLessEqual(result["peak_bytes_measured"], result["peak_bytes_planned"])

    def test_empty_tensors(self):
        for options in (["--tokens=0"], ["--batch=0"], ["--heads=0"], ["--tokens=3", "--kv-tokens=0"], ["--tokens=1", "--workers=4"]):
            result = self.json("run", "--backward", *options, "--check", "-o", self.path("out"))
            self.assertTrue(result["check"]["passed"])

    def test_report(self):
        self.call("run", "--backward", "--tokens=100", "--workers=3", "--causal", "--check=2", "--report", self.path("r.html"))
        with open(self.path("r.html")) as page:
            self.assertIn("largest error of dk", page.read())

    def test_a_tampered_gradient_fails_against_the_oracle(self):
        tensors = training(q_len=50, dtype="BF16")
        source = self.file(tensors)
        self.call("run", source, "--backward", "--causal", "-o", self.path("out"))
        output, metadata = read_file(self.path("out"))
        output["dk"].values[777] += 0.25
        tampered = self.file(output, "tampered", metadata)
        result = self.json("check", source, tampered, "--against-oracle", "--causal", code=1)
        passed = {gradient["name"]: gradient["passed"] for gradient in result["check"]["gradients"]}
        self.assertEqual((passed, result["passed"]), ({"dq": True, "dk": False, "dv": True}, False))
        self.assertIn("dk", result["verdict"])
        del tensors["dout"]
        self.fails(64, "InvalidArgument", "check", self.file(tensors), tampered, "--against-oracle", "--causal", says="'dout'")


class BackwardErrors(CliTest):
    def test_options_that_need_gradients(self):
        for option in ("--dbias", "--no-fused-backward", "--ring-backward=kv", "--ring-backward=auto"):
            for verb in ("run", "explain"):
                self.fails(64, "InvalidArgument", verb, option, says="--backward")
        self.fails(64, "InvalidArgument", "run", "--backward", "--dbias", says="bias")
        self.fails(64, "InvalidArgument", "run", self.file(training()), "--backward", "--dbias", says="'bias'")
        self.fails(64, "InvalidArgument", "run", "--ring-backward=both")
        for probability in ("1", "-0.1", "nan"):
            self.fails(64, "InvalidArgument", "run", f"--dropout-prob={probability}", says="--dropout-prob")
        for seed in ("-1", "0.5", str(2**64)):
            self.fails(64, "InvalidArgument", "run", f"--dropout-seed={seed}", says="--dropout-seed")

    def test_dout_that_does_not_fit(self):
        self.fails(64, "InvalidArgument", "run", self.file(inputs()), "--backward", says="'dout' is missing")
        for dout in (normal([1, 37, 2, 15], 4), normal([1, 36, 2, 16], 4), normal([37, 2, 16], 4), normal([1, 2, 37, 16], 4),
                     normal([1, 37, 2, 16], 4, "BF16"), Tensor("I32", [1, 37, 2, 16], [0] * 1184)):
            self.fails(64, "InvalidArgument", "run", self.file({**inputs(), "dout": dout}), "--backward", says="'dout'")


def turned(tensor, before, after):
    """Axes in another order, each order a permutation of "bshd"."""
    extents = dict(zip(before, tensor.shape))
    shape = [extents[axis] for axis in after]

    def values(done):
        if len(done) == len(after):
            yield tensor.at(*(done[axis] for axis in before))
            return
        axis = after[len(done)]
        for i in range(extents[axis]):
            yield from values({**done, axis: i})

    return Tensor(tensor.dtype, shape, values({}))
