"""The model card of an export: README.md, with what the run's summary says."""

from collections.abc import Mapping
from typing import Any


def model_card(config: Any) -> str:
    """Markdown of a LoopedPretrainedConfig whose `run` is not empty."""
    run, n_prelude, n_coda = config.run, config.n_prelude, config.n_coda
    name = run.get("name", "A looped language model")
    around = f", with {n_prelude} blocks before and {n_coda} after" if n_prelude + n_coda else ""
    known = "\n".join([*_facts(run), *_evaluation(run.get("evaluation", []))])
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- looped
- recurrent-depth
---

# {name}

A looped language model: a stack of {config.n_layers} blocks (d = {config.d_model}), applied K = {config.n_loops} \
times to its own output{around}. The readout of each state is {config.readout}.

{known}
## Loading it

With `pip install 'looped-lm[hf]'`:

```python
from looped.transformers import register
from transformers import AutoModelForCausalLM, AutoTokenizer

register()
model = AutoModelForCausalLM.from_pretrained("DIRECTORY_OR_REPOSITORY", depth={config.n_loops})  # K
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY_OR_REPOSITORY")
```
"""


def _facts(run: Mapping[str, Any]) -> list[str]:
    """One line for each thing that is known."""
    names = {
        "parameters": "parameters",
        "data": "trained on",
        "steps": "optimisation steps",
        "tokens": "tokens seen",
        "supervision": "supervision",
        "penalty": "norm penalty",
        "commit": "commit of the code",
        "weights": "BLAKE2b of the run's weights",
    }
    known = [(said, run[name]) for name, said in names.items() if run.get(name) is not None]
    return [f"- {said}: {value:,}" if isinstance(value, int) else f"- {said}: {value}" for said, value in known] + [""]


def _evaluation(rows: Any) -> list[str]:
    """The table over K, as the run's summary has it, which may be any JSON. Raises ValueError where it is no table."""
    if not rows:
        return []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"evaluation of a run must be a list of objects, one for each K. Got {rows!r:.60}.")
    columns = {
        "n_loops": "K",
        "ce": "CE (nats)",
        "ppl": "perplexity",
        "bits_per_byte": "bits/byte",
        "state_norm": "norm of H_K",
    }
    shown = [name for name in columns if rows[0].get(name) is not None]
    table = [[columns[name] for name in shown], ["---"] * len(shown)]
    for row in rows:
        if not all(isinstance(row.get(name), int | float) for name in shown):
            raise ValueError(f"evaluation of a run must have a number for each of {', '.join(shown)}. Got {row!r:.60}.")
        table.append([f"{row[name]:.5g}" for name in shown])
    return [
        "## Evaluation",
        "",
        "On the validation split of its run, when training ended:",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
    ]
