"""lm-evaluation-harness on an export: a task from a local file, at K = 1..8, gives the numbers of our evaluation.

It brings some fifty packages. `make` installs them; without the extra `eval` these tests are left out.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tiny_run import arguments
from transformers import AutoTokenizer

from looped.export import main
from looped.run_directory import load_run
from train.run import main as train

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

LENGTH = 16  # of the run's windows


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    assert train(arguments(directory, "--out", str(directory / "tiny"))) == 0
    assert main([str(directory / "tiny"), "--to", "transformers", str(directory / "export")]) == 0
    return directory / "tiny"


@pytest.fixture(scope="module")
def documents(run) -> list[list[int]]:
    """Token ids of pieces of the validation text, each of whole windows."""
    tokens = load_run(run).validation.tokens.tolist()
    return [tokens[start : start + windows * LENGTH] for start, windows in ((0, 3), (100, 1), (300, 2))]


@pytest.fixture(scope="module")
def tasks(run, documents, tmp_path_factory) -> TaskManager:
    directory = tmp_path_factory.mktemp("tasks")
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "export", trust_remote_code=True)
    texts = [tokenizer.decode(document) for document in documents]
    assert [tokenizer(text)["input_ids"] for text in texts] == documents
    choices = [{"text": text[:9], "choices": [text[9:11], text[9:15], "e"]} for text in texts]
    for name, rows in (("texts", [{"text": text} for text in texts]), ("choices", choices)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shared = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {}\n"
    (directory / "texts.yaml").write_text(
        f"task: local_texts\n{shared.format(directory / 'texts.jsonl')}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n'
    )
    (directory / "choices.yaml").write_text(
        f"task: local_choices\n{shared.format(directory / 'choices.jsonl')}output_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: 0\nmetric_list:\n  - metric: acc\n'
    )
    return TaskManager(include_path=str(directory), include_defaults=False)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def evaluated(run, tasks, task, *, depth, batch_size):
    export = run.parent / "export"
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={export},depth={depth},trust_remote_code=True",
        tasks=[task],
        task_manager=tasks,
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )


@pytest.mark.parametrize("depth", range(1, 9))
def test_bits_per_byte_are_those_of_our_evaluation(run, tasks, documents, depth):
    saved = load_run(run)
    end = saved.validation.tokens[-1:]
    nats = n_bytes = 0.0
    for document in map(torch.tensor, documents):
        inputs = torch.cat((end, document[:-1])).view(-1, LENGTH)
        states = saved.model.unroll(inputs, depth)
        nats += saved.model.evaluation_losses(states[-1:], document.view(-1, LENGTH)).double().sum().item()
        n_bytes += saved.validation.bytes_per_token[document].sum().item()
    found = evaluated(run, tasks, "local_texts", depth=depth, batch_size=1)["results"]["local_texts"]
    assert found["bits_per_byte,none"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)


@pytest.mark.parametrize("task", ["local_texts", "local_choices"])
def test_batch_sizes_give_equal_results(run, tasks, task):
    alone, together = (evaluated(run, tasks, task, depth=4, batch_size=size)["samples"][task] for size in (1, 3))
    assert len(alone) == 3
    for one, other in zip(alone, together, strict=True):
        numbers = [[float(n) for n in re.findall(r"-?\d+\.\d+", str(sample["resps"]))] for sample in (one, other)]
        assert len(numbers[0]) >= 1
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
