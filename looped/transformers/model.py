"""LoopedForCausalLM: the decoder behind the calls that transformers makes of a causal language model."""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from looped.context import Context
from looped.model import LoopedLM
from looped.supervision import IGNORE_INDEX
from looped.transformers.attention import Rows, is_padded_on_the_left, mask_of, positions_of
from looped.transformers.card import model_card
from looped.transformers.configuration import AUTO_CODE, AUTO_FILE, LoopedPretrainedConfig


@dataclass
class LoopedCausalLMOutput(CausalLMOutputWithPast):
    """As CausalLMOutputWithPast, with the states H_1..H_K as hidden_states, and per_loop as LoopedOutput has it."""

    per_loop: Tensor | None = None


class LoopedForCausalLM(PreTrainedModel, GenerationMixin):
    """`decoder` is a LoopedLM, which has all parameters and may be used by itself.

    A new model starts as a LoopedLM starts. A checkpoint that lacks weights is refused.
    """

    config_class = LoopedPretrainedConfig
    config: LoopedPretrainedConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # the decoder calls it itself
    accepts_loss_kwargs = True  # the trainer passes num_items_in_batch, and does not divide by the micro-batches
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: LoopedPretrainedConfig) -> None:
        super().__init__(config)
        self.decoder = LoopedLM(config.shape)
        self._has_values = not self.decoder.embedding.weight.is_meta
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Called for modules that may have no values yet. A checkpoint's missing weights are an error."""
        if module not in set(self.modules()):  # a larger table or head, which resize_token_embeddings has just made
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.embedding_std)
            return
        if self._has_values:
            return
        if any(not getattr(weight, "_is_hf_initialized", False) for weight in module.parameters(recurse=False)):
            name = next(name for name, child in self.named_modules() if child is module)
            raise ValueError(f"a checkpoint must hold all weights of its model. Got none for {name}.")

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """What resize_token_embeddings gives: a table of another number of tokens."""
        assert isinstance(value, nn.Embedding)
        self.decoder.embedding = value
        self.decoder.config = replace(self.decoder.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module | None:
        """None where the head is the embedding."""
        return self.decoder.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Linear)
        self.decoder.head = value

    def create_masks_for_generate(self, *, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """generate's mask as it is, [B, past + T]: `forward` makes the masks, of a cache of fixed size too."""
        return attention_mask

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Keep only the states for the backward pass, whatever the options are."""
        self.decoder.checkpoint_loops = True

    def activation_checkpointing_disable(self) -> None:
        self.decoder.checkpoint_loops = False

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.decoder.checkpoint_loops

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
    ) -> LoopedCausalLMOutput | tuple[Any, ...]:
        """Logits [B, T, V] of loop K = `config.depth`, and with labels the loss of all loops.

        input_ids: [B, T] int64. attention_mask: [B, T], or [B, past + T] with a cache: 0 for padding. position_ids:
        [B, T]; by default a row's first token has position 0. cache: of the tokens before these; use_cache=True starts
        one. logits_to_keep: how many of the last positions, 0 for all, or which ones. output_hidden_states: return the
        states.
        labels: [B, T], the tokens themselves, -100 where they do not count: the one at t + 1 is what position t
        predicts. In training no logits are formed then, unless there is a cache.
        num_items_in_batch: the number of predictions that count in all micro-batches of a step; the loss is divided by
        it, and the penalty counts by this micro-batch's share, so that the micro-batches' losses add up to the loss of
        the whole.

        Raises ValueError for tokens or a mask of other shapes, for rows longer than learned positions, for labels of
        rows that follow cached ones in a model with a coda, which would have to know how every loop read those, and as
        LoopedLM does.
        """
        decoder = self.decoder
        if labels is not None and decoder.config.n_coda and cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "labels of rows that follow cached ones need a model without coda. "
                f"Got {cache.get_seq_length()} cached tokens, n_coda={decoder.config.n_coda}."
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        rows, position_ids = self._attending(input_ids, attention_mask, position_ids, cache)
        with_gradient = None if labels is None else self.config.backprop_loops
        states = decoder.unroll(input_ids, self.config.depth, with_gradient, positions=position_ids, cache=rows)
        output = LoopedCausalLMOutput(cache=cache, hidden_states=states if output_hidden_states else None)
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            uncached = None if rows is None else replace(rows, cache=None)  # the coda reads every state, and keeps none
            context = decoder.context(input_ids, positions=position_ids, cache=uncached)
            output.loss, output.per_loop = self._loss(states, targets, num_items_in_batch, context)
        if labels is None or not self.training or cache is not None:  # a coda has its place in the cache
            context = decoder.context(input_ids, positions=position_ids, cache=rows)
            output.logits = decoder.head_logits(_kept(decoder.read(states[-1], context), logits_to_keep))
        return output.to_tuple() if return_dict is False else output

    def _attending(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> tuple[Rows | None, Tensor | None]:
        """How the rows attend, None for causally among themselves; and their positions, None for 0..T-1."""
        config = self.decoder.config
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape [B, T]. Got {list(input_ids.shape)}.")
        past, length = 0 if cache is None else int(cache.get_seq_length()), input_ids.shape[1]
        wanted = (len(input_ids), past + length)
        if attention_mask is not None and attention_mask.shape != wanted:
            raise ValueError(
                f"attention_mask must have shape [B, past + T] = {list(wanted)}. Got {list(attention_mask.shape)}."
            )
        if config.positions == "learned" and past + length > config.max_seq_len:
            raise ValueError(
                "a sequence must not be longer than max_seq_len with learned positions. "
                f"Got {past + length} tokens, max_seq_len={config.max_seq_len}."
            )
        if attention_mask is not None and not is_padded_on_the_left(attention_mask):
            attention_mask = None
        if position_ids is None and attention_mask is not None:
            position_ids = positions_of(attention_mask)[:, past:]
        elif position_ids is None and past > 0:
            position_ids = (past + torch.arange(length, device=input_ids.device)).expand(len(input_ids), -1)
        if cache is None and attention_mask is None:
            return None, position_ids
        alone = attention_mask is None and past == 0
        mask = None if alone else mask_of(attention_mask, past, length, input_ids.device)
        return Rows(config, mask, cache, config.dropout if self.training else 0.0), position_ids

    def _loss(
        self, states: tuple[Tensor, ...], targets: Tensor, num_items: int | Tensor | None, context: Context
    ) -> tuple[Tensor | None, Tensor | None]:
        penalty: float | Tensor = self.config.penalty
        if num_items is not None and penalty:
            penalty = penalty * (targets != IGNORE_INDEX).sum() / num_items
        result = self.decoder.readout_loss(
            states, targets, backprop_loops=self.config.backprop_loops, supervision=self.config.loss_supervision,
            penalty=penalty, n_targets=num_items, context=context,
        )  # fmt: skip
        return result.loss, result.per_loop

    def save_pretrained(self, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
        """As transformers does, with a README.md where the configuration knows of a run."""
        super().save_pretrained(save_directory, *arguments, **options)
        Path(save_directory, AUTO_FILE).write_text(AUTO_CODE, encoding="utf-8")
        if self.config.run:
            Path(save_directory, "README.md").write_text(model_card(self.config), encoding="utf-8")

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload model",
    ) -> str:
        """Upload what `save_pretrained` writes, its model card included, to a repository, which is made if need be.

        Returns the commit's address. Raises ValueError, in one line, for a hub that cannot be reached or refuses.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                done = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=directory,
                    revision=revision,
                    create_pr=create_pr,
                    commit_message=commit_message,
                )
            except (OSError, HfHubHTTPError, HFValidationError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"repo_id must be a repository of the Hugging Face hub to write to. Got {repo_id} ({reason:.120})."
                ) from error
        return str(done.commit_url)


def _kept(rows: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions of [B, T, d] that logits are wanted of: the last ones (0 for all), or those of an index [n]."""
    return rows[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else rows[:, logits_to_keep]
