"""Images are augmented in whole batches: every image as a plain loop over images does it, every chunk in one way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from loading import iterating
from tensordict import TensorDict
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.envs.transforms import Compose

from embodichain_rl import (
    ChunkSampler,
    FlatChunks,
    OnlineDataset,
    RandomColorJitter,
    RandomShift,
    TrajectoryReplayBuffer,
)
from embodichain_rl.errors import ArgumentTypeError, InvalidArgumentError, SchemaMismatchError

B, L, K, H, W = 6, 4, 2, 10, 13
PAD = 2
FRONT = ("observation", "images", "front")


def noise(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> torch.Tensor:
    """Return random images, no two of which are the same however they are shifted."""
    values = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return values if dtype == torch.uint8 else (values / 255).to(dtype)


def batch_of(pixels: torch.Tensor, **others: Any) -> TensorDict:
    return TensorDict({"pixels": pixels, "action": torch.zeros(B, L, 7), **others}, [B, L])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------- the references, image by image


def crops(image: torch.Tensor, pad: int) -> dict[tuple[int, int], torch.Tensor]:
    """Return every crop of an image ``[C, H, W]`` whose border is repeated, by its place."""
    padded = functional.pad(image.double()[None], (pad,) * 4, mode="replicate")[0].to(image.dtype)
    height, width = image.shape[-2:]
    return {(y, x): padded[:, y : y + height, x : x + width] for y in range(2 * pad + 1) for x in range(2 * pad + 1)}


def shifts(before: torch.Tensor, after: torch.Tensor, pad: int = PAD) -> list[tuple[int, int]]:
    """Return by what shift each image ``[*lead, C, H, W]`` became the other one, which must be one of its crops."""
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    found = []
    for image, shifted in zip(before.flatten(0, -4), after.flatten(0, -4), strict=True):
        (place,) = [place for place, crop in crops(image, pad).items() if torch.equal(crop, shifted)]
        found.append(place)
    return found


def blend(image: torch.Tensor, other: torch.Tensor, factor: float) -> torch.Tensor:
    bound = 255 if image.dtype == torch.uint8 else 1
    return (factor * image + (1.0 - factor) * other).clamp(0, bound).to(image.dtype)


def gray(image: torch.Tensor) -> torch.Tensor:
    if len(image) == 1:
        return image.clone()
    red, green, blue = image
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(image.dtype)[None]


def brighter(image: torch.Tensor, factor: float) -> torch.Tensor:
    return blend(image, torch.zeros_like(image), factor)


def more_contrast(image: torch.Tensor, factor: float) -> torch.Tensor:
    dtype = image.dtype if image.is_floating_point() else torch.float32
    return blend(image, gray(image).to(dtype).mean(), factor)


def more_saturated(image: torch.Tensor, factor: float) -> torch.Tensor:
    return image if len(image) == 1 else blend(image, gray(image), factor)


CHANGES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "brightness": brighter,
    "contrast": more_contrast,
    "saturation": more_saturated,
}
"""The formulas of torchvision, of one image ``[C, H, W]``."""


def near(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether images are the same, but for the last bit of a mean."""
    if left.dtype == torch.uint8:
        return bool((left.int() - right.int()).abs().max() <= 1)
    return torch.allclose(left, right, atol=2e-3 if left.dtype == torch.float16 else 1e-6)


# -------------------------------------------------------------------------------------------------------------- shifts


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.float64], ids=str)
def test_shifts_images_as_padding_and_cropping_each_of_them(dtype: torch.dtype) -> None:
    pixels = noise(B, L, 3, H, W, dtype=dtype)
    after = RandomShift(PAD, generator=generator())(batch_of(pixels))["pixels"]
    assert len(set(shifts(pixels, after))) > 1


@pytest.mark.parametrize("channels", [1, 3, 4, 9])
def test_shifts_images_with_channels_first_or_last(channels: int) -> None:
    pixels = noise(B, L, channels, H, W)
    last = pixels.movedim(-3, -1)
    for given in (last, last.contiguous()):  # a view, and memory in this order
        first, other = (
            RandomShift(PAD, generator=generator())(batch_of(images))["pixels"] for images in (pixels, given)
        )
        assert torch.equal(first, other.movedim(-1, -3))
    shifts(pixels, first)


