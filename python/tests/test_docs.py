"""Runs every Python snippet of README.md and docs/python, in the order of its page and in one namespace.

What a snippet shows is compared with what it does:

    print(1 + 1)        # says why -> 2                      what the statement prints
    f(0)                # raises ValueError: f: x is 0...    what it raises, by class and message
    ```text             the block below a snippet            what the whole snippet prints

``...`` stands for any text. A comment ``<!-- needs: torch -->`` on the first line concerns the page, above a snippet
that snippet: where the module is missing, it is not run.
"""

import ast
import contextlib
import doctest
import importlib.util
import inspect
import io
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "python").glob("*.md"))]
FENCE = re.compile(r"(?:^<!-- needs: ([\w., ]+) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `(\w+)` \|([^|]*)\|", re.MULTILINE)

# Pages with the tables of a function's parameters, below the heading that names it where a page has several.
DOCUMENTED = [
    ("ring_attention", "ring_attention.md", None), ("attention", "attention.md", None),
    ("attention_backward", "attention_backward.md", None), ("merge", "merge.md", None),
    ("run_workers", "workers.md", "run_workers"), ("explain", "explain_and_reference.md", "annulus.explain"),
    ("torch.scaled_dot_product_attention", "torch.md", "scaled_dot_product_attention"),
    ("torch.context_parallel_attention", "torch.md", "context_parallel_attention"),
    ("transformers.register", "transformers.md", None),
]  # fmt: skip
ARRAYS = {"query", "key", "value", "dout", "out", "lse"}  # those that a page may have in its table of arrays


def missing(needs):
    """The first module of a list that is not there."""
    for name in re.split(r"[, ]+", needs or ""):
        try:
            if name and importlib.util.find_spec(name) is None:
                return name
        except ModuleNotFoundError:
            return name
    return None


def needs_of(page):
    found = re.match(r"<!-- needs: ([\w., ]+) -->", page.read_text(encoding="utf-8"))
    return found[1] if found else ""


def agree(expected, found):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected.strip() + "\n", found.strip() + "\n", flags)


def run_statement(statement, comment, namespace):
    """Runs one statement and checks what its comment promises. Returns what it printed."""
    code = compile(ast.Module([statement], []), "<snippet>", "exec")
    printed = io.StringIO()
    raises = re.search(r"# raises (\w+)(?:: (.*))?$", comment)
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    except Exception as error:
        if not raises or type(error).__name__ != raises[1]:
            raise
        assert agree(raises[2] or "...", str(error).partition("\n")[0]), f"promised {raises[2]}\nraised   {error}"
        return printed.getvalue()
    assert not raises, f"nothing was raised: {comment}"
    promised = re.search(r"#(?:.* )?-> (.*)$", comment)
    if promised:
        assert agree(promised[1], printed.getvalue()), f"promised {promised[1]}\nprinted  {printed.getvalue()}"
    return printed.getvalue()




def run_page(page):
    """Runs a page in this process and prints what is left out."""
    namespace = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    for fence, following in zip(fences, [*fences[1:], None]):
        needs, language, source = fence.groups()
        if language != "python":
            continue
        if missing(needs):
            print(f"without {missing(needs)}")
            continue
        first_line = text.count("\n", 0, fence.start(3))
        lines, printed = source.split("\n"), ""
        tree = ast.parse(source)
        for statement in tree.body:
            comment = "" if hasattr(statement, "body") else lines[statement.end_lineno - 1]
            try:
                printed += run_statement(statement, comment, namespace)
            except Exception:
                print(f"{page.name}:{first_line + statement.lineno}: {lines[statement.lineno - 1]}", file=sys.stderr)
                raise
        if following and following[2] == "text" and not text[fence.end() : following.start()].strip():
            assert agree(following[3], printed), f"{page.name}: promised\n{following[3]}\nprinted\n{printed}"


def marks(needs):
    words = re.split(r"[., ]+", needs)
    return [getattr(pytest.mark, name) for name in ("torch", "jax", "transformers") if name in words]


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem, marks=marks(needs_of(page))) for page in PAGES])
def test_snippets_do_what_they_say(page):
    if absent := missing(needs_of(page)):
        pytest.skip(f"needs {absent}")
    command = [sys.executable, __file__, str(page)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    if run.stdout:
        pytest.skip(f"the rest was run, {', '.join(sorted(set(run.stdout.splitlines())))}")


def section(page, heading):
    text = page.read_text(encoding="utf-8")
    if heading is None:
        return text
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize(
    "name, page, heading", [pytest.param(*row, id=row[0], marks=marks(row[0])) for row in DOCUMENTED]
)
def test_tables_have_every_parameter_and_its_default(name, page, heading):
    module = name.rpartition(".")[0]
    function = pytest.importorskip(f"annulus.{module}" if module else "annulus", exc_type=ImportError)
    function = getattr(function, name.rpartition(".")[2])
    text = section(ROOT / "docs" / "python" / page, heading)
    rows = {row[0]: row[1].strip() for row in ROW.findall(text)}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ARRAYS and parameter.default is parameter.empty:
            assert parameter.name in rows, f"{page} does not document {parameter.name}"
        elif parameter.kind is parameter.VAR_KEYWORD:
            assert parameter.name in rows
        else:
            default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
            assert rows.get(parameter.name) == default, f"{page}: {parameter.name} has default {default}"


@pytest.mark.jax
@pytest.mark.parametrize("name", ("ring_attention", "attention"))
def test_jax_has_the_parameters_of_the_plain_functions(name):
    """Or the page of JAX says what differs."""
    import annulus

    pytest.importorskip("jax")
    there = inspect.signature(getattr(pytest.importorskip("annulus.jax"), name)).parameters
    here = inspect.signature(getattr(annulus, name)).parameters
    text = (ROOT / "docs" / "python" / "jax.md").read_text(encoding="utf-8")
    for parameter in there.keys() | here.keys():
        both = parameter in there and parameter in here and there[parameter].default == here[parameter].default
        assert both or f"`{parameter}`" in text, parameter


def test_every_public_name_has_a_place():
    import annulus

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in annulus.__all__:
        assert re.search(rf"\b{name}\b", text), f"{name} is on no page"


if __name__ == "__main__":
    run_page(pathlib.Path(sys.argv[1]))
