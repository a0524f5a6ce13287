"""A decoder for transformers: padded rows, caches, and losses."""

import pytest
import tiny_decoder
import torch
from transformers import DynamicCache
from wrapped_decoder import SHAPES, offline, wrapped  # noqa: F401

from looped.supervision import IGNORE_INDEX


def padded(rows, side="left"):
    """Tokens of different numbers as one batch, and its attention mask."""
    longest = max(map(len, rows))
    fill = [torch.zeros(longest - len(row), dtype=torch.int64) for row in rows]
    pairs = list(zip(fill, rows, strict=True)) if side == "left" else list(zip(rows, fill, strict=True))
    marks = [
        tuple(torch.full_like(part, int(part is row)) for part in pair) for pair, row in zip(pairs, rows, strict=True)
    ]
    return torch.stack([torch.cat(pair) for pair in pairs]), torch.stack([torch.cat(pair) for pair in marks])


def rows_of(*lengths):
    return [tiny_decoder.tokens(1, length, seed=length)[0] for length in lengths]


# Rows that are padded, and the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row(changes, side):
    _, model = wrapped(**changes)
    rows = rows_of(9, 4, 6)
    tokens, mask = padded(rows, side)
    logits = model(tokens, attention_mask=mask).logits
    for row, marks, found in zip(rows, mask.bool(), logits, strict=True):
        torch.testing.assert_close(found[marks], model(row.unsqueeze(0)).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", SHAPES)
def test_a_cache_changes_no_logits(changes):
    _, model = wrapped(**changes)
    tokens, mask = padded(rows_of(9, 5))
    whole = model(tokens, attention_mask=mask).logits
    cache, parts = None, []
    for first, last in ((0, 6), (6, 7), (7, 9)):
        output = model(tokens[:, first:last], attention_mask=mask[:, :last], cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    assert cache.get_seq_length() == 9
    assert len(cache.layers) == model.config.num_hidden_layers
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)


def test_a_cache_without_a_mask_continues_where_it_ended():
    _, model = wrapped(positions="rotary")
    tokens = tiny_decoder.tokens(2, 8)
    cache = DynamicCache()
    first = model(tokens[:, :5], cache=cache).logits
    second = model(tokens[:, 5:], cache=cache).logits
    torch.testing.assert_close(torch.cat((first, second), 1), model(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [SHAPES[0], SHAPES[2]])
def test_generation_is_greedy_and_each_row_as_if_alone(changes):
    decoder, model = wrapped(max_seq_len=32, **changes)
    rows = rows_of(7, 3)
    tokens, mask = padded(rows)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(found, model.generate(tokens, attention_mask=mask, use_cache=False, **options))
    for row, new in zip(rows, found[:, 7:], strict=True):
        expected = row.unsqueeze(0)
        for _ in range(4):
            expected = torch.cat((expected, decoder(expected, logits=True).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(new, expected[0, len(row) :])


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}],
)
def test_what_transformers_does_with_caches(options):
    _, model = wrapped(max_seq_len=32, n_coda=1)
    tokens, mask = padded(rows_of(7, 3))
    always = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, **always, **options)
    options = {name: value for name, value in options.items() if name != "cache_implementation"}
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **always, **options))


@pytest.mark.parametrize("changes", SHAPES)
def test_a_cache_of_fixed_size_sees_no_padding(changes):
    """generate hands masks of another shape to models with such a cache, unless they say otherwise."""
    _, model = wrapped(max_seq_len=32, **changes)
    tokens, mask = padded(rows_of(9, 2))
    options = {
        "attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    found = model.generate(tokens, cache_implementation="static", **options).logits
    for logits, expected in zip(found, model.generate(tokens, use_cache=False, **options).logits, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ((5,), None, r"input_ids must have shape \[B, T\]\. Got \[5\]"),
        ((2, 0), None, r"tokens must hold at least one token\. Got shape \[2, 0\]"),
        ((2, 0), (2, 0), r"tokens must hold at least one token\. Got shape \[2, 0\]"),
        ((2, 5), (2, 6), r"attention_mask must have shape \[B, past \+ T\] = \[2, 5\]\. Got \[2, 6\]"),
        ((2, 5), (2, 1, 5, 5), r"attention_mask must have shape .* Got \[2, 1, 5, 5\]"),
    ],
)
def test_rows_of_other_shapes_are_refused(tokens, mask, message):
    _, model = wrapped()
    with pytest.raises(ValueError, match=message):
        model(torch.ones(tokens, dtype=torch.int64), attention_mask=None if mask is None else torch.ones(mask))


def test_drafts_that_are_refused_leave_the_cache():
    _, model = wrapped(positions="rotary", n_coda=1)
    tokens = tiny_decoder.tokens(1, 4).repeat(1, 3)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    drafted = model.generate(tokens, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(drafted, model.generate(tokens, use_cache=False, **options))


def test_generation_at_another_depth():
    decoder, model = wrapped(positions="rotary")
    model.config.depth = 6
    tokens = tiny_decoder.tokens(1, 5)
    found = model.generate(tokens, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert found[0, -1] == decoder(tokens, n_loops=6, logits=True).logits[0, -1].argmax()


def test_learned_positions_end():
    _, model = wrapped()
    tokens = tiny_decoder.tokens(1, 10)
    cache = model(tokens, use_cache=True).cache
    message = "must not be longer than max_seq_len with learned positions. Got 20 tokens, max_seq_len=16."
    with pytest.raises(ValueError, match=message):
        model(tokens, cache=cache)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 10])])
