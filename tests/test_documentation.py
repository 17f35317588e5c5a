"""What the documentation says runs: docstrings' examples, Markdown's code blocks, links."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fastattn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastattn"

# The modules whose names a user calls, and those names that have no example of their own, with the
# reason.
PUBLIC = [
    "fastattn",
    "fastattn.functional",
    "fastattn.nn",
    "fastattn.testing",
    "fastattn.training",
    "fastattn.reference",
    "fastattn.integrations.torch_nn",
    "fastattn.integrations.transformers",
]
NO_EXAMPLE = {
    "CompileReport": "compile_report returns it",
    "Entry": "a PatchReport's example reads it",
    "FastAttnWarning": "a warning",
    "attention_mask": "transformers calls it, with a mask function of its own",
    "attention_backward": "the example of fastattn.reference",
    "attention_jvp": "the example of fastattn.reference",
    "attention_double_backward": "the example of fastattn.reference",
    "register": "it needs transformers; README.md's block runs it",
}
# Functions whose arguments are another's, which their docstrings name.
NO_ENTRIES = ("attention_in", "attention_forward", "attention_weights")
# Markdown whose Python blocks run, the blocks of a file in one namespace, in order.
BLOCKS = ["README.md", "DESIGN.md", "CONTRIBUTING.md", "benchmarks/README.md"]
MARKDOWN = [*BLOCKS, "benchmarks/results/README.md"]

pytestmark = pytest.mark.native


def public_names() -> list[tuple[str, object]]:
    """The functions and classes that the public modules export, by their qualified names."""
    found = {}
    for name in PUBLIC:
        module = importlib.import_module(name)
        for item in (getattr(module, n) for n in module.__all__):
            if inspect.isfunction(item) or inspect.isclass(item):
                found[f"{item.__module__}.{item.__qualname__}"] = item
    for item in (fastattn.backends.explain, fastattn.integrations.compiler.backend):
        found[f"{item.__module__}.{item.__qualname__}"] = item
    return sorted(found.items())


NAMES = public_names()
EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if re.search(r"^ *>>> ", path.read_text(), re.MULTILINE)
]


def entries(docstring: str) -> set[str]:
    """The arguments that a docstring has an entry for: ``name: ...``, or ``a, b: ...`` where the
    entry refers to a list of shared arguments."""
    found = set()
    for names, text in re.findall(r"^ {4}(\w+(?:, \w+)*):((?:.|\n {8})*)", docstring, re.MULTILINE):
        if "," not in names or "see ``" in re.sub(r"\s+", " ", text):
            found.update(names.split(", "))
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_run(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "fastattn": fastattn, **vars(module)}
    runner = doctest.DocTestRunner(verbose=False)
    tests = [t for t in doctest.DocTestFinder().find(module, globs=names) if t.examples]
    assert tests
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("item", [x for _, x in NAMES], ids=[name for name, _ in NAMES])
def test_public_names_are_documented(item):
    docstring = inspect.cleandoc(item.__doc__ or "")
    assert docstring
    assert ">>> " in docstring or item.__name__ in NO_EXAMPLE


@pytest.mark.parametrize("name", [name for name, x in NAMES if inspect.isfunction(x)])
def test_every_argument_of_a_function_has_an_entry(name):
    function = dict(NAMES)[name]
    if function.__name__ not in NO_ENTRIES:
        arguments = set(inspect.signature(function).parameters)
        assert arguments <= entries(inspect.cleandoc(function.__doc__))


@pytest.mark.parametrize("name", [name for name, x in NAMES if inspect.isclass(x)])
def test_every_argument_of_a_module_or_autograd_function_has_an_entry(name):
    kind = dict(NAMES)[name]
    documented = [(kind.__init__, kind.__doc__), (getattr(kind, "forward", None), kind.__doc__)]
    if issubclass(kind, nn.Module):
        documented[1] = kind.forward, kind.forward.__doc__
    elif issubclass(kind, torch.autograd.Function):
        documented = documented[1:]
    else:
        return
    for method, docstring in documented:
        arguments = set(inspect.signature(method).parameters) - {"self", "args", "kwargs"}
        assert arguments <= entries(inspect.cleandoc(docstring))


def test_an_argument_without_an_entry_is_seen():
    assert entries("Adds.\n\nArgs:\n    a: one\n        more: of it\n    b, c: both") == {"a"}
    assert entries("Adds.\n\nArgs:\n    a, b: see\n        ``fastattn.reference``.") == {"a", "b"}


def test_exceptions_exist():
    names = {name.rpartition(".")[2] for name, _ in NAMES}
    assert {*NO_EXAMPLE, *NO_ENTRIES} <= names


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """The first line's number and the text of each Python block."""
    text = path.read_text()
    return [
        (text.count("\n", 0, match.start(1)) + 1, match[1])
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> str:
    """A folder with a small BERT: the ``name`` of README.md's block, which would be downloaded."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("file", BLOCKS)
def test_code_blocks_run(file, request, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, block in python_blocks(ROOT / file):
        if "from_pretrained(name" in block:
            names["name"] = request.getfixturevalue("pretrained")
        # Empty lines put the block where it stands in the file, for the traceback.
        exec(compile("\n" * (line - 1) + block, ROOT / file, "exec"), names)


def test_readme_has_blocks():
    assert len(python_blocks(ROOT / "README.md")) >= 3


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives the headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("file", MARKDOWN)
def test_links_lead_somewhere(file):
    path = ROOT / file
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in (x for x in links if "://" not in x):
        target, _, anchor = link.partition("#")
        there = path.parent / target if target else path
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def drawn() -> list[tuple[str, str]]:
    """What DESIGN.md's text drawings of calls say is in which file or folder."""
    found = []
    for line in (ROOT / "DESIGN.md").read_text().splitlines():
        match = re.fullmatch(r"[│ ]*[├└]─ (.+?) {2,}([\w/.]+(?:\.py|\.h|\.cpp|/)).*", line)
        for name in match[1].split(", ") if match else ():
            name = re.sub(r"^(n [=>] \d: |or )|\(.*| \.\.\.$", "", name)
            found.append((re.split(r"::|\.", name)[-1], match[2]))
    return found


def test_what_design_draws_is_there():
    assert len(drawn()) > 30
    for name, place in drawn():
        path = next(p for p in (PACKAGE / place, ROOT / place) if p.exists())
        texts = [p.read_text() for p in (path.rglob("*.*") if path.is_dir() else [path])
                 if p.suffix in (".py", ".h", ".cpp", ".cu")]  # fmt: skip
        assert any(re.search(rf"\b{name}\b", text) for text in texts), (name, place)


def test_lazy_names_are_modules_or_documented():
    """help(fastattn) and dir(fastattn) show every name."""
    for name in fastattn.__all__:
        item = getattr(fastattn, name)
        assert isinstance(item, str | ModuleType) or item.__doc__
