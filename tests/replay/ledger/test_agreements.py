from __future__ import annotations

from collections.abc import Sequence

import pytest

from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.ledger.agreements import AGREEMENTS


def never(numbers: Sequence[int]) -> bool:
    return False


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(4, 100, 200)


def test_the_first_one_decides(ledger: Ledger) -> None:
    joined = [ledger.agreements.join(7, party, lambda party=party: [party] * 4, never) for party in (3, 0, 700)]
    assert joined == [[3] * 4] * 3
    assert ledger.agreements.join(8, 0, lambda: [5] * 4, never) == [5] * 4


def test_one_that_joins_again_begins_anew_with_all_others(ledger: Ledger) -> None:
    for round_ in range(3):
        joined = [ledger.agreements.join(7, party, lambda round_=round_: [round_] * 4, never) for party in range(130)]
        assert joined == [[round_] * 4] * 130


def test_what_is_outdated_is_replaced_for_all(ledger: Ledger) -> None:
    ledger.agreements.join(7, 0, lambda: [1] * 4, never)
    assert ledger.agreements.join(7, 1, lambda: [2] * 4, lambda numbers: numbers[0] == 1) == [2] * 4
    assert ledger.agreements.join(7, 2, lambda: [3] * 4, never) == [2] * 4


def test_only_the_oldest_are_forgotten(ledger: Ledger) -> None:
    for key in range(1, AGREEMENTS + 2):
        ledger.agreements.join(key, 0, lambda key=key: [key] * 4, never)
    kept = [ledger.agreements.join(key, 1, lambda: [0] * 4, never)[0] for key in range(2, AGREEMENTS + 2)]
    assert kept == list(range(2, AGREEMENTS + 2))


def test_one_that_can_not_propose_leaves_nothing(ledger: Ledger) -> None:
    with pytest.raises(ZeroDivisionError):
        ledger.agreements.join(7, 0, lambda: [1 // 0], never)
    assert ledger.agreements.join(7, 0, lambda: [1] * 4, never) == [1] * 4
