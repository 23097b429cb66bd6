"""The policies of pick and place learn, and survive the copying that they go through on their way to the evaluation."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from example_process import EXAMPLES
from tensordict import TensorDict

pytest.importorskip("gymnasium_robotics", reason="needs the extra [robotics]")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As in the example. Where others have the processor, several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", ["mlp", "act", "diffusion"])
def test_policy_learns_and_can_be_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "training")
    from learning import Learner, LearningConfig, make_policy

    state, goal = torch.randn(64, 1, 25), torch.randn(64, 1, 3)
    is_pad = torch.zeros(64, 8, dtype=torch.bool)
    is_pad[:8, 4:] = True
    actions = torch.tanh(goal.repeat(1, 8, 2)[..., :4])
    batch = TensorDict({"observation": state, "desired_goal": goal, "action": actions, "action_is_pad": is_pad}, [64])
    learner = Learner(make_policy(LearningConfig(policy=name), seed=0))
    losses = [learner.update(batch) for _ in range(100)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])

    policy = learner.averaged
    twin = make_policy(LearningConfig(policy=name), seed=1)
    twin.load_state_dict(policy.state_dict())
    observation = {"observation": state[0, 0].numpy(), "desired_goal": goal[0, 0].numpy()}
    answers = []
    for each in (policy, twin, copy.deepcopy(policy)):
        torch.manual_seed(0)
        answers.append(each.act(observation))
        assert len(list(each.parameters())) == len(list(policy.parameters()))
    assert answers[0].shape == (8, 4)
    assert np.abs(answers[0]).max() <= 1.0
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


@pytest.mark.usefixtures("_one_thread")
def test_a_policy_that_sees_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four spots, one of them red, and the actions say where that one is."""
    monkeypatch.syspath_prepend(EXAMPLES / "training")
    from learning import Learner
    from policies.pixels import PixelACTPolicy

    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randint(44, (2, 64), generator=generator)
    images = torch.zeros(64, 1, 48, 48, 3, dtype=torch.uint8)
    for number, (row, column) in enumerate(zip(rows, columns, strict=True)):
        images[number, 0, row : row + 4, column : column + 4, 0] = 255
        images[number, 0, column : column + 4, row : row + 4, 2] = 255
    actions = (torch.stack([rows, columns, rows], -1) / 22 - 1)[:, None].repeat(1, 4, 1)
    entries = {"pixels": images, "joints": torch.randn(64, 1, 3, generator=generator), "action": actions}
    batch = TensorDict({**entries, "action_is_pad": torch.zeros(64, 4, dtype=torch.bool)}, [64])
    torch.manual_seed(0)
    learner = Learner(PixelACTPolicy(3, 3, 4))
    losses = [learner.update(batch) for _ in range(150)]
    assert losses[-1] < 0.5 * losses[20]
