"""What the fuzz tests share: hostile JSON values, files made of bytes, command lines."""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from bokehflux.app import cli

HUGE = (10**9, 2**31, 2**63, 2**64, 10**30, 10**400)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from(HUGE) | st.floats() | st.text(max_size=4)
    | st.sampled_from([math.nan, math.inf, 1e308, "", "\0", "\ud800", "../x", "/etc"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["content", "0", "a", "type", "id"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
"""Values that no file of ours should hold."""
TEXTS = (
    "",
    "{",
    "[]",
    "null",
    "\0",
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"a": ' + "9" * 5000 + "}",
    "\ufeff{}",
)
"""Files that do not hold a JSON object, or cannot be read."""


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file: length of the header (or another number in its place), header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@contextlib.contextmanager
def changed(path: Path, content: str | bytes | dict[str, Any]) -> Iterator[None]:
    """A file with other contents for a while."""
    before = path.read_bytes()
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    try:
        yield
    finally:
        path.write_bytes(before)


def command(*argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line; anything but an exit is an error of the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def assert_one_message(err: str) -> None:
    """What a person sees of a failure: one line, a list below it at most, nothing that rules the terminal."""
    first, *listed = err.removesuffix("\n").split("\n")
    assert first.startswith("bokehflux: error: ") and err.endswith("\n"), err[:400]
    assert all(line.startswith("  - ") for line in listed), err[:400]
    assert all(line.isprintable() for line in (first, *listed)), err[:400]