def test_shifts_by_as_much_as_is_allowed_and_no_more() -> None:
    pixels = noise(600, 1, 1, 5, 6)
    after = RandomShift(1, generator=generator())(TensorDict({"pixels": pixels}, [600, 1]))["pixels"]
    assert set(shifts(pixels, after, pad=1)) == {(y, x) for y in range(3) for x in range(3)}


def test_no_shift_with_a_pad_of_0() -> None:
    pixels = noise(B, L, 3, H, W)
    assert torch.equal(RandomShift(0)(batch_of(pixels))["pixels"], pixels)


# -------------------------------------------------------------------------------------------- one way for a whole chunk


def ways(transform: Any, pixels: torch.Tensor, key: Any = "pixels", **others: Any) -> list[Any]:
    """Return the shift of each image, nested as the dimensions before it."""
    after = transform(TensorDict({key: pixels, **others}, pixels.shape[:2]))[key]
    found = torch.tensor(shifts(pixels, after))
    return found.view(*pixels.shape[:-3], 2)


def test_a_chunk_is_shifted_in_one_way_and_another_one_in_another() -> None:
    found = ways(RandomShift(PAD, generator=generator()), noise(B, L, 3, H, W))
    assert (found == found[:, :1]).all()
    assert len(found[:, 0].unique(dim=0)) > 1


def test_every_camera_of_a_chunk_is_shifted_in_its_own_way() -> None:
    found = ways(RandomShift(PAD, generator=generator()), noise(B, L, K, 3, H, W))
    assert (found == found[:, :1]).all()
    assert (found[:, 0, 0] != found[:, 0, 1]).any()


def test_every_key_is_a_camera() -> None:
    pixels = noise(B, L, 3, H, W)
    shift = RandomShift(PAD, in_keys=["pixels", FRONT], generator=generator())
    batch = batch_of(pixels)
    batch[FRONT] = pixels
    after = shift(batch)
    assert shifts(pixels, after["pixels"]) != shifts(pixels, after[FRONT])


def test_cameras_are_shifted_alike_if_asked() -> None:
    pixels, several = noise(B, L, 3, H, W), noise(B, L, K, 3, H, W)
    batch = batch_of(pixels)
    batch[FRONT] = several
    after = RandomShift(PAD, in_keys=["pixels", FRONT], per_camera=False, generator=generator())(batch)
    one = torch.tensor(shifts(pixels, after["pixels"])).view(B, L, 1, 2)
    assert (torch.tensor(shifts(several, after[FRONT])).view(B, L, K, 2) == one).all()
    assert len(one[:, 0].unique(dim=0)) > 1


def test_every_step_is_shifted_in_its_own_way_if_asked() -> None:
    found = ways(RandomShift(PAD, per_step=True, generator=generator()), noise(B, L, 3, H, W))
    assert (found != found[:, :1]).any()
    alike = ways(RandomShift(PAD, per_step=True, per_camera=False, generator=generator()), noise(B, L, K, 3, H, W))
    assert (alike == alike[:, :, :1]).all()
    assert (alike != alike[:, :1]).any()


def test_the_next_image_is_shifted_as_the_camera_is() -> None:
    pixels, following = noise(B, L, 3, H, W), noise(B, L, 3, H, W, seed=1)
    for per_step in (False, True):
        shift = RandomShift(PAD, ["pixels", ("next", "pixels")], per_step=per_step, generator=generator())
        after = shift(batch_of(pixels, next={"pixels": following}))
        same = shifts(pixels, after["pixels"]) == shifts(following, after["next", "pixels"])
        assert same is not per_step
    after = RandomShift(PAD, generator=generator())(batch_of(pixels, next={"pixels": following}))
    assert after["next", "pixels"] is following


# ------------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_a_colour_as_torchvision_does_with_each_image(change: str, channels: int, dtype: torch.dtype) -> None:
    pixels = noise(B, L, channels, H, W, dtype=dtype)
    for factor in (0.0, 0.6, 1.0, 1.7):
        expected = torch.stack([CHANGES[change](image, factor) for image in pixels.flatten(0, 1)]).view(pixels.shape)
        jitter = RandomColorJitter(**{change: (factor, factor)})
        after = jitter(batch_of(pixels))["pixels"]
        assert after.dtype == dtype
        assert near(after, expected)
        last = jitter(batch_of(pixels.movedim(-3, -1)))["pixels"]
        assert near(last.movedim(-1, -3), expected)


