#!/usr/bin/env python3
"""Holds the documentation to the program: pictures, links, options, counts and examples.

    docs_test.py SOURCE_DIR PATH_OF_ANNULUS [unittest options]
"""

import functools
import importlib.util
import json
import math
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import unittest

ROOT, ANNULUS = pathlib.Path(), ""  # set by main

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_FORMATS = {"F32": "f", "I32": "i", "U8": "B"}


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def prose(text):
    return FENCE.sub("", text)


def run(*arguments):
    return subprocess.run([ANNULUS, *arguments], capture_output=True, text=True, check=True, timeout=120).stdout


@functools.cache
def verbs():
    return re.findall(r"^  ([a-z]+) +\S", run("--help"), re.MULTILINE)


@functools.cache
def options(verb):
    """Those that --help defines; verbs that are not in this build have none."""
    try:
        text = run(verb, "--help")
    except subprocess.CalledProcessError:
        return None
    return set(re.findall(r"^\s+(?:-\w,)?(--[a-z][a-z-]*)", text, re.MULTILINE))


def commands(text):
    """(verb, its options) of every `annulus VERB ...` in fences and in code spans."""
    fences = [body for language, body in FENCE.findall(text) if language == "sh"]
    spans = re.findall(r"`([^`\n]+)`", prose(text))
    for code in fences + spans:
        code = re.sub(r"\\\n|#[^\n]*", " ", code)
        for verb, rest in re.findall(r"(?:^|[\s/$])annulus[ \t]+([a-z]+)\b([^\n|;&]*)", code):
            yield verb, re.findall(r"(?<!\S)(--[a-z][a-z-]*)", rest)


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page):
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


def write_safetensors(path, tensors):
    """tensors: name -> (file dtype, shape, values)."""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        begin = len(data)
        data += struct.pack(f"<{len(values)}{CODE_FORMATS[dtype]}", *values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


class Pictures(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "pictures" / "draw.py")
        cls.draw = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cls.draw)

    def test_are_what_the_script_draws(self):
        found = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "pictures").glob("*.svg")}
        drawn = self.draw.pictures()
        self.assertEqual(sorted(found), sorted(drawn))
        for name, svg in drawn.items():
            self.assertTrue(svg == found[name], f"{name}.svg is out of date: run docs/pictures/draw.py")

    def test_are_all_shown(self):
        text = "".join(page.read_text(encoding="utf-8") for page in pages())
        for name in self.draw.pictures():
            self.assertIn(f"(pictures/{name}.svg)", text)

    def test_show_as_many_pairs_as_the_program_counts(self):
        counted = 0
        for grids, _ in self.draw.GRIDS.values():
            for grid in grids:
                if grid.options is None:
                    continue
                with self.subTest(grid.title), tempfile.TemporaryDirectory() as folder:
                    self.assertEqual(self.visible(grid, pathlib.Path(folder) / "in.safetensors"), len(grid.seen))
                    counted += 1
        self.assertGreater(counted, 15)

    def visible(self, grid, path):
        shapes = {"q": [1, grid.q_len, 1, 2], "k": [1, grid.kv_len, 1, 2], "v": [1, grid.kv_len, 1, 2]}
        tensors = {name: ("F32", shape, [0.0] * math.prod(shape)) for name, shape in shapes.items()}
        write_safetensors(path, tensors | grid.tensors)
        return json.loads(run("explain", str(path), "--json", *grid.options.split()))["pairs_visible"]


class Pages(unittest.TestCase):
    def test_links_lead_somewhere(self):
        for page in pages():
            for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
                if re.match(r"[a-z]+:", target):
                    continue
                name, _, anchor = target.partition("#")
                file = page.parent / name if name else page
                with self.subTest(page=page.name, link=target):
                    self.assertTrue(file.exists())
                    if anchor:
                        self.assertIn(anchor, anchors(file))

    def test_commands_take_the_options_they_name(self):
        found = 0
        for page in pages():
            for verb, named in commands(page.read_text(encoding="utf-8")):
                with self.subTest(page=page.name, command=f"annulus {verb} {' '.join(named)}"):
                    self.assertIn(verb, verbs())
                    self.assertLessEqual(set(named), options(verb) or set())
                    found += 1
        self.assertGreater(found, 5)

    def test_options_in_the_text_exist(self):
        known = set().union(*(options(verb) or set() for verb in verbs()))
        for page in pages():
            for span in re.findall(r"`(--[^`\n]+)`", prose(page.read_text(encoding="utf-8"))):
                with self.subTest(page=page.name, option=span):
                    self.assertIn(re.match(r"--[a-z-]*", span)[0], known)

    def test_plans_run(self):
        """Every `annulus explain` of a fence, as it stands."""
        for page in pages():
            for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
                for rest in re.findall(r"annulus explain ([^#\n]*)", body) if language == "sh" else []:
                    with self.subTest(page=page.name, options=rest):
                        self.assertIn("visible", run("explain", *rest.split()))

    def test_programs_print_what_the_page_says(self):
        for page in pages():
            blocks = FENCE.findall(page.read_text(encoding="utf-8"))
            for (language, program), (_, expected) in zip(blocks, blocks[1:]):
                if language != "python" or "import annulus" in program or page.parent.name == "python":
                    continue  # python/tests/test_docs.py runs what needs the package
                with self.subTest(page=page.name):
                    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                                            timeout=120).stdout
                    self.assertEqual(output, expected)


if __name__ == "__main__":
    ROOT, ANNULUS = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2]
    unittest.main(argv=sys.argv[:1] + sys.argv[3:])
