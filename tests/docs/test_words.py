"""The hooks `words-...` of .pre-commit-config.yaml, applied to every program and document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "bokehflux", "docs", "kernels", "scripts", "tests", "weights")
HOOK = re.compile(r"- id: (words-\w[\w-]*)\n +name: (.*)\n +entry: '(.*)'\n")
HOOKS = {
    name: (advice, re.compile(pattern.replace("''", "'")))
    for name, advice, pattern in HOOK.findall((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
}
DENIED = {
    "words-is-no": ["a_file_that_is_no_picture", "these_are_no_weights"],
    "words-old": ["looked_in_vain_for", "Likewise_for_T5"],
    "words-also": ["refused,_also_when", "for_a_pair_also_the_pivot", "Returns_also_its_slot"],
    "words-docstring": ['"""Of_every_row', '"""..._also_of_those'],
    "words-noun": ["what_lacks_and_why"],
}
"""Underscores stand for spaces, so that this file does not deny itself."""
ALLOWED = [
    "there is no such file", "it is no longer open", "no picture is lost", "this is also the largest",
    "it also tells shapes", '"""Off by default"""',
]  # fmt: skip


def files() -> Iterator[Path]:
    yield from sorted(ROOT.glob("*.md"))
    for folder in FOLDERS:
        yield from sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md"))


def findings(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: {advice}"
        for number, line in enumerate(lines, 1)
        for advice, pattern in HOOKS.values()
        if (match := pattern.search(line))
    ]


@pytest.mark.parametrize("hook", DENIED)
def test_a_hook_finds_what_it_denies(hook: str) -> None:
    _, pattern = HOOKS[hook]
    assert all(pattern.search(sample.replace("_", " ")) for sample in DENIED[hook])
    assert not [sample for sample in ALLOWED if pattern.search(sample)]


def test_every_hook_has_samples() -> None:
    assert set(HOOKS) == set(DENIED)


def test_no_file_holds_denied_words() -> None:
    found = {path: findings(path) for path in files()}
    assert len(found) > 200, "the walk sees the whole project"
    bad = [line for lines in found.values() for line in lines]
    assert not bad, "\n".join(bad)
