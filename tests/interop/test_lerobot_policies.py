"""LeRobot's own policies train from a live buffer, with LeRobot's own processors; small ones that nobody trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch.utils.data import DataLoader

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.interop.lerobot import LiveDataset, as_lerobot

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lerobot", reason="LeRobot is not installed: see docs/lerobot.md")

FPS = 10
IMAGE = 32


@pytest.fixture(scope="module")
def live() -> LiveDataset:
    """Three episodes with a camera and a task each."""
    rb = TrajectoryReplayBuffer(max_trajectories=10, max_total_steps=500, chunk_size=2)
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        length = 12 + number
        state = torch.randn(length, 3, generator=generator)
        pixels = torch.randint(0, 256, (length, IMAGE, IMAGE, 3), generator=generator, dtype=torch.uint8)
        data = TensorDict({"observation": {"state": state, "images": {"top": pixels}}}, [length])
        data["action"] = state[:, :2].tanh()
        data["trajectory", "task"] = NonTensorStack(*[f"task {number % 2}"] * length)
        data["next", "done"] = torch.arange(length)[:, None] == length - 1
        rb.extend(data)
    return as_lerobot(rb, fps=FPS, keys=["observation.state", "observation.images.top", "action"])


def check_learns(live: LiveDataset, config: Any) -> None:
    """Train a policy as ``lerobot-train`` does, and let it act."""
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.policies.factory import make_policy, make_pre_post_processors

    torch.manual_seed(0)
    policy = make_policy(config, ds_meta=live.meta)
    preprocess, postprocess = make_pre_post_processors(config, dataset_stats=live.meta.stats)
    dataset = live.with_windows(resolve_delta_timestamps(config, live.meta))
    before = [weight.detach().clone() for weight in policy.parameters()]
    optimizer = torch.optim.AdamW([weight for weight in policy.parameters() if weight.requires_grad], lr=1e-3)
    policy.train()
    for batch in DataLoader(dataset, batch_size=16, shuffle=True):
        loss, _ = policy.forward(preprocess(batch))
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert any((now != then).any() for now, then in zip(policy.parameters(), before, strict=True))
    policy.eval()
    policy.reset()
    frame = {
        name: value[None] if isinstance(value, torch.Tensor) else [value]
        for name, value in live[0].items()
        if name.startswith("observation") or name == "task"
    }
    action = postprocess(policy.select_action(preprocess(frame)))
    assert action.shape == (1, 2)
    assert action.isfinite().all()


@pytest.mark.slow
def test_diffusion_trains_from_a_live_buffer(live: LiveDataset) -> None:
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    config = DiffusionConfig(
        device="cpu",
        horizon=8,
        n_action_steps=4,
        down_dims=(16, 32),
        crop_shape=None,
        pretrained_backbone_weights=None,
        spatial_softmax_num_keypoints=4,
        num_train_timesteps=5,
        push_to_hub=False,
    )
    check_learns(live, config)


@pytest.mark.slow
def test_smolvla_trains_from_a_live_buffer(live: LiveDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from transformers.models.smolvlm import processing_smolvlm

    if not processing_smolvlm.num2words:  # which only prompts with videos need
        monkeypatch.setattr(processing_smolvlm, "num2words", str)
    config = SmolVLAConfig(
        device="cpu",
        vlm_model_name=str(small_vlm(tmp_path)),
        load_vlm_weights=False,
        resize_imgs_with_padding=(IMAGE, IMAGE),
        chunk_size=4,
        n_action_steps=4,
        num_vlm_layers=2,
        tokenizer_max_length=16,
        max_state_dim=8,
        max_action_dim=8,
        num_steps=2,
        push_to_hub=False,
    )
    check_learns(live, config)


def small_vlm(folder: Path) -> Path:
    """Write what a SmolVLM consists of but for its weights: a tiny one, whose tokens are single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMImageProcessor

    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    }
    words = ["<pad>", "<unk>", "<|im_start|>", "<end_of_utterance>", *special.values(), "\n", *map(chr, range(32, 127))]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        extra_special_tokens=special,
    ).save_pretrained(folder)
    text = {
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": 8,
    }
    SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=numbers["<image>"], scale_factor=2, pad_token_id=0
    ).save_pretrained(folder)
    longest = {"longest_edge": IMAGE}
    SmolVLMImageProcessor(size=longest, max_image_size=longest).save_pretrained(folder)
    processor = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder
