import dataclasses
import json
import sys

import pytest
import safetensors.torch
import tiny_decoder
import torch
from ouro_stand_in import CONFIG, OuroForCausalLM
from safetensors.torch import load_file, save_file

from looped import PRESETS
from looped.ouro_weights import (
    SHAPE,
    config_from_ouro,
    config_to_ouro,
    load_ouro,
    weights_from_ouro,
    weights_to_ouro,
    write_ouro,
)


def save(directory, model, config=CONFIG):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), directory / "model.safetensors")
    return directory


def ours(**changes):
    """A decoder of Ouro's shape, whose two norms are one."""
    model = tiny_decoder.model(**{**SHAPE, "tied": False, **changes}).eval()
    model.readout_norm.load_state_dict(model.loop_norm.state_dict())
    return model


@pytest.mark.parametrize("n_loops", [1, 4, 6])
def test_a_checkpoint_of_ouro_gives_its_logits(tmp_path, n_loops):
    theirs = OuroForCausalLM(CONFIG | {"total_ut_steps": n_loops})
    model = load_ouro(save(tmp_path / "ouro", theirs))
    assert model.config.n_loops == 4
    assert not model.training
    tokens = tiny_decoder.tokens(2, 9)
    expected, leaving = theirs(tokens)
    states = model.unroll(tokens, n_loops)
    for state, logits in zip(states, expected, strict=True):
        torch.testing.assert_close(model.readout_logits(state), logits)
    torch.testing.assert_close(model.exit_logits(states).sigmoid(), leaving)