def test_logits_of_some_positions(keep):
    _, model = wrapped(n_coda=1)
    tokens = tiny_decoder.tokens()
    whole = model(tokens).logits
    expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(model(tokens, logits_to_keep=keep).logits, expected)


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervision", ["per-loop", "terminal"])
def test_the_loss_is_the_decoders_of_the_next_token(supervision):
    decoder, model = wrapped(supervision=supervision, penalty=0.1)
    tokens = tiny_decoder.tokens()
    labels = tokens.clone()
    labels[0, :4] = IGNORE_INDEX
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    expected = decoder(tokens, targets, supervision=supervision, penalty=0.1)
    output = model(tokens, labels=labels)
    assert torch.equal(output.loss, expected.loss)
    torch.testing.assert_close(output.per_loop, expected.per_loop, equal_nan=True)
    assert output.logits is not None
    assert model.train()(tokens, labels=labels).logits is None  # which the fused loss does without


def test_terminal_loss_is_what_transformers_computes_of_the_logits():
    from transformers.loss.loss_utils import ForCausalLMLoss

    _, model = wrapped(supervision="terminal")
    tokens = tiny_decoder.tokens()
    for n_items in (None, 50, torch.tensor(31)):
        output = model(tokens, labels=tokens, num_items_in_batch=n_items)
        expected = ForCausalLMLoss(output.logits, tokens, tiny_decoder.V, num_items_in_batch=n_items)
        torch.testing.assert_close(output.loss, expected)


def test_micro_batches_add_up_to_the_whole():
    """Rows of unequal numbers of labels, in micro-batches of one row."""
    _, model = wrapped()
    model.train()
    tokens = tiny_decoder.tokens(3, 11)
    labels = tokens.clone()
    labels[0, 3:], labels[1, :8] = IGNORE_INDEX, IGNORE_INDEX
    n_items = (labels[:, 1:] != IGNORE_INDEX).sum()
    whole = model(tokens, labels=labels).loss
    whole.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    parts = []
    for row, wanted in zip(tokens.split(1), labels.split(1), strict=True):
        parts.append(model(row, labels=wanted, num_items_in_batch=n_items).loss)
        parts[-1].backward()
    torch.testing.assert_close(sum(parts), whole)
    tiny_decoder.assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected)


def test_the_penalty_counts_once_however_many_micro_batches():
    _, model = wrapped(penalty=0.5)
    tokens = tiny_decoder.tokens(4, 11)
    whole = model(tokens, labels=tokens, num_items_in_batch=40).loss
    torch.testing.assert_close(whole, model(tokens, labels=tokens).loss)
    parts = [model(rows, labels=rows, num_items_in_batch=40).loss for rows in tokens.split(1)]
    torch.testing.assert_close(sum(parts), whole)


def test_padding_on_the_right_keeps_the_loss():
    _, model = wrapped()
    rows = rows_of(9, 5)
    tokens, mask = padded(rows, "right")
    labels = torch.where(mask.bool(), tokens, IGNORE_INDEX)
    alone = [model(row.unsqueeze(0), labels=row.unsqueeze(0), num_items_in_batch=12).loss for row in rows]
    torch.testing.assert_close(model(tokens, attention_mask=mask, labels=labels).loss, sum(alone))


@pytest.mark.parametrize("supervision", ["per-loop", "gated"])
def test_padding_on_the_left_keeps_the_loss(supervision):
    """Of a coda too, which sees the rows as the loops do."""
    _, model = wrapped(supervision=supervision, exit_gate=True, n_coda=1, positions="rotary", penalty=0.0)
    torch.nn.init.normal_(model.decoder.exit_gate.weight)
    rows = rows_of(9, 5)
    tokens, mask = padded(rows)
    labels = torch.where(mask.cumsum(1) > 1, tokens, IGNORE_INDEX)  # nothing predicts a row's first token
    alone = [model(row.unsqueeze(0), labels=row.unsqueeze(0), num_items_in_batch=12).loss for row in rows]
    for given in ({}, {"use_cache": True}, {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}):
        loss = model(tokens, attention_mask=mask, labels=labels, **given).loss
        torch.testing.assert_close(loss, sum(alone), msg=str(given))


@pytest.mark.parametrize("training", [False, True])
def test_a_cache_of_rows_with_labels_continues(training):
    """The coda's keys of the last loop, and no others, are in it."""
    _, model = wrapped(n_coda=2, positions="rotary")
    tokens, mask = padded(rows_of(9, 5))
    model.train(training)
    cache = model(tokens[:, :6], attention_mask=mask[:, :6], labels=tokens[:, :6], use_cache=True).cache
    found = model(tokens[:, 6:], attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(found, model(tokens, attention_mask=mask).logits[:, 6:], atol=1e-4, rtol=1e-4)


def test_labels_that_a_coda_would_read_wrongly_are_refused():
    _, model = wrapped(n_coda=1)
    tokens = tiny_decoder.tokens(2, 9)
    cache = model(tokens[:, :6], use_cache=True).cache
    with pytest.raises(ValueError, match=r"need a model without coda\. Got 6 cached tokens, n_coda=1\."):
        model(tokens[:, 6:], cache=cache, labels=tokens[:, 6:])
    assert cache.get_seq_length() == 6


def test_dropout_reaches_the_attention_weights_of_padded_rows(monkeypatch):
    _, model = wrapped(dropout=0.3)
    given = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*arguments, **options):
        given.append(options["dropout_p"])
        return attend(*arguments, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
    tokens, mask = padded(rows_of(9, 5))
    model.train()(tokens, attention_mask=mask)
    model.eval()(tokens, attention_mask=mask)
    assert given == [0.3] * 6 + [0.0] * 6


def test_activation_checkpointing_is_the_decoders():
    _, model = wrapped()
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.decoder.checkpoint_loops
    assert model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    assert not model.decoder.checkpoint_loops
