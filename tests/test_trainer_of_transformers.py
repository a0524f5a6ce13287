"""transformers.Trainer on the decoder: labels are shifted, and micro-batches add up to the batch."""

import pytest
import tiny_decoder
import torch
from transformers import Trainer, TrainingArguments

import looped
from bench.competitors.recurrent_models import Size, hrm_text
from looped.supervision import IGNORE_INDEX
from looped.transformers import LoopedForCausalLM, LoopedPretrainedConfig


def model(**options):
    torch.manual_seed(0)
    return LoopedForCausalLM(LoopedPretrainedConfig.of(tiny_decoder.config(embedding_std=0.02), **options))


def rows(count=8):
    """Sequences padded on the right, whose numbers of labels differ."""
    examples = []
    for number, length in zip(range(count), (11, 4, 7, 2, 9, 11, 3, 5), strict=False):
        tokens = tiny_decoder.tokens(1, 11, seed=number)[0]
        keep = torch.arange(11) < length
        labels = torch.where(keep, tokens, IGNORE_INDEX)
        labels[0] = IGNORE_INDEX if number % 2 else tokens[0]  # which nothing predicts, so that it never counts
        examples.append({"input_ids": tokens, "attention_mask": keep.long(), "labels": labels})
    return examples


def trainer(directory, trained, **options):
    arguments = {
        "output_dir": str(directory), "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 1,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return Trainer(trained, TrainingArguments(**(arguments | options)), train_dataset=rows(), eval_dataset=rows())


def test_ten_steps_with_a_loss_of_every_loop(tmp_path):
    trained = model(penalty=0.01)
    before = {name: weight.clone() for name, weight in trained.named_parameters()}
    done = trainer(tmp_path, trained, max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2)
    done.train()
    losses = [record["loss"] for record in done.state.log_history if "loss" in record]
    assert len(losses) == 10
    assert losses[0] == pytest.approx(4.11, abs=0.1)  # log 61
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(before[name], weight) for name, weight in trained.named_parameters())
    evaluated = done.evaluate()["eval_loss"]
    tokens, labels = (torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels"))
    output = trained(tokens, labels=labels)
    assert evaluated == pytest.approx(output.loss.item(), rel=1e-5)
    predictions = torch.from_numpy(done.predict(rows()).predictions)  # the logits, and nothing else
    torch.testing.assert_close(predictions, output.logits.detach(), atol=1e-4, rtol=1e-4)


def test_micro_batches_of_unequal_numbers_of_labels_are_the_whole_batch(tmp_path):
    """One step of plain gradient descent on eight rows: at once, and in four micro-batches of two."""
    results = []
    for size, parts in ((8, 1), (2, 4)):
        trained = model()
        done = trainer(
            tmp_path, trained, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            learning_rate=0.5, optim="sgd",
        )  # fmt: skip
        done.train()
        results.append((done.state.log_history[0]["loss"], dict(trained.named_parameters())))
    (whole, expected), (summed, found) = results
    assert summed == pytest.approx(whole, abs=2e-4)  # the log has four digits
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    tokens, labels = (torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels"))
    assert whole == pytest.approx(model()(tokens, labels=labels).loss.item(), abs=2e-4)


def test_activation_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        trained = model()
        done = trainer(
            tmp_path, trained, max_steps=2, per_device_train_batch_size=4, activation_checkpointing=checkpointing
        )
        done.train()
        assert trained.decoder.checkpoint_loops == checkpointing
        results.append(dict(trained.named_parameters()))
    for name, weight in results[1].items():
        torch.testing.assert_close(weight, results[0][name], msg=name)


def test_a_patched_model_trains_as_it_would(tmp_path):
    """One step of HRM-Text: its own computation, patched, and patched in four micro-batches."""
    results = []
    for patched, size, parts in ((False, 8, 1), (True, 8, 1), (True, 2, 4)):
        torch.manual_seed(0)
        trained = hrm_text(Size(vocabulary=tiny_decoder.V))
        if patched:
            looped.patch(trained)
        done = trainer(
            tmp_path, trained, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            learning_rate=0.5, optim="sgd",
        )  # fmt: skip
        done.train()
        losses = [done.state.log_history[0]["loss"], done.evaluate()["eval_loss"]]
        results.append((losses, dict(trained.named_parameters())))
    (own, expected), *others = results
    for losses, found in others:
        assert losses == pytest.approx(own, abs=2e-4)
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4, msg=name)
