"""A decoder for transformers: its configuration, how it is saved and loaded, and what is asked of it then."""

import json

import pytest
import tiny_decoder
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from wrapped_decoder import SHAPES, offline, wrapped  # noqa: F401

from looped import PRESETS, LoopedConfig, LoopedLM
from looped.supervision import IGNORE_INDEX, Gated
from looped.transformers import LoopedForCausalLM, LoopedPretrainedConfig, register


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_there_and_back(tmp_path, name):
    LoopedPretrainedConfig.of(PRESETS[name], depth=7, penalty=0.01).save_pretrained(tmp_path)
    loaded = LoopedPretrainedConfig.from_pretrained(tmp_path)
    assert loaded.shape == PRESETS[name]
    assert (loaded.depth, loaded.penalty, loaded.supervision, loaded.run) == (7, 0.01, "per-loop", {})


def test_the_names_that_others_ask_for():
    config = LoopedPretrainedConfig.of(tiny_decoder.config(n_prelude=1, n_coda=2))
    assert (config.hidden_size, config.num_attention_heads, config.max_position_embeddings) == (24, 3, 16)
    assert config.tie_word_embeddings is True
    assert config.num_hidden_layers == 1 + 3 * 2 + 2
    config.depth = 5
    assert config.num_hidden_layers == 1 + 5 * 2 + 2
    assert isinstance(config, PreTrainedConfig)
    assert not isinstance(config, LoopedConfig)


def test_loops_without_gradient_are_those_of_the_run(tmp_path):
    decoder, model = wrapped()
    model.config.backprop_loops = 2
    model.save_pretrained(tmp_path)
    model = LoopedForCausalLM.from_pretrained(tmp_path)
    tokens = tiny_decoder.tokens()
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE_INDEX)
    expected, output = decoder(tokens, targets, backprop_loops=2), model(tokens, labels=tokens)
    expected.loss.backward()
    output.loss.backward()
    torch.testing.assert_close(output.per_loop, expected.per_loop, equal_nan=True)
    found, wanted = (
        {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        for module in (model.decoder, decoder)
    )
    tiny_decoder.assert_same_gradients(found, wanted)


def test_gated_supervision_keeps_its_options(tmp_path):
    decoder = tiny_decoder.model(exit_gate=True)
    options = {"supervision": "gated", "gate_beta": 0.3, "gate_prior": "geometric:0.4"}
    model = LoopedForCausalLM(LoopedPretrainedConfig.of(decoder.config, **options))
    model.decoder.load_state_dict(decoder.state_dict())
    model.save_pretrained(tmp_path)
    tokens = tiny_decoder.tokens()
    expected = decoder.readout_loss(
        decoder.unroll(tokens, 3), torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE_INDEX),
        supervision=Gated(0.3, "geometric:0.4"),
    ).loss  # fmt: skip
    torch.testing.assert_close(LoopedForCausalLM.from_pretrained(tmp_path)(tokens, labels=tokens).loss, expected)
    with pytest.raises(ValueError, match="prior of the gate must be uniform or geometric:P"):
        LoopedPretrainedConfig.of(decoder.config, **(options | {"gate_prior": "normal"}))


def test_a_configuration_that_breaks_a_rule_is_refused():
    shape = {"vocab_size": 5, "d_model": 24, "n_heads": 3, "n_layers": 1, "d_ff": 8, "max_seq_len": 4}
    with pytest.raises(ValueError, match=r"d_model must be divisible by n_heads. Got d_model=24, n_heads=5."):
        LoopedPretrainedConfig(**(shape | {"n_heads": 5}))
    with pytest.raises(TypeError, match="d_ff"):
        LoopedPretrainedConfig(**{name: value for name, value in shape.items() if name != "d_ff"})


@pytest.mark.parametrize("changes", SHAPES)
def test_saved_and_loaded_it_is_the_decoder(tmp_path, changes):
    decoder, model = wrapped(**changes)
    model.save_pretrained(tmp_path)
    register()
    register()  # twice is once
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LoopedForCausalLM)
    assert not loaded.training
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LoopedPretrainedConfig)
    assert not (tmp_path / "README.md").exists()
    tokens = tiny_decoder.tokens()
    for depth in (1, 3):
        loaded.config.depth = depth
        expected = decoder(tokens, n_loops=depth, logits=True)
        output = loaded(tokens, output_hidden_states=True)
        assert torch.equal(output.logits, expected.logits)
        assert all(torch.equal(*pair) for pair in zip(output.hidden_states, expected.states, strict=True))


def test_the_depth_can_be_chosen_when_loading(tmp_path):
    decoder, model = wrapped(loop_embedding=True)
    model.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path, depth=5)
    tokens = tiny_decoder.tokens()
    assert torch.equal(loaded(tokens).logits, decoder(tokens, n_loops=5, logits=True).logits)
    for depth in (0, "2", 1.5):
        with pytest.raises(ValueError, match=rf"depth must be an int of at least 1\. Got {depth!r}\."):
            loaded.config.depth = depth
        with pytest.raises(ValueError, match="depth must be an int of at least 1"):
            LoopedForCausalLM.from_pretrained(tmp_path, depth=depth)


def test_a_new_model_starts_as_a_decoder_starts():
    torch.manual_seed(3)
    decoder = LoopedLM(tiny_decoder.config())
    torch.manual_seed(3)
    model = LoopedForCausalLM(LoopedPretrainedConfig.of(decoder.config))
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weight, model.decoder.state_dict()[name]), name


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    _, model = wrapped()
    model.save_pretrained(tmp_path)
    weights = {name: weight for name, weight in model.state_dict().items() if "mlp.w2" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"must hold all weights of its model. Got none for decoder.blocks.0.mlp.w2."):
        LoopedForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_tokens", [tiny_decoder.V - 4, tiny_decoder.V + 3])
def test_the_vocabulary_can_be_resized(tmp_path, tied, n_tokens):
    _, model = wrapped(tied=tied)
    tokens = tiny_decoder.tokens() % (tiny_decoder.V - 4)
    known = model(tokens).logits[..., : tiny_decoder.V - 4]
    model.resize_token_embeddings(n_tokens)
    assert model.config.shape.vocab_size == model.decoder.config.vocab_size == n_tokens
    logits = model(tokens, labels=tokens).logits
    assert logits.shape[-1] == n_tokens
    torch.testing.assert_close(logits[..., : tiny_decoder.V - 4], known)
    with pytest.raises(ValueError, match=rf"tokens must be in \[0, vocab_size={n_tokens}\)"):
        model(torch.full_like(tokens, n_tokens))
    model.save_pretrained(tmp_path)
    assert torch.equal(LoopedForCausalLM.from_pretrained(tmp_path)(tokens).logits, logits)


def test_added_tokens_start_as_the_embedding_does(tmp_path):
    _, model = wrapped(embedding_std=0.02)
    model.save_pretrained(tmp_path)
    for resized in (model, LoopedForCausalLM.from_pretrained(tmp_path)):
        resized.resize_token_embeddings(4000, mean_resizing=False)
        assert resized.decoder.embedding.weight[tiny_decoder.V :].std().item() == pytest.approx(0.02, rel=0.02)


def test_the_attention_that_it_has_may_be_asked_for(tmp_path):
    _, model = wrapped()
    model.save_pretrained(tmp_path)
    tokens = tiny_decoder.tokens()
    loaded = LoopedForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_dtypes_are_kept(tmp_path):
    _, model = wrapped()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert LoopedForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert LoopedForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
