"""Models that save_pretrained wrote, diagnosed from their directories. No network."""

import dataclasses
import json
import re
import shutil
import sys

import pytest
import tiny_run
import torch
from foreign_models import VOCABULARY, small
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file

from bench.competitors.recurrent_models import albert, hrm_text
from looped.diagnose import from_model
from looped.diagnose.__main__ import main
from looped.diagnose.diagnosis import diagnose_run
from looped.diagnose.interventions import ALPHAS
from looped.diagnose.model import token_losses
from looped.diagnose.pretrained import load_pretrained, mask_tokens, scale_checks, scale_table
from looped.export import main as export
from looped.run_directory import load_run
from train.run import main as train

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SEQ_LEN = 8


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Text of the words w0, w1, ... as a file."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("data") / "words.txt"
    drawn = torch.randint(VOCABULARY - 2, (200,), generator=generator).tolist()
    path.write_text(" ".join(f"w{word}" for word in drawn), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of small models with a tokenizer, by model_type."""
    vocabulary = {f"w{word}": word for word in range(VOCABULARY - 2)} | {
        "[UNK]": VOCABULARY - 2,
        "[MASK]": VOCABULARY - 1,
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", mask_token="[MASK]")
    directories = {}
    for make in (hrm_text, albert):
        torch.manual_seed(0)
        directory = tmp_path_factory.mktemp("models") / make.__name__
        make().save_pretrained(directory)
        fast.save_pretrained(directory)
        directories[make.__name__] = directory
    return directories


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(1))}, path)
    return path


def options(**changes):
    return {"n_tokens": 40, "seq_len": SEQ_LEN} | changes


@pytest.mark.parametrize("name", ["hrm_text", "albert"])
def test_load_pretrained(saved, words, name):
    """The saved weights, and the text as the saved tokenizer reads it."""
    loaded = load_pretrained(str(saved[name]), str(words), **options())
    expected = {"hrm_text": hrm_text, "albert": albert}[name]
    torch.manual_seed(0)
    for parameter, wanted in zip(loaded.model.parameters(), expected().parameters(), strict=True):
        assert torch.equal(parameter, wanted)
    assert not loaded.model.training
    first = words.read_text(encoding="utf-8").split()[:SEQ_LEN]
    wanted = torch.tensor([int(word[1:]) for word in first])
    inputs, targets = loaded.batches[0]
    assert torch.equal(targets[0], wanted) if name == "albert" else torch.equal(inputs[0], wanted)
    assert loaded.name == name
    assert loaded.notes["data"] == "words.txt"
    assert ("masked" in loaded.notes) == (name == "albert")
    assert ("state" in loaded.notes) == (name == "hrm_text")


def test_load_pretrained_takes_tokens(saved, tokens, tmp_path):
    """Of a model without a tokenizer too."""
    directory = tmp_path / "without"
    shutil.copytree(saved["hrm_text"], directory, ignore=shutil.ignore_patterns("tokenizer*"))
    loaded = load_pretrained(str(directory), str(tokens), **options())
    inputs, targets = loaded.batches[0]
    assert torch.equal(inputs[0, 1:], targets[0, :-1])
    assert sum(len(rows) for rows, _ in loaded.batches) == 5


REMOTE_CODE = """
from bench.competitors.recurrent_models import Ouro, Size
from transformers import PreTrainedConfig, PreTrainedModel


class OuroConfig(PreTrainedConfig):
    model_type = "ouro"
    num_hidden_layers: int = 2
    total_ut_steps: int = 3
    vocab_size: int = 37


class OuroForCausalLM(PreTrainedModel):
    config_class = OuroConfig

    def __init__(self, config):
        super().__init__(config)
        whole = Ouro(Size(n_loops=config.total_ut_steps))
        self.model, self.lm_head = whole.model, whole.lm_head
        self.post_init()

    def forward(self, input_ids, labels=None, use_cache=None):
        return Ouro.forward(self, input_ids, labels, use_cache)
"""


def test_load_pretrained_with_code_of_its_own(tokens, tmp_path, monkeypatch, capsys):
    """It is run where it is trusted, and not before."""
    directory, place = tmp_path / "model", tmp_path / "modules"
    directory.mkdir()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place))
    monkeypatch.syspath_prepend(str(place))
    (directory / "modeling_ouro.py").write_text(REMOTE_CODE, encoding="utf-8")
    names = {"AutoConfig": "modeling_ouro.OuroConfig", "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"}
    config = {"model_type": "ouro", "auto_map": names, "num_hidden_layers": 2, "total_ut_steps": 3, "vocab_size": 37}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = small("ouro", torch.float32).state_dict()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert "needs --trust-remote-code" in refused(capsys, arguments(directory, tokens, tmp_path / "page"))
    assert not place.exists()
    loaded = load_pretrained(str(directory), str(tokens), **options(trust_remote_code=True))
    assert type(loaded.model).__name__ == "OuroForCausalLM"
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, weights[name])
    page = tmp_path / "page"
    assert main(arguments(directory, tokens, page, "--trust-remote-code", "--scale-loops", 8)) == 0
    (diagnosis,) = json.loads((page / "diagnosis.json").read_text(encoding="utf-8"))["diagnoses"]
    assert diagnosis["verdict"]["control"] == "removed"
    checks = json.loads((page / "scale.json").read_text(encoding="utf-8"))
    assert [check["loop"] for check in checks] == list(range(1, 9))
    assert all(check["with_norm"] < 1e-2 < check["without_norm"] for check in checks)


def test_mask_tokens():
    inputs = torch.randint(5, (8, 100))
    ((masked, targets),) = mask_tokens([(inputs, inputs)], 9)
    share = (masked == 9).float().mean().item()
    assert 0.1 < share < 0.2
    assert torch.equal(targets, inputs)
    assert torch.equal(masked[masked != 9], inputs[masked != 9])
    with pytest.raises(ValueError, match="must have a mask token"):
        mask_tokens([(inputs, inputs)], None)


def test_scale_checks():
    """With the norm the scale does not matter, without it does; the loops go on beyond the trained ones."""
    model = small("ouro").eval()
    described = from_model(model)
    batch = (torch.arange(12).view(2, 6) % VOCABULARY, torch.arange(1, 13).view(2, 6) % VOCABULARY)
    checks = scale_checks(model, [batch], n_loops=5)
    assert [check.loop for check in checks] == [1, 2, 3, 4, 5]
    states = described.states(batch[0], 5)
    for check, state in zip(checks, states, strict=True):
        assert check.ce == pytest.approx(described.cross_entropy(state, batch[1], final=True).mean().item())
        raw = [token_losses(described.head(alpha * state), batch[1]).mean().item() for alpha in ALPHAS]
        assert check.without_norm == pytest.approx(max(raw) - min(raw))
        assert check.with_norm < 0.01 < check.without_norm
    assert len(scale_table(checks).split("\n")) == 6
    with pytest.raises(ValueError, match="n_loops must be at least 1"):
        scale_checks(model, [batch], n_loops=0)


# The command ----------------------------------------------------------------------------------------------------------


def arguments(model, data, out, *more):
    windows = ["--tokens", "40", "--seq-len", str(SEQ_LEN), "--loops", "5", "--device", "cpu"]
    return ["--model", str(model), "--data", str(data), "--out", str(out), *windows, *map(str, more)]


@pytest.mark.parametrize("name", ["hrm_text", "albert"])
def test_command(saved, words, tmp_path, capsys, name):
    """A page with its verdict, and the checks of the scale."""
    assert main(arguments(saved[name], words, tmp_path / "page", "--scale-loops", 4)) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "page" / "diagnosis.json").read_text(encoding="utf-8"))
    (diagnosis,) = record["diagnoses"]
    assert diagnosis["name"] == name
    assert diagnosis["origin"]["data"] == "words.txt"
    assert diagnosis["verdict"]["advice"] in printed
    assert diagnosis["verdict"]["advice"].split(":")[0] in (tmp_path / "page" / "index.html").read_text(
        encoding="utf-8"
    )
    assert len(json.loads((tmp_path / "page" / "scale.json").read_text(encoding="utf-8"))) == 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with a gate, and its export."""
    directory = tmp_path_factory.mktemp("export")
    options = ["--supervision", "gated", "--penalty", "0.02", "--out", str(directory / "run")]
    assert train(tiny_run.arguments(directory, *options)) == 0
    assert export([str(directory / "run"), "--to", "transformers", str(directory / "export")]) == 0
    return directory


def test_an_export_is_diagnosed_as_its_run(exported):
    """On the same windows: the run's own validation text, as tokens."""
    run = load_run(exported / "run")
    path = exported / "tokens.safetensors"
    save_file({"tokens": run.validation.tokens}, path)
    loaded = load_pretrained(str(exported / "export"), str(path), n_tokens=160, seq_len=None)
    assert loaded.batches[0][0].shape[1] == 16  # the model's longest
    found, expected = loaded.diagnose(9).measured, diagnose_run(run, n_tokens=160, horizon=9).measured
    assert found.weights == expected.weights
    assert found.penalty == expected.penalty == 0.02
    assert found.norms == expected.norms
    assert found.radial == expected.radial
    assert found.halting.skipped is not None
    assert dataclasses.replace(found.depth, bits_per_byte=None) == dataclasses.replace(
        expected.depth, bits_per_byte=None
    )


def test_command_on_an_export(exported, tmp_path, capsys):
    """A page, and the checks of the scale, which the readout without a norm sees."""
    data = exported / "text.txt"
    assert main([*arguments(exported / "export", data, tmp_path / "page", "--scale-loops", 8), "--rounds", "0"]) == 0
    assert (tmp_path / "page" / "index.html").exists()
    checks = json.loads((tmp_path / "page" / "scale.json").read_text(encoding="utf-8"))
    assert len(checks) == 8
    assert all(check["with_norm"] < 1e-3 < check["without_norm"] for check in checks)


def refused(capsys, argv) -> str:
    """The line that the command leaves with exit code 2."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_command_says_that_the_hub_is_out_of_reach(tokens, tmp_path, capsys):
    """Once: the hub's client warns of every try."""
    hub_logging.set_verbosity_warning()
    line = refused(capsys, arguments("nobody/no-such-model", tokens, tmp_path / "page"))
    assert line.startswith(
        "error: model must be a directory that save_pretrained wrote, or a model of the hub, if that"
    )
    assert not (tmp_path / "page").exists()
    assert hub_logging.get_verbosity() >= hub_logging.ERROR


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model must be one of albert, .* of model_type 'llama'"),
        ({"model_type": "ouro"}, "a model whose code comes with it needs --trust-remote-code"),
        ({}, "of model_type None"),
        ([1], "of model_type None"),
        ({"model_type": ["albert"]}, r"of model_type \['albert'\]"),
        ({"model_type": "hrm_text", "max_position_embeddings": "x"}, "max_position_embeddings of .* integer.* Got 'x'"),
        ({"model_type": "hrm_text", "vocab_size": 0}, "vocab_size of .* must be an integer of at least 1. Got 0"),
    ],
)
def test_command_rejects_models(tokens, tmp_path, capsys, config, message):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert re.search(message, refused(capsys, arguments(directory, tokens, tmp_path / "page")))