def test_uint8_is_that_of_torchvision_to_the_bit() -> None:
    pixels = noise(B, L, 3, H, W)
    for change, function in CHANGES.items():
        for factor in (0.37, 1.61):
            after = RandomColorJitter(**{change: (factor, factor)})(batch_of(pixels))["pixels"]
            factor = torch.tensor(factor).item()  # as a float32, which torchvision draws
            assert torch.equal(after.flatten(0, 1), torch.stack([function(i, factor) for i in pixels.flatten(0, 1)]))


def test_colours_change_in_one_random_order_for_each_chunk() -> None:
    chunks, factors = 60, {"brightness": 1.25, "contrast": 1.625, "saturation": 0.375}
    pixels = noise(chunks, 2, 3, H, W)
    jitter = RandomColorJitter(**{name: (f, f) for name, f in factors.items()}, generator=generator())
    after = jitter(TensorDict({"pixels": pixels}, [chunks, 2]))["pixels"]
    orders = []
    for before, changed in zip(pixels, after, strict=True):
        matching = []
        for order in permutations(factors):
            images = list(before)
            for name in order:
                images = [CHANGES[name](image, factors[name]) for image in images]
            if torch.equal(torch.stack(images), changed):
                matching.append(order)
        assert len(matching) == 1, "the two steps of a chunk are not changed in the same order"
        orders += matching
    assert set(orders) == {*permutations(factors)}


def test_factors_are_drawn_for_each_chunk_from_their_range() -> None:
    pixels = torch.full((400, L, 1, 2, 2), 0.5)
    after = RandomColorJitter(0.3, generator=generator())(TensorDict({"pixels": pixels}, [400, L]))["pixels"]
    factors = after / 0.5
    assert (factors == factors[:, :1, :1, :1, :1]).all()
    assert factors.min() >= 0.7
    assert factors.min() < 0.72
    assert factors.max() <= 1.3
    assert factors.max() > 1.28
    dark = RandomColorJitter(5.0, generator=generator())(TensorDict({"pixels": pixels}, [400, L]))["pixels"]
    assert dark.min() >= 0
    assert (dark == 1).any()


def test_nothing_changes_without_a_strength() -> None:
    pixels = noise(B, L, 3, H, W)
    assert torch.equal(RandomColorJitter()(batch_of(pixels))["pixels"], pixels)


# ------------------------------------------------------------------------------------------------------------- buffers


def episode(number: int, length: int) -> TensorDict:
    done = (torch.arange(length) == length - 1).unsqueeze(1)
    pixels = noise(length + 1, 3, H, W, seed=number)
    front = noise(length, H, W, 3, seed=100 + number)
    observed = {"images": {"front": front}}
    following = {"pixels": pixels[1:], "done": done}
    return TensorDict({"pixels": pixels[:-1], "observation": observed, "next": following}, [length])


LENGTHS = (9, 20, 14)


def filled(transform: Any = None, **kwargs: Any) -> TrajectoryReplayBuffer:
    settings: dict[str, Any] = {"max_trajectories": 4, "max_total_steps": 100, "batch_size": 8, **kwargs}
    if "sampler" not in settings:
        settings["chunk_size"] = L
    rb = TrajectoryReplayBuffer(**settings, transform=transform)
    for number, length in enumerate(LENGTHS):
        rb.extend(episode(number, length))
    return rb


def stored(batch: TensorDict, key: Any = "pixels") -> torch.Tensor:
    """Return the images of a batch as they were written."""
    written = [episode(number, length)[key] for number, length in enumerate(LENGTHS)]
    ids, steps = batch["trajectory", "id"].flatten().tolist(), batch["trajectory", "step"].flatten().tolist()
    images = [written[number][step] for number, step in zip(ids, steps, strict=True)]
    return torch.stack(images).view(*batch.shape, *images[0].shape)


def chunk_shifts(batch: TensorDict) -> list[tuple[int, int]]:
    """Return the shift of each chunk ``[B, L]``, which is that of all its steps."""
    found = torch.tensor(shifts(stored(batch), batch["pixels"])).view(*batch.shape, 2)
    assert (found == found[:, :1]).all()
    return [tuple(place) for place in found[:, 0].tolist()]


