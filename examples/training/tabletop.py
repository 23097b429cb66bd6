"""A small world that is cheap to simulate: a hand on a table, pushed by forces, and discs that it should reach.

One `Table` simulates many tables at once, row by row of its tensors. `TableEnv` makes a TorchRL environment of it, for
the workers of an engine. An expert knows everything about the world; a policy is shown what a robot would measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

SECONDS = 0.05
"""Duration of a step."""
FORCE = 6.0
"""Acceleration of a hand of mass 1 by an action of 1."""
LAST_STEPS = 20
"""Number of steps at the end of an episode in which success is decided."""


@dataclass(frozen=True)
class World:
    """What the tables are like. Ranges are pairs of the lowest and the highest value, which are drawn per episode."""

    steps: int = 80
    """Steps of an episode."""
    history: int = 4
    """Number of latest measurements that an observation has."""
    mass: tuple[float, float] = (1.0, 1.0)
    friction: tuple[float, float] = (0.5, 0.5)
    """Deceleration per speed."""
    turn: tuple[float, float] = (0.0, 0.0)
    """Angle in radians by which the camera is turned, and so what it measures of the goal."""
    orbit: tuple[float, float] = (0.2, 0.6)
    """Radius of the circle on which the goal moves."""
    speed: tuple[float, float] = (1.0, 2.0)
    """Angular speed of the goal, in one direction or the other."""
    motor_noise: float = 0.1
    """Standard deviation of the noise on the actions when they are executed."""
    camera_noise: float = 0.05
    """Standard deviation of the noise on the goal's measured position."""
    tolerance: float = 0.15
    """Success is a mean distance from the goal below this one, in the last steps of an episode."""
    remembers_actions: bool = False
    """Whether a measurement contains the previous action."""


class Table:
    """`rows` independent tables of one world.

    Attributes:
        hand: position of each hand, `[rows, 2]`.
        speed: its velocity, `[rows, 2]`.
        time: number of steps since the reset of each row, `[rows]`.
    """

    def __init__(self, world: World, rows: int, generator: torch.Generator) -> None:
        self.world, self.rows, self._generator = world, rows, generator
        self.parameters: dict[str, torch.Tensor] = {}
        self.hand = self.speed = torch.zeros(rows, 2)
        self.time = torch.zeros(rows, dtype=torch.int64)
        self.reset(torch.ones(rows, dtype=torch.bool))

    def _uniform(self, low: float, high: float, size: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(self.rows, size, generator=self._generator)

    def reset(self, rows: torch.Tensor) -> None:
        """Begin an episode with new parameters in the rows of the mask `[rows]`."""
        world = self.world
        direction = torch.where(self._uniform(0, 1) < 0.5, -1.0, 1.0)
        drawn = {
            "mass": self._uniform(*world.mass),
            "friction": self._uniform(*world.friction),
            "turn": self._uniform(*world.turn),
            "center": self._uniform(-0.5, 0.5, 2),
            "orbit": self._uniform(*world.orbit),
            "phase": self._uniform(0.0, 2 * torch.pi),
            "turning": self._uniform(*world.speed) * direction,
        }
        mask = rows[:, None]
        self.parameters = {
            name: torch.where(mask, value, self.parameters.get(name, value)) for name, value in drawn.items()
        }
        self.hand = torch.where(mask, self._uniform(-1, 1, 2), self.hand)
        self.speed = torch.where(mask, 0.0, self.speed)
        self.time = torch.where(rows, 0, self.time)
        now = self._measure(torch.zeros(self.rows, 2))[:, None].expand(-1, world.history, -1)
        self._measured = now.clone() if rows.all() else torch.where(mask[..., None], now, self._measured)

    def goal(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return position, velocity and acceleration of each goal, `[rows, 2]`."""
        radius, turning = self.parameters["orbit"], self.parameters["turning"]
        angle = self.parameters["phase"] + turning * self.time[:, None] * SECONDS
        outwards = torch.cat([angle.cos(), angle.sin()], 1)
        along = torch.cat([-angle.sin(), angle.cos()], 1)
        return self.parameters["center"] + radius * outwards, radius * turning * along, -radius * turning**2 * outwards

    def distance(self) -> torch.Tensor:
        """Return the distance of each hand from its goal, `[rows]`."""
        return (self.goal()[0] - self.hand).norm(dim=1)

    def expert(self) -> torch.Tensor:
        """Return the expert's actions, `[rows, 2]`. It knows where the goals go, and the parameters of each table."""
        goal, speed, acceleration = self.goal()
        wanted = acceleration + 9.0 * (goal - self.hand) + 6.0 * (speed - self.speed)
        force = self.parameters["mass"] * wanted + self.parameters["friction"] * self.speed
        return (force / FORCE).clamp(-1.0, 1.0)

    def observation(self) -> torch.Tensor:
        """Return the latest measurements, oldest first, `[rows, history * size]`."""
        return self._measured.flatten(1)

    def step(self, action: torch.Tensor) -> None:
        """Execute the actions `[rows, 2]`, with noise."""
        noise = self.world.motor_noise * torch.randn(self.rows, 2, generator=self._generator)
        force = FORCE * (action + noise).clamp(-1.0, 1.0) - self.parameters["friction"] * self.speed
        self.speed = self.speed + SECONDS * force / self.parameters["mass"]
        self.hand = self.hand + SECONDS * self.speed
        self.time = self.time + 1
        self._measured = torch.cat([self._measured[:, 1:], self._measure(action)[:, None]], 1)

    def _measure(self, action: torch.Tensor) -> torch.Tensor:
        noise = self.world.camera_noise * torch.randn(self.rows, 2, generator=self._generator)
        x, y = (self.goal()[0] - self.hand).unbind(1)
        cos, sin = self.parameters["turn"][:, 0].cos(), self.parameters["turn"][:, 0].sin()
        seen = torch.stack([cos * x - sin * y, sin * x + cos * y], 1) + noise
        return (
            torch.cat([seen, self.speed, action], 1)
            if self.world.remembers_actions
            else torch.cat([seen, self.speed], 1)
        )


def observation_size(world: World) -> int:
    return world.history * (6 if world.remembers_actions else 4)


Actor = Callable[[torch.Tensor], torch.Tensor]
"""A function from observations `[rows, size]` to actions `[rows, 2]`."""


@torch.no_grad()
def successes(world: World, actor: Actor | None, episodes: int, seed: int) -> torch.Tensor:
    """Return whether each of some episodes is a success, `[episodes]`. All of them are run as one batch.

    Args:
        world: the world of the episodes.
        actor: who acts; None: the expert.
        episodes: their number.
        seed: of the episodes. The same one has the same goals, starts and parameters for every actor.
    """
    table = Table(world, episodes, torch.Generator().manual_seed(seed))
    distances = []
    for _ in range(world.steps):
        table.step(table.expert() if actor is None else actor(table.observation()).clamp(-1.0, 1.0))
        distances.append(table.distance())
    return torch.stack(distances[-LAST_STEPS:]).mean(0) < world.tolerance


class TableEnv(EnvBase):
    """Tables as a batched TorchRL environment, `[rows]`. Its observations contain what the expert would do there.

    Keys of an observation: `"observation"`, and `"expert_action"` `[rows, 2]`. Episodes are ended by the time limit.
    """

    def __init__(self, world: World, rows: int) -> None:
        super().__init__(batch_size=[rows])
        self._world = world
        self._set_seed(None)
        bound = torch.ones(rows, 2)
        self.observation_spec = Composite(
            observation=Unbounded([rows, observation_size(world)]),
            expert_action=Bounded(-bound, bound),
            shape=[rows],
        )
        self.action_spec = Bounded(-bound, bound)
        self.reward_spec = Unbounded([rows, 1])

    def _set_seed(self, seed: int | None) -> None:
        generator = torch.Generator()
        generator.manual_seed(torch.initial_seed() if seed is None else seed)
        self._table = Table(self._world, self.batch_size[0], generator)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        rows = None if tensordict is None else tensordict.get("_reset", None)
        self._table.reset(torch.ones(self.batch_size, dtype=torch.bool) if rows is None else rows.view(-1))
        return self._look()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._table.step(tensordict["action"])
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        reward = -self._table.distance()[:, None]
        return self._look().update({"reward": reward, "done": done, "terminated": done.clone()})

    def _look(self) -> TensorDict:
        entries = {"observation": self._table.observation(), "expert_action": self._table.expert()}
        return TensorDict(entries, self.batch_size)
