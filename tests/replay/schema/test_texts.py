"""The table of texts: the same ids in every process, whoever else adds to it or is killed meanwhile."""

from __future__ import annotations

import copy
import enum
import fcntl
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instructions import at_every_instruction, run_in_child_until
from steps import Child
from tensordict import NonTensorData, NonTensorStack, TensorDict, lazy_stack

from embodichain_rl.errors import InvalidArgumentError, TextTableFullError, UnknownTextError
from embodichain_rl.replay.schema.text_entries import as_non_tensor, text_array
from embodichain_rl.replay.schema.texts import TextTable

any_text = st.text(st.characters(codec=None), max_size=30)


class Task(str, enum.Enum):  # noqa: UP042 - str() of such a member is not its value
    LIFT = "lift"


def seen_by_another(table: TextTable) -> TextTable:
    """The same memory as another process sees it, which has read nothing yet and opens the lock for itself."""
    other = TextTable.__new__(TextTable)
    other.__dict__.update(table.__dict__)
    other._map()
    return other


def is_free(table: TextTable) -> bool:
    fd = table._lock._lock_file().fd
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


class TestIds:
    @settings(max_examples=30)
    @given(st.lists(any_text, max_size=20))
    def test_are_those_of_a_list_of_what_came_first(self, texts: list[str]) -> None:
        table = TextTable(max_texts=64, max_bytes=1 << 14)
        known = list(dict.fromkeys(["", *texts]))
        assert [table.intern(text) for text in texts] == [known.index(text) for text in texts]
        assert table.resolve(range(len(table))) == known
        again = seen_by_another(table)
        assert again.resolve(range(len(table))) == known
        assert [again.intern(text) for text in texts] == [known.index(text) for text in texts]
        assert len(table) == len(known)

    @pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3), (2, 1, 2)], ids=str)
    def test_of_arrays_are_resolved_to_nested_lists(self, shape: tuple[int, ...]) -> None:
        table = TextTable()
        texts = np.array([f"text {n}" for n in range(int(np.prod(shape)))], dtype=object).reshape(shape)
        ids = table.ids_of(texts)
        assert ids.dtype == np.int32
        assert ids.shape == shape
        for form in (ids, torch.from_numpy(ids), ids.tolist()):
            assert table.resolve(form) == texts.tolist()

    def test_of_a_member_of_an_enumeration_is_that_of_its_value(self) -> None:
        table = TextTable()
        assert table.intern(Task.LIFT) == table.intern("lift") == 1
        assert type(table.resolve(1)) is str
        assert text_array(NonTensorData(Task.LIFT)).tolist() == "lift"

    @pytest.mark.parametrize("wrong", [1.5, torch.tensor([1.0]), [True], "lift"], ids=repr)
    def test_are_integers(self, wrong: object) -> None:
        with pytest.raises(InvalidArgumentError, match="the ids of texts are integers"):
            TextTable().resolve(wrong)

    @pytest.mark.parametrize("wrong", [1, -1, 2**40])
    def test_that_were_never_given_out_are_refused(self, wrong: int) -> None:
        with pytest.raises(UnknownTextError, match=f"Got the id {wrong}, but the table holds 1 texts, 0 to 0"):
            TextTable().resolve([0, wrong])

    @pytest.mark.parametrize("wrong", [b"lift", None, 3])
    def test_are_given_to_strings_only(self, wrong: object) -> None:
        with pytest.raises(InvalidArgumentError, match="takes strings"):
            TextTable().intern(wrong)


class TestFull:
    def test_of_strings(self) -> None:
        table = TextTable(max_texts=3)
        ids = [table.intern("a"), table.intern("b")]
        with pytest.raises(TextTableFullError, match="holds 3 of at most 3 strings"):
            table.intern("c")
        assert [table.intern("a"), table.intern("b")] == ids

    def test_of_bytes(self) -> None:
        table = TextTable(max_bytes=10)
        assert table.intern("äöü") == 1
        with pytest.raises(TextTableFullError, match=r"new string of 5 bytes.*6 of at most 10 bytes"):
            table.intern("12345")
        assert table.resolve([table.intern("1234"), 1]) == ["1234", "äöü"]

    def test_takes_no_memory_beforehand(self) -> None:
        table = TextTable()
        table.intern("lift")
        assert os.fstat(table.block._fd).st_blocks * 512 <= 4 * os.sysconf("SC_PAGE_SIZE")


def intern_many(table: TextTable, first: int, count: int) -> list[int]:
    return [table.intern(f"text {n}") for n in range(first, first + count)]


def resolve(table: TextTable, ids: list[int]) -> list[str]:
    return table.resolve(ids)