def test_command_rejects_data(saved, tokens, tmp_path, capsys):
    line = refused(capsys, arguments(saved["hrm_text"], tmp_path / "none-*.txt", tmp_path / "page"))
    assert "data must be files that are there" in line
    save_file({"tokens": torch.tensor([VOCABULARY])}, tokens)
    line = refused(capsys, arguments(saved["hrm_text"], tokens, tmp_path / "page"))
    assert f"data must hold tokens below the model's vocabulary of {VOCABULARY}. Got {VOCABULARY} to" in line
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    line = refused(capsys, arguments(saved["hrm_text"], tmp_path / "latin.txt", tmp_path / "page"))
    assert "data must be text in UTF-8" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seq-len", 513), "seq_len must be in [1, 512], the model's longest. Got 513"),
        (("--loops", 3), "horizon must be above the n_loops=3 that were trained. Got horizon=3"),
        (("--scale-loops", -1), "scale_loops must be at least 0. Got scale_loops=-1"),
    ],
)
def test_command_rejects_options(saved, words, tmp_path, capsys, more, message):
    assert message in refused(capsys, arguments(saved["hrm_text"], words, tmp_path / "page", *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data", "x.txt"), "data must be given with --model alone. Got x.txt for a RUN."),
        (("--seq-len", "0"), "seq_len must be given with --model alone. Got 0"),
        (("--trust-remote-code",), "trust_remote_code must be given with --model alone. Got True"),
        (("--scale-loops", "8"), "scale_loops must be given with --model alone. Got 8"),
    ],
)
def test_command_rejects_options_of_a_model_for_a_run(tmp_path, capsys, more, message):
    assert message in refused(capsys, [str(tmp_path / "run"), *more])


