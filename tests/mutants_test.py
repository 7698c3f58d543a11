"""Every deliberate bug of mutants.py still has its place in the sources: exactly one, and a bug there."""

import pathlib
import sys

from mutants import MUTANTS

root = pathlib.Path(sys.argv[1])
lost = [f"{m.name}: {(root / m.file).read_text().count(m.find)} places in {m.file}"
        for m in MUTANTS if (root / m.file).read_text().count(m.find) != 1 or m.find == m.replace]
names = [m.name for m in MUTANTS]
lost += [f"{name}: named twice" for name in sorted(set(names)) if names.count(name) > 1]
print("\n".join(lost) or f"{len(names)} deliberate bugs have their places")
sys.exit(1 if lost else 0)
