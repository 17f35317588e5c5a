"""Real sentences with labels: the standard library's docstrings, labelled by the package they come
from."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_NOT_PROSE = ("test", "tests", "idle_test", "site-packages", "__pycache__")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORDS = range(5, 61)
_MIN_MODULES = 3  # fewer cannot be split by module in a meaningful way


@dataclass(frozen=True)
class Sentence:
    text: str
    label: int  # an index into Corpus.packages
    module: str  # its path below the standard library


@dataclass(frozen=True)
class Corpus:
    """Train and test sentences; no module, and no sentence, is in both."""

    packages: list[str]
    train: list[Sentence]
    test: list[Sentence]

    @property
    def majority(self) -> float:
        """The accuracy of always answering with the most frequent package of the test sentences."""
        return max(Counter(s.label for s in self.test).values()) / len(self.test)


def docstrings(source: str) -> list[str]:
    """Every docstring of a module's source. Raises SyntaxError for a source that does not parse."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(n) for n in ast.walk(ast.parse(source)) if isinstance(n, nodes))
    return [text for text in found if text]


def sentences(docstring: str) -> list[str]:
    """The prose of a docstring, sentence by sentence: no doctests, nothing very short or very
    long."""
    paragraphs = (p for p in re.split(r"\n\s*\n", docstring) if ">>>" not in p)
    found = (s for p in paragraphs for s in _SENTENCE_END.split(" ".join(p.split())))
    return [s for s in found if len(s.split()) in _WORDS]


def _key(sentence: str) -> str:
    """Sentences that differ in case, digits or punctuation only are the same sentence."""
    return " ".join(re.findall(r"[a-z]+", sentence.lower()))


def read_packages(library: Path) -> dict[str, dict[str, list[str]]]:
    """``{package: {module path: sentences}}``; a sentence that several modules have is left out."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    owners: Counter[str] = Counter()
    for init in sorted(library.glob("*/__init__.py")):
        modules = found.setdefault(init.parent.name, {})
        for path in sorted(init.parent.rglob("*.py")):
            relative = path.relative_to(library)
            if set(relative.parts) & set(_NOT_PROSE):
                continue
            try:
                texts = docstrings(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError, OSError):
                continue
            modules[relative.as_posix()] = {_key(s): s for text in texts for s in sentences(text)}
            owners.update(modules[relative.as_posix()].keys())
    return {
        package: {
            module: texts
            for module, by_key in modules.items()
            if (texts := [s for key, s in by_key.items() if owners[key] == 1])
        }
        for package, modules in found.items()
    }


def load_corpus(
    seed: int, packages: int, train_cap: int, test_cap: int, library: Path | None = None
) -> Corpus:
    """The ``packages`` packages with the most sentences, at most ``train_cap`` and ``test_cap``
    sentences of each.

    The split is by module and depends on ``seed`` and on the library's sources alone. Raises
    ValueError when the
    library has too few documented packages, as when its sources are not installed.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    candidates = {p: m for p, m in read_packages(library).items() if len(m) >= _MIN_MODULES}
    largest = sorted(candidates, key=lambda p: (-sum(map(len, candidates[p].values())), p))
    names = sorted(largest[:packages])
    if len(names) < 2:
        raise ValueError(f"corpus: expected documented packages in {library}, got {names}")
    train: list[Sentence] = []
    test: list[Sentence] = []
    for label, package in enumerate(names):
        generator = random.Random(f"{seed} {package}")
        sides = _split(candidates[package], train_cap, test_cap, generator)
        for side, chosen, cap in zip((train, test), sides, (train_cap, test_cap), strict=True):
            pool = [Sentence(s, label, m) for m, texts in chosen.items() for s in texts]
            side += generator.sample(pool, min(cap, len(pool)))
    random.Random(seed).shuffle(train)
    return Corpus(names, train, test)


def _split(
    modules: dict[str, list[str]], train_cap: int, test_cap: int, generator: random.Random
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Modules to learn from and modules to be judged by: random ones, up to their share of the
    sentences."""
    total = sum(map(len, modules.values()))
    wanted = min(total * test_cap / (train_cap + test_cap), test_cap * 1.5)
    order = sorted(modules)
    generator.shuffle(order)
    test: dict[str, list[str]] = {}
    for module in order:
        if sum(map(len, test.values())) + len(modules[module]) <= max(wanted, 1):
            test[module] = modules[module]
    if not test:
        smallest = min(order, key=lambda m: len(modules[m]))
        test[smallest] = modules[smallest]
    return {m: texts for m, texts in modules.items() if m not in test}, test
