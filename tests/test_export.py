import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import arguments
from transformers import AutoTokenizer

from looped.export import main, provenance, to_ouro, to_transformers
from looped.ouro_weights import load_ouro
from looped.run_directory import load_run
from looped.supervision import Gated
from looped.transformers import LoopedForCausalLM, LoopedPretrainedConfig, register
from train.run import main as train

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory, options = tmp_path_factory.mktemp("run"), ["--penalty", "0.02", "--backprop-loops", "2"]
    assert train(arguments(directory, *options, "--out", str(directory / "tiny"))) == 0
    return directory / "tiny"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "deep" / "tiny-looped"
    assert main([str(run), "--to", "transformers", str(directory)]) == 0
    register()
    return directory


def test_the_export_is_the_runs_model(run, exported):
    saved = load_run(run)
    model = LoopedForCausalLM.from_pretrained(exported)
    tokens = saved.validation.tokens[:32].view(2, 16)
    for depth in (1, 3, 8):
        model.config.depth = depth
        assert torch.equal(model(tokens).logits, saved.model(tokens, n_loops=depth, logits=True).logits)
    assert model.config.shape == saved.model.config
    assert (model.config.depth, model.config.supervision, model.config.penalty) == (8, "per-loop", 0.02)
    assert model.config.backprop_loops == 2
    assert model.generation_config.eos_token_id == saved.validation.tokens[-1]


def test_the_export_of_a_gated_run_has_its_gate(tmp_path):
    gated = ["--supervision", "gated", "--gate-beta", "0.2", "--gate-prior", "geometric:0.5"]
    assert train(arguments(tmp_path, *gated, "--out", str(tmp_path / "gated"))) == 0
    assert main([str(tmp_path / "gated"), "--to", "transformers", str(tmp_path / "export")]) == 0
    config = LoopedForCausalLM.from_pretrained(tmp_path / "export").config
    assert config.loss_supervision == Gated(0.2, "geometric:0.5")
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "- supervision: gated (beta 0.2, geometric:0.5 prior)\n" in card


