#!/usr/bin/env python3
"""Holds the layers of the source tree: who may include whom, and what may be called where.

    layers_test.py [SOURCE_DIR]
"""

import pathlib
import re
import sys

MOST_LINES = 600

# What a file of each layer may include with quotes, beside public headers.
LAYERS = {
    "base": {"base"},
    "core": {"base", "core"},
    "kernels": {"base", "core", "kernels"},
    "comm": {"base", "core", "comm"},
    "ops": {"base", "core", "kernels", "comm", "ops"},
    "reference": {"base", "reference"},
    "io": {"base", "io"},
}
# Tests look from above: they may compare with the oracle and use files.
TESTS_MAY = {"base", "core", "kernels", "comm", "ops", "reference", "io"}

TEST_FILE = r"_test\.cc$|_test_\w+\.h$|_testing\.h$|^tests/"

# Who may include a library. Others stay replaceable and quick to compile.
THIRD_PARTY = {
    r"hwy/": r"src/kernels/",
    r"tbb/|oneapi/": r"src/base/executor_tbb\.cc$",
    r"nlohmann/|fmt/": r"src/io/|tools/|bench/",
    r"CLI/": r"tools/|bench/",
    r"benchmark/": r"bench/",
    r".*mmintrin\.h$|x86intrin\.h$": r"src/kernels/",
    r"gtest/|gmock/|rapidcheck": TEST_FILE,
}

# core is pure, so that brute force can test it.
IMPURE = re.compile(
    r"^(thread|mutex|shared_mutex|condition_variable|future|atomic|chrono|random|iostream|fstream|filesystem"
    r"|cstdio|stdio\.h|unistd\.h|pthread\.h|sys/.*|stop_token|semaphore|barrier|latch)$")

STANDARD = re.compile(r"^[a-z_0-9]+$")

# (pattern, what is wrong, files it does not hold for)
FORBIDDEN_IN_SRC = [
    (r"\bstd::(cout|cerr|clog)\b|(?<!\w)(?:v|f|d|vf)?printf\s*\(|(?<!\w)(?:puts|fputs|perror)\s*\(",
     "the library never prints", None),
    # Communicator has a method abort(): only calls that name the C function are meant.
    (r"(?:\bstd|(?<![\w>)]))::(?:abort|exit|_exit|quick_exit|terminate)\s*\(|(?<![\w.>:])_?exit\s*\(",
     "the library never ends the process", None),
    (r"\bgetenv\b|\benviron\b", "only src/base/environment.cc reads the environment", "src/base/environment.cc"),
]


def without_comments_and_strings(text):
    """The code alone; newlines stay, so that line numbers do."""
    pattern = r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])+\''
    return re.sub(pattern, lambda match: " " + "\n" * match[0].count("\n"), text, flags=re.DOTALL)


def includes(text):
    """(line number, name, quoted) of every #include."""
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', line)
        if match:
            yield number, match[1] or match[2], match[1] is not None


def include_error(path, name, quoted):
    """What is wrong with this include, or None."""
    top = path.split("/")[0]
    if top == "include":
        ours = quoted and name.startswith("annulus/")
        standard = not quoted and STANDARD.match(name)
        return None if ours or standard else "public headers include public headers and std"
    for pattern, allowed in THIRD_PARTY.items():
        if re.match(pattern, name):
            return None if re.search(allowed, path) else f"only files of {allowed} may include it"
    if name.startswith("annulus/"):
        return None
    is_test = re.search(TEST_FILE, path) is not None
    if top == "src":
        layer = path.split("/")[1]
        if not quoted:
            pure = layer != "core" or is_test or not IMPURE.match(name)
            return None if pure else "core is pure: no threads, clocks or I/O"
        allowed = TESTS_MAY if is_test else LAYERS[layer]
        return None if name.split("/")[0] in allowed else f"{layer} includes {', '.join(sorted(allowed))} only"
    if top in ("tools", "examples", "bench", "fuzz") and quoted:
        return None if "/" not in name.removeprefix(top + "/") else f"{top} includes public headers only"
    return None


def check_file(root, file):
    """Yields 'path:line: what'."""
    path = file.relative_to(root).as_posix()
    text = file.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > MOST_LINES:
        yield f"{path}:{lines}: longer than {MOST_LINES} lines"
    if file.suffix not in (".cc", ".h"):
        return
    for number, name, quoted in includes(text):
        error = include_error(path, name, quoted)
        if error:
            yield f"{path}:{number}: {name}: {error}"
    if file.suffix == ".h" and not path.endswith("-inl.h") and "#pragma once" not in text:
        yield f"{path}:1: no #pragma once"
    if path.startswith(("src/", "include/")) and not re.search(TEST_FILE, path):
        code = without_comments_and_strings(text)
        for pattern, what, except_in in FORBIDDEN_IN_SRC:
            for match in re.finditer(pattern, code):
                if path != except_in:
                    yield f"{path}:{code.count(chr(10), 0, match.start()) + 1}: {match[0].strip()}: {what}"


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    files = []
    for top in ("include", "src", "tools", "tests", "bench", "examples", "fuzz", "python"):
        for suffix in ("cc", "h", "py", "sh"):
            files += sorted((root / top).rglob(f"*.{suffix}"))
    if not any(file.suffix == ".cc" for file in files):
        sys.exit(f"layers_test: no sources below {root}")
    errors = [error for file in files for error in check_file(root, file)]
    print("\n".join(errors + [f"layers_test: {len(files)} files, {len(errors)} errors"]))
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