def test_a_buffer_returns_augmented_batches_and_keeps_what_it_has() -> None:
    rb = filled(generator=generator())
    assert rb.append_transform(RandomShift(PAD)) is rb
    rb.append_transform(RandomColorJitter(0.5, in_keys=FRONT))
    assert len(set(chunk_shifts(rb.sample()))) > 1
    rb.extend(episode(3, 12))  # while the transforms are there
    for number, length in enumerate((*LENGTHS, 12)):
        for key in ("pixels", FRONT):
            assert torch.equal(rb.storage[number][key], episode(number, length)[key])


def test_only_the_images_change_and_not_in_place() -> None:
    batch = filled().sample()
    before = batch.clone()
    jitter = RandomColorJitter(0.5, 0.5, 0.5, in_keys=["pixels", FRONT], generator=generator())
    after = Compose(RandomShift(PAD, generator=generator()), jitter)(batch)
    assert (batch == before).all()
    for key in batch.keys(True, True):
        assert (after[key] is batch[key]) is (key not in ("pixels", FRONT)), key
    assert not torch.equal(after[FRONT], batch[FRONT])


def test_what_is_written_and_what_an_environment_returns_is_not_augmented() -> None:
    steps = episode(0, 9)
    for transform in (RandomShift(PAD), RandomColorJitter(0.5)):
        assert (transform.inv(steps) == steps).all()
        assert (transform._step(steps, steps["next"]) == steps["next"]).all()
        assert (transform._reset(steps, steps) == steps).all()


def test_single_chunks_of_a_dataset_are_augmented_in_one_way_each() -> None:
    for options in ({}, {"stride": 2}):
        dataset = OnlineDataset(filled(), L, transform=RandomShift(PAD), seed=0, **options)
        found = set()
        with iterating(dataset, 0) as items:
            for _ in range(10):
                item = next(items)
                assert item.shape == (L,)
                found |= {*chunk_shifts(item.unsqueeze(0))}
        assert len(found) > 1


def test_windows_are_augmented_in_one_way_each() -> None:
    sampler = ChunkSampler(windows={"pixels": (-1, 1), FRONT: (0, 0)}, pad="both")
    batch = filled(sampler=sampler).sample(16)
    after = RandomShift(PAD, ["pixels", FRONT], generator=generator())(batch)
    found = torch.tensor(shifts(batch["pixels"], after["pixels"])).view(16, 3, 2)
    assert (found == found[:, :1]).all()
    assert len(found[:, 0].unique(dim=0)) > 1
    item = batch[0]
    found = torch.tensor(shifts(item["pixels"], RandomShift(PAD)(item)["pixels"]))
    assert len(found.unique(dim=0)) == 1


def test_flat_chunks_are_augmented_as_the_chunks_are() -> None:
    for stride in (1, 2):
        sampler = ChunkSampler(L, stride=stride)
        rb = filled(Compose(FlatChunks(), RandomShift(PAD)), sampler=sampler, generator=generator())
        assert len(set(chunk_shifts(rb.sample(16).reshape(16, L)))) > 1


@pytest.mark.parametrize("marked", [False, True])
def test_flat_chunks_are_told_by_their_steps_or_by_marks(marked: bool) -> None:
    apart = L if marked else 20  # the next chunk of the same trajectory follows at once, or later
    stride = 1 if marked else 3
    steps = (torch.arange(10)[:, None] * apart + stride * torch.arange(L)).flatten()
    pixels = noise(10 * L, 3, H, W)
    batch = TensorDict({"pixels": pixels, "trajectory": {"id": torch.zeros_like(steps), "step": steps}}, [10 * L])
    if marked:
        batch["is_init"] = (torch.arange(10 * L) % L == 0).unsqueeze(1)
    found = torch.tensor(shifts(pixels, RandomShift(PAD, generator=generator())(batch)["pixels"])).view(10, L, 2)
    assert (found == found[:, :1]).all()
    assert len(found[:, 0].unique(dim=0)) > 1


