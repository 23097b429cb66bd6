"""The public names and their signatures are those of ``docs/public_surface.txt``."""

from __future__ import annotations

import difflib

from public_surface import FILE, public_surface


def test_is_the_one_that_is_written_down() -> None:
    difference = difflib.unified_diff(
        FILE.read_text().splitlines(),
        public_surface().splitlines(),
        "docs/public_surface.txt",
        "the code",
        lineterm="",
    )
    told = "\n".join(difference)
    assert not told, (
        f"The public surface has changed:\n\n{told}\n\n"
        "If this is intended, run `make surface`, and name the change in CHANGELOG.md; "
        "docs/stability.md says what may change in which release."
    )
