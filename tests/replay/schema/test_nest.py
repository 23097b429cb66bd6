"""Generated functions that build TensorDicts of one structure."""

from __future__ import annotations

import pickle

import torch
from tensordict import TensorDict, tensorclass

from embodichain_rl.replay.schema import Nest, Node, node_of


@tensorclass
class Pose:
    position: torch.Tensor


def test_a_built_tensordict_is_that_of_the_constructor() -> None:
    keys = [("observation",), ("next", "reward"), ('it\'s "quoted"', "x"), ("next", "deep", "er"), ("a", "b")]
    values = [torch.randn(3, 2, n + 1) for n in range(len(keys))]
    built = Nest(keys).build(values, [3, 2])
    expected = TensorDict(dict(zip(keys, values, strict=True)), [3, 2])
    assert list(built.keys(True, True)) == list(expected.keys(True, True))
    assert all(built[key] is value for key, value in zip(keys, values, strict=True))
    assert built["next", "deep"].batch_size == expected.batch_size
    # What TensorDict's own unchecked constructor sets is set, and nothing else.
    assert built.__dict__.keys() == TensorDict._new_unsafe({}, torch.Size([3, 2])).__dict__.keys()
    assert built[0]["next"].batch_size == torch.Size([2])
    assert torch.equal(built.clone()["a", "b"], values[-1])
    built["new"] = torch.zeros(3, 2)
    assert torch.equal(torch.stack([built, built])["new"], torch.zeros(2, 3, 2))


def test_names_dimensions_and_tensorclasses_of_nested_tensordicts() -> None:
    agents = TensorDict({"x": torch.zeros(4, 2, 3)}, [4, 2], names=["time", "agent"])
    nodes = [node_of(("agents",), agents, 1), node_of(("pose",), Pose(torch.zeros(4, 3), batch_size=[4]), 1)]
    nest = Nest([("agents", "x"), ("pose", "position")], nodes)
    built = nest.build([torch.ones(5, 2, 3), torch.ones(5, 3)], [5])
    assert built["agents"].batch_size == torch.Size([5, 2])
    assert built["agents"].names == [None, "agent"]
    assert isinstance(built["pose"], Pose)
    assert built["pose"].position.sum() == 15


def test_a_nest_is_a_small_picklable_description() -> None:
    nest = Nest([("observation",), ("agents", "x")], [Node(("agents",), (2,))])
    copied = pickle.loads(pickle.dumps(nest))
    assert copied == nest
    assert copied.fill is nest.fill  # generated once
    assert hash(copied) == hash(nest)
    assert nest != Nest([("observation",), ("agents", "x")])
    assert len(pickle.dumps(nest)) < 400


def test_an_empty_nest() -> None:
    assert Nest([]).build([], [3]).batch_size == torch.Size([3])