def test_single_steps_are_augmented_in_their_own_way() -> None:
    batch = filled().sample(64)[:, 0]
    after = RandomShift(PAD, generator=generator())(batch)
    assert len(set(shifts(batch["pixels"], after["pixels"]))) > 10
    plain = TensorDict({"pixels": batch["pixels"]}, [64])  # such as of a buffer that knows no trajectories
    after = RandomShift(PAD, generator=generator())(plain)
    assert len(set(shifts(plain["pixels"], after["pixels"]))) > 10
    one = RandomShift(PAD)(batch[0])
    assert len(shifts(batch["pixels"][:1], one["pixels"][None])) == 1


def test_an_empty_batch_stays_empty() -> None:
    empty = batch_of(noise(B, L, 3, H, W))[:0]
    assert RandomShift(PAD)(empty)["pixels"].shape == (0, L, 3, H, W)
    assert RandomColorJitter(0.5, 0.5, 0.5)(empty)["pixels"].shape == (0, L, 3, H, W)


# --------------------------------------------------------------------------------------------------------------- seeds


BOTH = {"shift": lambda **options: RandomShift(PAD, **options), "jitter": lambda **o: RandomColorJitter(0.9, 0.9, **o)}


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_the_same_seed_gives_the_same_images(make: Callable[..., Any]) -> None:
    batch = batch_of(noise(B, L, 3, H, W))

    def twice(transform: Any) -> list[torch.Tensor]:
        return [transform(batch)["pixels"] for _ in range(2)]

    first, second = twice(make(generator=generator()))
    assert not torch.equal(first, second)
    assert all(map(torch.equal, (first, second), twice(make(generator=generator()))))
    torch.manual_seed(5)
    first, second = twice(make())
    torch.manual_seed(5)
    assert all(map(torch.equal, (first, second), twice(make())))


def test_a_seeded_buffer_and_a_seeded_dataset_give_the_same_images() -> None:
    def buffers(seed: int) -> list[torch.Tensor]:
        rb = filled(RandomShift(PAD), generator=generator(seed))
        return [rb.sample()["pixels"], rb.sample_chunks(8, L, generator=generator(7))["pixels"], rb.sample()["pixels"]]

    assert all(map(torch.equal, buffers(1), buffers(1)))
    assert not torch.equal(buffers(1)[0], buffers(2)[0])
    assert torch.equal(buffers(1)[1], buffers(2)[1])

    def datasets(seed: int) -> list[torch.Tensor]:
        plain = OnlineDataset(filled(), L, batch_size=8, transform=RandomShift(PAD), seed=seed)
        inner = OnlineDataset(filled(RandomShift(PAD)), L, batch_size=8, seed=seed)
        return [next(iter(dataset))["pixels"] for dataset in (plain, inner)]

    torch.manual_seed(1)
    first = datasets(3)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, datasets(3)))


def test_a_transform_is_pickled_and_copied_with_its_generator() -> None:
    batch = batch_of(noise(B, L, 3, H, W))
    for make in BOTH.values():
        transform = make(generator=generator(), channels_last=False)
        transform(batch)
        copies = [pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)]
        expected = transform(batch)["pixels"]
        for other in copies:
            assert torch.equal(other(batch)["pixels"], expected)


@pytest.mark.slow
def test_the_workers_of_a_loader_augment_and_do_not_repeat_each_other() -> None:
    transform = Compose(RandomShift(PAD, generator=generator()), RandomColorJitter(0.5, in_keys=FRONT))
    dataset = OnlineDataset(filled(), L, batch_size=8, transform=transform, seed=0)
    with iterating(dataset, 2, "spawn") as batches:
        first, second = (chunk_shifts(next(batches)) for _ in range(2))
    assert first != second
    assert len({*first, *second}) > 1


# ------------------------------------------------------------------------------------------- whole batches, no waiting


