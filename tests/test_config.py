"""LoopedConfig: what is accepted, what is rejected and how, and the shapes of the presets."""

import dataclasses
import math
from typing import Any

import pytest

from looped.config import PRESETS, LoopedConfig, LoopedShape, at_least
from train.config import preset_config
from train.run import main

SHAPE: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "d_ff": 48, "max_seq_len": 16}


def test_defaults_are_the_papers_setting() -> None:
    config = LoopedConfig(**SHAPE)
    assert (config.n_loops, config.dropout, config.readout, config.inter_loop_norm) == (4, 0.1, "rmsnorm", False)
    assert (config.tied, config.positions, config.norm_eps, config.embedding_std) == (True, "learned", 1e-6, 1.0)
    assert config.head_dim == 8


@pytest.mark.parametrize("field", ["vocab_size", "d_model", "n_heads", "n_layers", "n_loops", "d_ff", "max_seq_len"])
@pytest.mark.parametrize("value", [0, -3])
def test_rejects_sizes_below_one(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be at least 1\. Got {field}={value}\."):
        LoopedConfig(**{**SHAPE, field: value})


def test_at_least_says_which_value_is_below() -> None:
    at_least(1, steps=1, rate=math.inf, depth=None)
    for value in (0.5, -math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^rate must be at least 1\. Got rate={value}\.$"):
            at_least(1, steps=1, rate=value)


@pytest.mark.parametrize("field", ["n_prelude", "n_coda", "loop_rank"])
def test_sizes_that_may_be_zero(field: str) -> None:
    assert getattr(LoopedConfig(**SHAPE), field) == 0
    with pytest.raises(ValueError, match=rf"{field} must be at least 0\. Got {field}=-1\."):
        LoopedConfig(**{**SHAPE, field: -1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 100, "n_heads": 8}, r"d_model must be divisible by n_heads\. Got d_model=100, n_heads=8\."),
        ({"d_model": 36, "positions": "rotary"}, r"head size .* must be even with rotary positions\. Got 9"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)\. Got dropout=1\.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ({"dropout": float("nan")}, "dropout must be finite"),
        ({"norm_eps": 0.0}, r"norm_eps must be above 0\. Got norm_eps=0\.0"),
        ({"embedding_std": -1.0}, "embedding_std must be above 0"),
        ({"embedding_std": 0}, "embedding_std must be above 0"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be finite"),
        ({"rope_theta": 10**400}, "rope_theta must be finite"),
        ({"readout": "rms"}, r"readout must be one of rmsnorm, layernorm, raw, final-only\. Got readout='rms'\."),
        ({"positions": "alibi"}, r"positions must be one of learned, rotary\. Got positions='alibi'\."),
        ({"injection": "mul"}, r"injection must be one of none, add, concat, diagonal\. Got injection='mul'\."),
        ({"start": "ones"}, r"start must be one of embedding, zero, noise\. Got start='ones'\."),
        ({"block_norm": "post"}, r"block_norm must be one of pre, sandwich, sandwich-sum\. Got block_norm='post'\."),
        ({"start": "zero"}, r"start must be embedding with injection=none: .*\. Got start='zero'\."),
        ({"loop_rank": 33}, r"loop_rank must be at most d_model=32\. Got loop_rank=33\."),
    ],
)
def test_rejects_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopedConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 2.0}, r"n_layers must be an integer\. Got n_layers=2\.0"),
        ({"n_loops": True}, "n_loops must be an integer"),
        ({"dropout": "0.1"}, "dropout must be a number"),
        ({"tied": 1}, r"tied must be True or False\. Got tied=1"),
    ],
)
def test_rejects_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LoopedConfig(**{**SHAPE, **changes})


def test_an_odd_head_size_is_fine_with_learned_positions() -> None:
    assert LoopedConfig(**{**SHAPE, "d_model": 36}).head_dim == 9


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["demo"].d_model = 256  # type: ignore[misc]


def test_survives_a_round_trip_through_a_dict() -> None:
    for config in PRESETS.values():
        assert LoopedConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("preset", "shape"),
    [
        ("demo", (4096, 128, 4, 4, 512, 128)),
        ("paper-44m", (20_000, 512, 8, 8, 2048, 256)),
        ("paper-129m", (20_000, 768, 12, 12, 3072, 256)),
        ("ouro-1.4b", (49_152, 2048, 16, 24, 5632, 4096)),
    ],
)
def test_preset_shapes(preset: str, shape: tuple[int, ...]) -> None:
    config = PRESETS[preset]
    assert shape == (
        config.vocab_size,
        config.d_model,
        config.n_heads,
        config.n_layers,
        config.d_ff,
        config.max_seq_len,
    )
    assert config.n_loops == 4


def test_paper_presets_keep_the_papers_setup() -> None:
    for preset in ("paper-44m", "paper-129m"):
        config = PRESETS[preset]
        assert (config.dropout, config.embedding_std, config.tied, config.positions) == (0.1, 1.0, True, "learned")
        assert not config.inter_loop_norm


def test_a_field_of_the_model_is_an_option_of_training_with_the_same_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Written once, in LoopedShape."""
    for field in dataclasses.fields(LoopedShape):
        assert getattr(preset_config("paper-44m"), field.name) == getattr(PRESETS["paper-44m"], field.name)
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(LoopedShape):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "Hidden channels of SwiGLU" in shown
