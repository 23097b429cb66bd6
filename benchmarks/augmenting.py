"""Image augmentation: whole batches, on the device where they are, against sample by sample.

    python benchmarks/augmenting.py
    python benchmarks/augmenting.py --device cuda
    python benchmarks/augmenting.py --quick --out outputs/augmenting.json

Every contestant samples batches of the same `uint8` images, shifts them by up to 4 pixels, and changes their
brightness, contrast and saturation. They alternate in one run:

* whole batches: `TrajectoryReplayBuffer.sample()` with `RandomShift` and `RandomColorJitter`, the buffer on the device;
* chunk by chunk: the same transforms of one chunk after the other, as a dataset of single items calls them;
* image by image: padding and slicing, and torchvision's formulas, of one image after the other.

The last two work on the CPU, in this process, as a worker of a `DataLoader` does. They stack the chunks to a batch and
copy it to the device. The result is the number of chunks per second.

If torch finds no CUDA device, `--device cuda` says so and exits with 1.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from _harness import print_table, write_report
from tensordict import TensorDict
from torch.nn import functional
from torchrl.envs.transforms import Compose

from embodichain_rl import ChunkSampler, RandomColorJitter, RandomShift, TrajectoryReplayBuffer, TrajectoryStorage

PAD, STRENGTH = 4, 0.3

WHOLE, CHUNKS, IMAGES, NOTHING = "whole batches", "chunk by chunk", "image by image", "not augmented"

TRAJECTORIES, STEPS = 8, 30


@dataclass(frozen=True)
class Case:
    """The shape of a batch: chunks, steps, cameras, height and width."""

    batch_size: int
    chunk_size: int
    cameras: int
    height: int
    width: int

    def __str__(self) -> str:
        cameras = "1 camera" if self.cameras == 1 else f"{self.cameras} cameras"
        return f"{cameras} of {self.height} x {self.width}, B {self.batch_size}, L {self.chunk_size}"

    @property
    def keys(self) -> list[Any]:
        return [("observation", "images", f"camera_{number}") for number in range(self.cameras)]


CASES = (Case(128, 3, 1, 84, 84), Case(32, 16, 1, 84, 84), Case(16, 2, 3, 224, 224), Case(8, 1, 2, 480, 640))


@dataclass(frozen=True)
class Config:
    """Measure image augmentation."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the buffer is and the batches are wanted."""
    quick: bool = False
    """One shape, and a second."""
    seconds: float = 10.0
    """Duration of each shape."""
    out: Path | None = None
    """Path of the JSON file for the results."""


def transforms(keys: list[Any]) -> Compose:
    return Compose(RandomShift(PAD, keys), RandomColorJitter(STRENGTH, STRENGTH, STRENGTH, keys))


def make_buffer(case: Case, device: Any) -> TrajectoryReplayBuffer:
    storage = TrajectoryStorage(TRAJECTORIES, TRAJECTORIES * STEPS, device=device)
    rb = TrajectoryReplayBuffer(storage=storage, sampler=ChunkSampler(case.chunk_size), batch_size=case.batch_size)
    for number in range(TRAJECTORIES):
        generator = torch.Generator().manual_seed(number)
        shape = (STEPS, 3, case.height, case.width)
        done = (torch.arange(STEPS) == STEPS - 1).unsqueeze(1)
        steps = TensorDict({"action": torch.zeros(STEPS, 7), "next": {"done": done}}, [STEPS])
        for key in case.keys:
            steps[key] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        rb.extend(steps)
    rb.storage.flush()
    return rb


# ------------------------------------------------------------------------------------------------------ image by image


def shifted(image: torch.Tensor, top: int, left: int) -> torch.Tensor:
    padded = functional.pad(image[None].float(), (PAD,) * 4, mode="replicate")[0].to(image.dtype)
    return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


def blended(image: torch.Tensor, other: torch.Tensor, factor: float) -> torch.Tensor:
    return (factor * image + (1.0 - factor) * other).clamp(0, 255).to(image.dtype)


def gray(image: torch.Tensor) -> torch.Tensor:
    red, green, blue = image
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(image.dtype)[None]


CHANGES: tuple[Callable[[torch.Tensor, float], torch.Tensor], ...] = (
    lambda image, factor: blended(image, torch.zeros_like(image), factor),
    lambda image, factor: blended(image, gray(image).float().mean(), factor),
    lambda image, factor: blended(image, gray(image), factor),
)


def image_by_image(chunk: TensorDict, keys: list[Any]) -> TensorDict:
    """Return a chunk whose images are augmented one after the other, with the same numbers at all its steps."""
    augmented = chunk.copy()
    for key in keys:
        top, left = (random.randrange(2 * PAD + 1) for _ in range(2))
        factors = [random.uniform(1 - STRENGTH, 1 + STRENGTH) for _ in CHANGES]
        order = random.sample(range(len(CHANGES)), len(CHANGES))
        images = []
        for image in chunk[key]:
            image = shifted(image, top, left)
            for number in order:
                image = CHANGES[number](image, factors[number])
            images.append(image)
        augmented[key] = torch.stack(images)
    return augmented


# --------------------------------------------------------------------------------------------------------- measurement


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(contestants: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """Give every contestant one call per round, in a random order; return the median seconds of each."""
    names, order = list(contestants), random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for call in contestants.values():
        call()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(taken[names[0]]) < 3:
        order.shuffle(names)
        for name in names:
            synchronize(device)
            begin = time.perf_counter()
            contestants[name]()
            synchronize(device)
            taken[name].append(time.perf_counter() - begin)
    return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


def measure(case: Case, seconds: float, device: str = "cpu") -> list[dict[str, Any]]:
    """Measure the contestants with batches of one shape."""
    here, there = make_buffer(case, "cpu"), make_buffer(case, device)
    transform = transforms(case.keys)

    def one_by_one(augment: Callable[[TensorDict], TensorDict]) -> TensorDict:
        chunks: Any = [augment(chunk) for chunk in here.sample().unbind(0)]
        return torch.stack(chunks).contiguous().to(device)

    contestants: dict[str, Callable[[], object]] = {
        WHOLE: lambda: transform(there.sample()),
        CHUNKS: lambda: one_by_one(transform),
        IMAGES: lambda: one_by_one(lambda chunk: image_by_image(chunk, case.keys)),
        NOTHING: there.sample,
    }
    taken = take_turns(contestants, seconds, device)
    images = case.batch_size * case.chunk_size * case.cameras
    print_table(
        f"{case}, on {device}",
        ("", "ms a batch", "chunks/s", "images/s", "x image by image"),
        [
            (
                name,
                f"{1e3 * median:.2f}",
                f"{case.batch_size / median:,.0f}",
                f"{images / median:,.0f}",
                f"{taken[IMAGES] / median:.2f}",
            )
            for name, median in taken.items()
        ],
    )
    return [
        {
            "case": asdict(case),
            "device": device,
            "contestant": name,
            "median_s": median,
            "chunks_per_second": case.batch_size / median,
        }
        for name, median in taken.items()
    ]


def main(config: Config) -> None:
    if config.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit(
                f"Nothing is measured: this torch {torch.__version__} sees no CUDA device. Run it on a machine with "
                "one, with a torch for CUDA (nvidia-smi shows the devices), or with --device cpu."
            )
        print(torch.cuda.get_device_name())
    results = []
    for case in CASES[:1] if config.quick else CASES:
        results += measure(case, 1.0 if config.quick else config.seconds, config.device)
    write_report(config.out, results)


if __name__ == "__main__":
    main(tyro.cli(Config))
