"""The random generators that a policy or a factory of environments carries into a worker process.

A copy of a generator, whether forked or pickled, continues the stream of the original. So all workers would draw the
same numbers, and a replaced worker would draw them again. Therefore every worker seeds its copies.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase

__all__ = ["seed_held_generators"]

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random, gymnasium.Space)
_LEAVES = (type, ModuleType, BuiltinFunctionType, str, bytes, int, float, np.ndarray, torch.Tensor, TensorDictBase)

MAX_OBJECTS = 10_000
"""Maximum number of objects to look at. A policy that refers to more is not expected to hold generators among them."""


def seed_held_generators(owner: Any, seeds: np.random.SeedSequence) -> None:
    """Seed every random generator that an object refers to, each with an independent stream.

    The generators are found in the attributes of objects, in modules of torch, in containers, and in the closures,
    arguments and global variables that a function uses. They are those of torch, NumPy and ``random``, and Gymnasium's
    spaces, which draw samples.

    Args:
        owner: the object.
        seeds: the source of the seeds. Every call takes new ones from it.

    Example:
        >>> noise = np.random.default_rng(0)
        >>> seed_held_generators(lambda observation: noise.normal(), np.random.SeedSequence(1))
        >>> noise.normal() == np.random.default_rng(0).normal()
        False
    """
    for generator in list(_generators_of(owner)):
        _seed(generator, *seeds.spawn(1))


def _seed(generator: Any, sequence: np.random.SeedSequence) -> None:
    number = int(sequence.generate_state(1)[0]) % 2**31
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(sequence).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(number)
    else:
        generator.seed(number)


def _generators_of(owner: Any) -> Iterator[Any]:
    seen: dict[int, Any] = {}  # keeps the objects, so that no id is reused
    waiting = [owner]
    while waiting and len(seen) < MAX_OBJECTS:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _LEAVES):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, _GENERATORS):
            yield thing
        else:
            waiting.extend(reversed(_parts_of(thing)))


def _parts_of(thing: Any) -> list[Any]:
    if isinstance(thing, FunctionType):
        return _variables_of(thing)
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, Mapping):
        return list(thing.values()) if isinstance(thing, dict) else []
    if isinstance(thing, (list, tuple)):
        return list(thing)
    parts = list(getattr(thing, "__dict__", {}).values())
    call = vars(type(thing)).get("forward" if isinstance(thing, torch.nn.Module) else "__call__")
    return [*parts, call] if isinstance(call, FunctionType) else parts


def _variables_of(function: FunctionType) -> list[Any]:
    """Return the values of the global variables, the closure and the default arguments of a function."""
    values = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # the variable has no value yet
            continue
    return [*values, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
