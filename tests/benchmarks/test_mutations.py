"""The deliberate bugs of ``benchmarks/mutations.py`` match the code, and the table in the documentation is complete."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from mutations import MUTATIONS, ROOT, Mutation

each_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)


@each_mutation
def test_the_bug_can_be_put_into_its_file(mutation: Mutation) -> None:
    correct = (ROOT / mutation.path).read_text()
    wrong = mutation.apply(correct)  # raises unless each text occurs exactly once
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(correct))


@each_mutation
def test_its_test_files_exist(mutation: Mutation) -> None:
    assert mutation.tests
    assert [test for test in mutation.tests if not (ROOT / "tests" / test).is_file()] == []


@pytest.mark.parametrize("text", ["", "a b a"])
def test_a_text_that_is_missing_or_ambiguous_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not once"):
        Mutation("a bug", "file.py", (("a", "c"),), ()).apply(text)


def test_the_table_in_the_documentation_names_every_bug_and_the_test_that_catches_it() -> None:
    section = (ROOT / "docs" / "reliability.md").read_text().split("## Mutation tests")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| `(\S+\.py)` \| `(\S+\.py)`: `(\S+)` \|$", section, re.MULTILINE)
    assert [row[:2] for row in rows] == [(mutation.what, mutation.file) for mutation in MUTATIONS]
    for mutation, (*_, file, test) in zip(MUTATIONS, rows, strict=True):
        (path,) = [path for path in mutation.tests if Path(path).name == file]
        source = (ROOT / "tests" / path).read_text()
        missing = [
            name for name in test.split(".") if not re.search(rf"^\s*(def |class |){name}\b", source, re.MULTILINE)
        ]
        assert not missing, f"{missing} is not in tests/{path}: {mutation.what}"