def test_the_tokenizer_is_the_runs(run, exported):
    saved = load_run(run)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = (run.parent / "text.txt").read_text(encoding="utf-8")
    text = text[-len(text) // 3 :].split(" ", 1)[1]
    ids = tokenizer(text)["input_ids"]
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == saved.validation.tokens[-1]
    assert tokenizer.eos_token_id not in tokenizer("<eos> is text")["input_ids"]
    document = saved.validation.tokens[: saved.validation.bounds[1] - 1]
    assert tokenizer(tokenizer.decode(document))["input_ids"] == document.tolist()
    assert tokenizer.model_max_length == 16


def test_the_card_has_the_runs_summary(run, exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# tiny\n" in card
    assert f"- parameters: {summary['parameters']:,}\n" in card
    for row in summary["evaluation"]:
        assert f"| {row['n_loops']} | {row['ce']:.5g} | {row['ppl']:.5g} | {row['bits_per_byte']:.5g} |" in card
    for name, value in (("norm penalty", 0.02), ("optimisation steps", 8), ("commit of the code", summary["commit"])):
        assert f"- {name}: {value}\n" in card


@pytest.mark.parametrize("evaluation", [5, "text", [5], {"ce": 1}, [{"ce": "x"}], [{"ce": 1.0}, {"ppl": 2.0}]])
def test_an_evaluation_that_is_no_table_is_one_line(run, tmp_path, capsys, evaluation):
    shutil.copytree(run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text()) | {"evaluation": evaluation}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    line = refused(capsys, tmp_path / "run", "--to", "transformers", tmp_path / "out")
    assert line.startswith("error: evaluation of a run must")
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_ended_has_a_card(run, tmp_path):
    saved = load_run(run)
    (run / "summary.json").rename(tmp_path / "summary.json")
    known = provenance(saved)
    (tmp_path / "summary.json").rename(run / "summary.json")
    assert "evaluation" not in known
    assert known["steps"] == 8


def test_loaded_without_registering_it_is_the_installed_code(exported, tmp_path):
    """In a process of its own, from elsewhere, as somebody loads it who has only the directory."""
    program = f"""
        import sys, looped, looped.export, looped.ouro_weights
        assert "transformers" not in sys.modules  # it is imported where it is used
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True, depth=2)
        tokenizer = AutoTokenizer.from_pretrained({str(exported)!r}, trust_remote_code=True)
        from looped.transformers import LoopedForCausalLM
        assert type(model) is LoopedForCausalLM and model.config.depth == 2
        new = model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=3, do_sample=False)
        print(new.shape[1] > 3)
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    lines = "\n".join(line.strip() for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr[-2000:]


def test_without_transformers_an_export_says_what_to_install(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    assert "an export needs transformers: pip install 'looped-lm[hf]'" in refused(
        capsys, run, "--to", "transformers", tmp_path / "out"
    )


def test_a_model_of_ouros_shape_in_ouros_layout(tmp_path):
    shape = ["--positions", "rotary", "--block-norm", "sandwich", "--inter-loop-norm", "--no-tied"]
    run = tmp_path / "ouro"
    assert train(arguments(tmp_path, *shape, "--out", str(run))) == 0
    assert main([str(run), "--to", "ouro", str(tmp_path / "export")]) == 0
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    saved, model = load_run(run), load_ouro(tmp_path / "export")
    tokens = saved.validation.tokens[:32].view(2, 16)
    torch.testing.assert_close(
        model(tokens, logits=True).logits, saved.model(tokens, logits=True).logits, atol=1e-5, rtol=1e-5
    )
    assert "model.layers.1.self_attn.q_proj.weight" in load_file(tmp_path / "export" / "model.safetensors")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["eos_token_id"] == saved.validation.tokens[-1]


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_what_does_not_fit_is_one_line_and_leaves_nothing(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert "inter_loop_norm must be True in Ouro's layout" in refused(capsys, run, "--to", "ouro", out)
    assert "a run must be a directory that training wrote" in refused(capsys, run / "none", "--to", "ouro", out)
    tokenizer = run / "tokenizer.json"
    content = tokenizer.read_text()
    try:
        tokenizer.write_text("{")
        assert "tokenizer.json cannot be read" in refused(capsys, run, "--to", "transformers", out)
    finally:
        tokenizer.write_text(content)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_has_something_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    line = refused(capsys, run, "--to", "transformers", tmp_path)
    assert line == f"error: DIR must not exist, or be an empty directory. Got {tmp_path}."
    assert "Got" in refused(capsys, run, "--to", "transformers", tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_task_has_no_tokenizer(run, tmp_path):
    saved = load_run(run)
    task = replace(saved, validation=replace(saved.validation, targets=saved.validation.tokens))
    for to in (to_transformers, to_ouro):
        with pytest.raises(ValueError, match=r"RUN must be of text for a layout with a tokenizer.* Got tiny"):
            to(task, tmp_path)


def test_an_error_while_writing_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    assert "no space left" in refused(capsys, run, "--to", "transformers", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_replaced_is_refused(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    message = "error: DIR must not be a mount point or the current directory. Got {}."
    assert refused(capsys, run, "--to", "safetensors", ".") == message.format(".")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    (tmp_path / "volume").mkdir()
    assert refused(capsys, run, "--to", "safetensors", tmp_path / "volume") == message.format(tmp_path / "volume")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "volume"]


@pytest.mark.parametrize("linked", [False, True])
def test_an_empty_directory_is_filled(run, tmp_path, linked):
    (tmp_path / "out").mkdir()
    if linked:
        (tmp_path / "link").symlink_to(tmp_path / "out")
    assert main([str(run), "--to", "transformers", str(tmp_path / ("link" if linked else "out"))]) == 0
    assert LoopedForCausalLM.from_pretrained(tmp_path / "out").config.run["name"] == "tiny"


# Upload ---------------------------------------------------------------------------------------------------------------


def test_an_upload_has_the_card(exported, monkeypatch):
    uploaded = {}

    class Done:
        commit_url = "https://hub/commit"

    def upload_folder(_, *, folder_path, **options):
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, options=options)
        return Done

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    model = LoopedForCausalLM.from_pretrained(exported)
    assert model.push_to_hub("me/tiny", revision="next") == "https://hub/commit"
    assert uploaded["README.md"] == (exported / "README.md").read_bytes()
    assert {"config.json", "model.safetensors", "looped_lm.py"} <= uploaded.keys()
    assert uploaded["options"]["repo_id"] == "me/tiny"
    assert uploaded["options"]["revision"] == "next"


def test_a_hub_out_of_reach_is_one_line(exported):
    model = LoopedForCausalLM.from_pretrained(exported)
    with pytest.raises(ValueError, match="repo_id must be a repository of the Hugging Face hub to write to") as caught:
        model.push_to_hub("me/tiny", token="none")
    assert "\n" not in str(caught.value)


def test_a_model_without_a_run_has_no_card(tmp_path):
    shape = {"vocab_size": 5, "d_model": 24, "n_heads": 3, "n_layers": 1, "d_ff": 8, "max_seq_len": 4}
    LoopedForCausalLM(LoopedPretrainedConfig(**shape)).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
