#!/usr/bin/env python3
"""Holds that instructions of newer CPUs stay where a run-time check guards them.

    isolation_test.py --nm NM --objdump OBJDUMP --source SOURCE_DIR OBJECT...

A weak symbol exists in many objects and the linker keeps one copy for all of them. A copy compiled for AVX-512 that
ends up in the place of a baseline one kills the program on an older CPU, in code that never asked for AVX-512. So:

  - the objects of avx512_bf16.cc and amx_bf16.cc define no weak symbol,
  - no weak function of any object holds a VEX or EVEX instruction,
  - objects of sources that are not compiled for several targets hold none at all.
"""

import argparse
import pathlib
import re
import subprocess
import sys

NO_WEAK_SYMBOLS = ("src/kernels/avx512_bf16.cc", "src/kernels/amx_bf16.cc")
# A source is allowed newer instructions if it says so, in one of these ways.
ASKS_FOR_TARGETS = re.compile(r"hwy/foreach_target\.h|HWY_PUSH_ATTRIBUTES|#pragma GCC target|__attribute__\(\(target")

# v*, but not the old verr and verw; BMI instructions and mask registers are VEX too.
VEX = re.compile(r"^(v(?!er[rw])\w+|k(?:mov|and|or|xor|not|add|shift|test|unpck)\w*|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx"
                 r"|sarx|shlx|shrx|t(?:ilezero|ileload\w*|ilestored|dp\w+)|ldtilecfg|sttilecfg)[lq]?$")


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def weak_symbols(nm, path):
    """Names of the weak symbols that an object defines; u is a unique global, V a weak object."""
    return {line.split()[-1] for line in run(nm, "--defined-only", path).splitlines()
            if line.split()[-2:-1] and line.split()[-2] in "uvVwW"}


def vex_instructions(objdump, path):
    """(function, instruction) of each VEX or EVEX instruction."""
    function = "?"
    for line in run(objdump, "-d", "--no-show-raw-insn", path).splitlines():
        header = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if header:
            function = header[1]
            continue
        words = line.split("\t")[1:]
        words = words[0].split() if words else []
        while words and words[0] in ("lock", "rep", "repz", "repnz", "notrack", "bnd", "data16"):
            words = words[1:]
        if words and (VEX.match(words[0]) or re.search(r"%[yz]mm|%k[1-7]|%tmm", " ".join(words))):
            yield function, " ".join(words)


def errors_of(arguments, path):
    match = re.search(r"src/.*\.cc", path)
    if not match:
        return
    source = match[0]
    weak = weak_symbols(arguments.nm, path)
    if source in NO_WEAK_SYMBOLS:
        for symbol in sorted(weak):
            yield f"{source}: weak symbol {symbol}"
    asks = ASKS_FOR_TARGETS.search((pathlib.Path(arguments.source) / source).read_text(encoding="utf-8"))
    seen = set()
    for function, instruction in vex_instructions(arguments.objdump, path):
        if function in seen or (asks and function not in weak):
            continue
        seen.add(function)
        yield f"{source}: '{instruction}' in {'weak ' if function in weak else ''}{function}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nm", default="nm")
    parser.add_argument("--objdump", default="objdump")
    parser.add_argument("--source", default=".")
    parser.add_argument("objects", nargs="+")
    arguments = parser.parse_args()
    errors = [error for path in arguments.objects for error in errors_of(arguments, path)]
    print("\n".join(errors + [f"isolation_test: {len(arguments.objects)} objects, {len(errors)} errors"]))
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