def test_command_rejects_a_model_that_lacks_weights(saved, words, tmp_path, capsys):
    """transformers would draw them, and the verdict be one on noise."""
    directory = tmp_path / "bare"
    shutil.copytree(saved["albert"], directory)
    transformers.AlbertModel.from_pretrained(saved["albert"]).save_pretrained(directory)
    line = refused(capsys, arguments(directory, words, tmp_path / "page"))
    assert "model must hold all weights of AlbertForMaskedLM, in its shapes. Got" in line
    assert line.endswith("without predictions.LayerNorm.bias.\n")
    shutil.copytree(saved["hrm_text"], tmp_path / "narrow")
    weights = load_file(tmp_path / "narrow" / "model.safetensors")
    weights["model.z_L_init"] = weights["model.z_L_init"][:-1].clone()
    save_file(weights, tmp_path / "narrow" / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, arguments(tmp_path / "narrow", words, tmp_path / "page"))
    assert line.endswith("narrow without model.z_L_init.\n")


@pytest.mark.parametrize("package", ["transformers", "huggingface_hub"])
def test_command_says_what_to_install(saved, words, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capsys, arguments(saved["hrm_text"], words, tmp_path / "page"))
    assert line.startswith("error: a model by name needs transformers: pip install 'looped-lm[hf]' (")
    assert package in line


def test_command_rejects_half_a_request(tmp_path, capsys):
    assert "out must be given for --model" in refused(capsys, ["--model", "x", "--data", "y"])
    assert "data must be given for --model" in refused(capsys, ["--model", "x", "--out", str(tmp_path)])
    assert "runs and --model must not be given at once" in refused(capsys, ["run", "--model", "x", "--data", "y"])
    with pytest.raises(SystemExit):
        main([])
    assert "a RUN or --model must be given" in capsys.readouterr().err
