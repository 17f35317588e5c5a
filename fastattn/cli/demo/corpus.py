"""Real sentences with labels: the docstrings of the standard library, labelled by the package they come from."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "unittest", "xml", "tkinter")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass
class Corpus:
    labels: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def docstrings(source: str) -> list[str]:
    """Every docstring of a module's source."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(source)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes))
    return [text for text in found if text]


def sentences(docstring: str) -> list[str]:
    """The prose sentences of a docstring: at least four words, no prompts and no signatures."""
    found = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph:
            continue
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            words = sentence.split()
            if 4 <= len(words) <= 60:
                found.append(sentence)
    return found


def load_corpus(seed: int, per_class: int, test_share: float = 0.3) -> Corpus:
    """Sentences of PACKAGES, split into train and test by module: no module, and no sentence, is on both sides."""
    library = Path(sysconfig.get_path("stdlib"))
    by_module: dict[str, dict[str, list[str]]] = defaultdict(dict)
    owners: dict[str, set[str]] = defaultdict(set)
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            if {"test", "tests", "idle_test"} & set(path.parts[len(library.parts) :]):
                continue
            try:
                texts = docstrings(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, OSError):
                continue
            found = list(dict.fromkeys(s for text in texts for s in sentences(text)))
            if found:
                by_module[package][str(path)] = found
                for sentence in found:
                    owners[sentence].add(str(path))
    labels = sorted(by_module)
    generator = random.Random(seed)
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, package in enumerate(labels):
        modules = sorted(by_module[package].items())
        generator.shuffle(modules)
        # A sentence of several modules could leak: it is left out.
        kept = [[s for s in found if len(owners[s]) == 1] for _, found in modules]
        total = min(sum(map(len, kept)), int(per_class / (1 - test_share)))
        wanted = int(total * test_share)
        held_out: list[str] = []
        rest: list[str] = []
        for found in kept:
            side = held_out if len(held_out) + len(found) <= 1.3 * wanted + 1 else rest
            side += found
        generator.shuffle(held_out)
        generator.shuffle(rest)
        test += [(s, label) for s in held_out[:wanted]]
        train += [(s, label) for s in rest[:per_class]]
    generator.shuffle(train)
    generator.shuffle(test)
    return Corpus(labels, train, test)