class Called(TorchDispatchMode):
    """Record the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["chunks", "flat"])
def test_no_batch_takes_more_calls_than_another_and_nothing_is_read_from_the_device(layout: str) -> None:
    for transform in (RandomShift(PAD), RandomColorJitter(0.5, 0.5, 0.5)):
        calls = []
        for size in (2, 64):
            batch = filled().sample(size)
            with Called() as called:
                transform(batch if layout == "chunks" else batch.reshape(-1))
            calls.append(called.names)
        assert calls[0] == calls[1]
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
        assert not [name for name in calls[0] if any(f"aten.{wait}" in name for wait in waits)]


@pytest.mark.gpu
def test_a_batch_on_a_device_is_augmented_there_without_waiting_for_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pixels = noise(B, L, 3, H, W)
    batch = batch_of(pixels).to("cuda")
    for own in (None, generator(), torch.Generator("cuda").manual_seed(0)):
        jitter = RandomColorJitter(0.5, 0.5, 0.5, generator=own)
        shift = RandomShift(PAD, generator=own)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            shifted, changed = shift(batch)["pixels"], jitter(batch)["pixels"]
            shift(batch.reshape(-1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert shifted.device == changed.device == batch["pixels"].device
        shifts(pixels, shifted.cpu())
    on_host, on_device = (
        RandomColorJitter(0.5, 0.5, 0.5, generator=generator())(some)["pixels"].cpu() for some in (batch.cpu(), batch)
    )
    assert near(on_host, on_device)
    with pytest.raises(InvalidArgumentError, match="must be on the device"):
        RandomShift(PAD, generator=torch.Generator("cuda"))(batch.cpu())


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RandomShift(-1), InvalidArgumentError, "pad must be an integer of at least 0"),
        (lambda: RandomShift(1.5), InvalidArgumentError, "pad must be an integer"),
        (lambda: RandomShift(in_keys=[]), InvalidArgumentError, "one key of images"),
        (lambda: RandomShift(in_keys=["pixels", "pixels"]), InvalidArgumentError, "one key of images"),
        (lambda: RandomShift(in_keys=[3]), InvalidArgumentError, "must be a string"),
        (lambda: RandomShift(per_step=1), InvalidArgumentError, "per_step must be True or False"),
        (lambda: RandomShift(channels_last="no"), InvalidArgumentError, "channels_last must be True or False"),
        (lambda: RandomShift(generator=0), ArgumentTypeError, r"torch\.Generator or None"),
        (lambda: RandomColorJitter(-0.1), InvalidArgumentError, "brightness must be a finite number"),
        (lambda: RandomColorJitter(0, (0.5, 0.2)), InvalidArgumentError, "range .* is empty"),
        (lambda: RandomColorJitter(0, 0, (1, 2, 3)), InvalidArgumentError, "saturation=.* must be a number, or a"),
        (lambda: RandomColorJitter(float("nan")), InvalidArgumentError, "brightness must be a finite number"),
    ],
)
def test_wrong_arguments_are_refused_at_once(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("transform", "pixels", "error", "words"),
    [
        (RandomShift(1, "wrist"), noise(B, L, 3, H, W), SchemaMismatchError, "nothing at .'wrist'"),
        (RandomShift(1), noise(B, L, H, W), SchemaMismatchError, r"needed are images \[\*batch, C, H, W\]"),
        (RandomShift(1), noise(B, L, 5, 7, 11), InvalidArgumentError, "neither.*Pass channels_last"),
        (RandomShift(1), noise(B, L, 3, 7, 4), InvalidArgumentError, "both.*Pass channels_last"),
        (RandomShift(H), noise(B, L, 3, H, W), InvalidArgumentError, "pad=10 .* smaller"),
        (RandomColorJitter(1), noise(B, L, 4, H, W), InvalidArgumentError, "neither.*Pass channels_last"),
        (RandomColorJitter(1, channels_last=False), noise(B, L, 4, H, W), SchemaMismatchError, "needs 1 or 3"),
        (RandomColorJitter(1, channels_last=True), noise(B, L, 3, H, W), SchemaMismatchError, "pass channels_last"),
        (RandomColorJitter(1), noise(B, L, 3, H, W).int(), SchemaMismatchError, r"torch\.int32.*torch\.uint8"),
    ],
)
def test_batches_that_can_not_be_augmented_are_refused(
    transform: Any, pixels: torch.Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        transform(batch_of(pixels))


def test_the_layout_can_be_given_where_it_is_not_seen() -> None:
    pixels = noise(B, L, 5, 7, 11)
    shifts(pixels, RandomShift(1, channels_last=False)(batch_of(pixels))["pixels"], pad=1)
    last = RandomShift(1, channels_last=True)(batch_of(pixels))["pixels"]
    shifts(pixels.movedim(-1, -3), last.movedim(-1, -3), pad=1)