@pytest.mark.parametrize("exit_gate", [False, True])
def test_a_decoder_of_ouros_shape_gives_a_checkpoint_of_ouro(tmp_path, exit_gate):
    """Without a gate no token leaves before the last loop."""
    model = ours(exit_gate=exit_gate)
    if exit_gate:
        torch.nn.init.normal_(model.exit_gate.weight)
    write_ouro(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    theirs = OuroForCausalLM(config, seed=1)
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"))  # strict: every name and shape
    tokens = tiny_decoder.tokens(2, 9)
    logits, leaving = theirs(tokens)
    states = model.unroll(tokens, model.config.n_loops)
    for state, expected in zip(states, logits, strict=True):
        torch.testing.assert_close(model.readout_logits(state), expected)
    if exit_gate:
        torch.testing.assert_close(model.exit_logits(states).sigmoid(), leaving)
    else:
        assert (leaving < 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_nothing_changes(tmp_path, dtype):
    theirs = OuroForCausalLM().to(dtype)
    model = load_ouro(save(tmp_path / "ouro", theirs))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    (tmp_path / "back").mkdir()
    write_ouro(model, tmp_path / "back")
    before, after = theirs.state_dict(), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert {
        name: config.get(name) for name in CONFIG if name not in ("torch_dtype", "sliding_window", "layer_types")
    } == {name: value for name, value in CONFIG.items() if name not in ("torch_dtype", "sliding_window", "layer_types")}


def test_a_checkpoint_in_several_files(tmp_path):
    theirs = OuroForCausalLM()
    save(tmp_path / "whole", theirs)
    directory = tmp_path / "shards"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    places = {name: f"model-{1 + ('layers.1' in name)}.safetensors" for name in theirs.state_dict()}
    for file in set(places.values()):
        save_file({n: w for n, w in theirs.state_dict().items() if places[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    whole, shards = load_ouro(tmp_path / "whole").state_dict(), load_ouro(directory).state_dict()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_a_tied_head_is_the_embedding(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    theirs = OuroForCausalLM(config)
    theirs.lm_head.weight = theirs.model.embed_tokens.weight
    weights = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    model = tiny_decoder.LoopedLM(config_from_ouro(config))
    model.load_state_dict(weights_from_ouro(weights, model.config))
    tokens = tiny_decoder.tokens(2, 9)
    logits = model.eval()(tokens, logits=True).logits  # about ten times as large as those of a head of its own
    torch.testing.assert_close(logits, theirs(tokens)[0][-1], atol=1e-4, rtol=1e-4)
    assert "lm_head.weight" not in weights_to_ouro(model)
    assert config_to_ouro(model.config)["tie_word_embeddings"] is True


def test_the_preset_is_ouros_published_shape():
    """The fields of ByteDance/Ouro-1.4B's config.json, but for the length, which is of the presets' training."""
    published = CONFIG | {
        "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "max_position_embeddings": 4096,
    }  # fmt: skip
    preset = dataclasses.replace(PRESETS["ouro-1.4b"], exit_gate=True)
    assert config_from_ouro(published) == preset
    assert config_from_ouro(config_to_ouro(preset)) == preset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type of Ouro's configuration must be ouro. Got 'llama'."),
        ({"num_key_value_heads": 1}, "num_key_value_heads of Ouro's configuration must be 3 here. Got 1."),
        ({"head_dim": 16}, "head_dim of Ouro's configuration must be 8 here. Got 16."),
        ({"hidden_act": "gelu"}, "hidden_act of Ouro's configuration must be silu here. Got 'gelu'."),
        ({"use_sliding_window": True}, "use_sliding_window of Ouro's configuration must be False here. Got True."),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type .* must be default here. Got 'yarn'."),
        ({"total_ut_steps": 0}, "n_loops must be at least 1. Got n_loops=0."),
        ({"hidden_size": "wide"}, "Ouro's configuration cannot be used"),
        ({"num_attention_heads": 0}, "Ouro's configuration cannot be used"),
        (
            {"rms_norm_eps": "small"},
            "Ouro's configuration cannot be used .*norm_eps must be a number. Got norm_eps='sm",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_ouro(CONFIG | change)


def test_rope_parameters_of_newer_configurations_are_read():
    config = {name: value for name, value in CONFIG.items() if name not in ("rope_theta", "rope_scaling")}
    rope = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    assert config_from_ouro(config | rope).rope_theta == 5000.0
    with pytest.raises(ValueError, match="Ouro's configuration cannot be used"):
        config_from_ouro(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_norm": "pre"}, "block_norm must be sandwich in Ouro's layout. Got block_norm=pre."),
        ({"positions": "learned"}, "positions must be rotary in Ouro's layout. Got positions=learned."),
        ({"n_coda": 1}, "n_coda must be 0 in Ouro's layout. Got n_coda=1."),
        ({"loop_rank": 2}, "loop_rank must be 0 in Ouro's layout. Got loop_rank=2."),
    ],
)
def test_a_decoder_of_another_shape_is_not_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_ouro(ours(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exit_gate", [False, True])
def test_two_norms_that_differ_become_one(exit_gate):
    model = tiny_decoder.model(**SHAPE, tied=False, exit_gate=exit_gate).eval()
    if exit_gate:
        torch.nn.init.normal_(model.exit_gate.weight)
    theirs = OuroForCausalLM(config_to_ouro(model.config))
    theirs.load_state_dict(weights_to_ouro(model))
    tokens = tiny_decoder.tokens(2, 9)
    logits, leaving = theirs(tokens)
    states = model.unroll(tokens, model.config.n_loops)
    for state, expected in zip(states, logits, strict=True):
        torch.testing.assert_close(model.readout_logits(state), expected, atol=1e-5, rtol=1e-5)
    if exit_gate:
        torch.testing.assert_close(model.exit_logits(states).sigmoid(), leaving)


@pytest.mark.parametrize(("tied", "zero"), [(True, False), (False, True)])
def test_two_norms_that_cannot_become_one_are_not_written(tmp_path, tied, zero):
    model = ours(tied=tied)
    with torch.no_grad():
        model.loop_norm.weight[3] = 0.0 if zero else model.readout_norm.weight[3] + 0.5
    message = r"loop_norm and readout_norm must be equal in Ouro's layout.* Got a difference of "
    with pytest.raises(ValueError, match=message):
        write_ouro(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = OuroForCausalLM().state_dict()
    config = config_from_ouro(CONFIG)
    missing = {name: weight for name, weight in weights.items() if name != "model.layers.1.self_attn.k_proj.weight"}
    with pytest.raises(ValueError, match=r"must hold model\.layers\.1\.self_attn\.k_proj\.weight"):
        weights_from_ouro(missing, config)
    with pytest.raises(ValueError, match=r"must hold nothing else. Got model\.layers\.2"):
        weights_from_ouro(weights | {"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}, config)
    narrow = weights | {"model.norm.weight": torch.ones(23)}
    directory = save(tmp_path / "ouro", OuroForCausalLM())
    safetensors.torch.save_file(narrow, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"loop_norm.weight must have the shape \[24\]. Got \[23\]."):
        load_ouro(directory)


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    directory = save(tmp_path / "ouro", OuroForCausalLM())
    for name, damage in (("model.safetensors", "no file"), ("config.json", "{"), ("config.json", 100_000 * "[")):
        (directory / name).write_text(damage)
        with pytest.raises(ValueError, match=name) as caught:
            load_ouro(directory)
        assert "\n" not in str(caught.value)
    for name in ("ByteDance/Ouro-1.4B", str(tmp_path / "nowhere")):
        with pytest.raises(
            ValueError, match="name must be a directory or a repository of the Hugging Face hub"
        ) as caught:
            load_ouro(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, 5, ["model.safetensors"], {"lm_head.weight": 5}])
def test_an_index_that_names_no_files_is_refused(tmp_path, weight_map):
    directory = save(tmp_path / "ouro", OuroForCausalLM())
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"weight_map of .* must give the file of each weight. Got"):
        load_ouro(directory)


def test_without_the_client_of_the_hub_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'looped-lm\[hf\]'. Got ByteDance/Ouro-1.4B."):
        load_ouro("ByteDance/Ouro-1.4B")


def test_the_preset_takes_ouros_weights_without_their_gate():
    theirs = weights_to_ouro(ours(exit_gate=True))
    model = ours()
    model.load_state_dict(weights_from_ouro(theirs, model.config))
    with pytest.raises(ValueError, match=r"must hold model\.early_exit_gate\.bias"):
        weights_from_ouro({n: w for n, w in theirs.items() if n != "model.early_exit_gate.bias"}, model.config)