class TestShared:
    @pytest.mark.parametrize("method", ["fork", "forkserver"])
    def test_by_processes_that_all_add(self, method: str) -> None:
        table = TextTable()
        early = table.intern("early")
        child = Child(method, table)
        child.begin(intern_many, 0, 300)
        ours = [*reversed([table.intern(f"text {n}") for n in reversed(range(100, 400))])]
        theirs = child.result()
        assert theirs[100:] == ours[:200]
        assert len(table) == 402
        assert sorted({*theirs, *ours}) == list(range(2, 402))
        assert child.call(resolve, ours) == [f"text {n}" for n in range(100, 400)]
        assert child.call(resolve, [early]) == ["early"]
        assert table.resolve(theirs) == [f"text {n}" for n in range(300)]
        child.end()

    def test_by_threads(self) -> None:
        table = TextTable()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda first: intern_many(table, first, 500), [0, 100, 200, 0]))
        assert found[0] == found[3]
        assert found[0][200:] == found[2][:300]
        assert table.resolve(found[1]) == [f"text {n}" for n in range(100, 600)]
        assert len(table) == 701

    def test_a_copy_has_the_same_ids_and_a_life_of_its_own(self) -> None:
        table = TextTable()
        ids = intern_many(table, 0, 5)
        for own in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
            assert own.resolve(ids) == table.resolve(ids)
            own.intern("more")
            assert len(own) == len(table) + 1

    def test_killed_at_any_instruction(self) -> None:
        table = TextTable()
        instruction = killed = 0
        while run_in_child_until(instruction, partial(table.intern, f"instruction {killed}, of a child")):
            # The child's string was added, or it was not; in neither case is another one touched.
            number = table.intern(f"instruction {killed}, of a child")
            assert number == 2 * killed + 1
            assert table.intern(f"after {killed}") == 2 * killed + 2
            assert table.resolve(range(1, len(table))) == [
                text for n in range(killed + 1) for text in (f"instruction {n}, of a child", f"after {n}")
            ]
            killed += 1
            instruction += 5
        assert killed > 20, f"only {killed} instructions were met"

    def test_another_process_adds_between_any_two_instructions(self) -> None:
        instruction, met = 0, True
        while met:
            table, met = TextTable(max_texts=8, max_bytes=64), False
            other = seen_by_another(table)

            def add(n: int, at: int = instruction, other: TextTable = other) -> None:
                nonlocal met
                if n == at and (met := True) and is_free(other):
                    other.intern("both")
                    other.intern("other")

            ids: list[int] = []
            at_every_instruction(lambda table=table, ids=ids: ids.extend(map(table.intern, ["both", "mine"])), add)
            assert table.resolve(ids) == other.resolve(ids) == ["both", "mine"]
            assert sorted(table.resolve(range(len(table)))) == sorted({*table.resolve(range(len(table)))})
            assert "other" not in other._cache.ids or table.resolve(other.intern("other")) == "other"
            instruction += 1
        assert instruction > 100

    def test_who_looks_between_any_two_instructions_sees_whole_texts(self) -> None:
        table = TextTable()
        reader = seen_by_another(table)

        def look(_: int) -> None:
            reader._map()
            assert all(text in ("", *(f"text {n}" for n in range(6))) for text in reader.resolve(range(len(reader))))

        assert at_every_instruction(lambda: intern_many(table, 0, 6), look) > 300


class TestInTensorDicts:
    @pytest.mark.parametrize(
        ("value", "texts"),
        [
            (NonTensorData("a"), "a"),
            (NonTensorData("a", batch_size=[2, 1]), [["a"], ["a"]]),
            (NonTensorStack("a", "b"), ["a", "b"]),
            (NonTensorStack(NonTensorData("a", batch_size=[2]), NonTensorStack("b", "c")), [["a", "a"], ["b", "c"]]),
            (NonTensorStack(NonTensorStack("a", "b"), NonTensorStack("c", "d"), stack_dim=1), [["a", "c"], ["b", "d"]]),
            (NonTensorData(3), None),
            (NonTensorData(["a"]), None),
            (NonTensorStack("a", 2), None),
            (torch.zeros(2), None),
        ],
        ids=str,
    )
    def test_text_is_what_is_text_alone(self, value: object, texts: object) -> None:
        found = text_array(value)
        assert found is None if texts is None else found.tolist() == texts

    def test_a_lazy_stack_along_the_second_dimension(self) -> None:
        rows = [TensorDict({"say": [f"{n}a", f"{n}b", f"{n}c"]}, [3]) for n in range(2)]
        assert text_array(lazy_stack(rows, 1).get("say")).tolist() == [["0a", "1a"], ["0b", "1b"], ["0c", "1c"]]

    @pytest.mark.parametrize("texts", ["a", ["a", "b"], [["a", "a", "b"], ["b", "a", "b"]]], ids=str)
    def test_there_and_back(self, texts: object) -> None:
        assert text_array(as_non_tensor(texts)).tolist() == texts
