"""The section of an adapter's README.md that says what it is: stock PEFT loads a part of it without a word."""

from __future__ import annotations

import re
from pathlib import Path

from .adapter import Adapter

CARD = "README.md"
_BEGIN, _END = "<!-- kt_hf: how to load this adapter -->", "<!-- /kt_hf -->"
_SECTION = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)
_TEXT = """
## How to load this adapter

This is a LoRA adapter of `{base}`, trained with kt_hf: {trained}.

**It needs kt_hf**: the LoRA of the routed experts is stored as one stack a projection, for which stock PEFT and
transformers have no place. They load the LoRA of the other layers alone and leave out {share:.0%} of the adapter,
without an error.

{chat}```python
from kt_hf import KTConfig, apply_kt_moe
{model}
model = apply_kt_moe(model, KTConfig(kt_backend="auto"), adapter="ADAPTER")  # the folder of this file
```

To use it without kt_hf, make it an adapter of stock PEFT{or_merged}:

```bash
kt-hf export ADAPTER OUTPUT --to peft
{merge}```

```python
from peft import PeftModel
{model}
model = PeftModel.from_pretrained(model, "OUTPUT")  # of --to peft
```
"""
_CHAT = """```bash
kt-hf chat ADAPTER --base BASE_MODEL  # ADAPTER is the folder of this file; without --base it is `{base}`
```

"""
_MERGE = "kt-hf export ADAPTER OUTPUT --to merged --base BASE_MODEL_FOLDER\n"
_BUILTIN = "builtin:"


def write_card(folder: Path, adapter: Adapter) -> None:
    """Put the section into the README.md that PEFT has written, in the place of an earlier one.

    Nothing is written for an adapter without LoRA of experts, which stock PEFT loads whole.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = _SECTION.sub("\n", text)
    if adapter.experts:
        base = adapter.config.get("base_model_name_or_path") or "BASE_MODEL"
        scores = adapter.config.get("task_type") == "SEQ_CLS"
        merges = not scores and not base.startswith(_BUILTIN)
        section = _TEXT.format(
            base=base,
            trained=_trained(adapter),
            share=_share(adapter),
            chat="" if scores else _CHAT.format(base=base),
            model="\n".join(_model(base, scores)),
            or_merged=", or merge it into the base model" if merges else "",
            merge=_MERGE if merges else "",
        )
        text = f"{text.rstrip()}\n\n{_BEGIN}\n{section}\n{_END}\n".lstrip()
    elif not path.is_file():
        return
    path.write_text(text, encoding="utf-8")


def _model(base: str, scores: bool) -> list[str]:
    """The lines that make `model`, the base model, with a score head for a reward model's adapter."""
    if base.startswith(_BUILTIN):
        _, _, layers = base.partition("/")
        some = f"num_layers={layers}, " if layers else ""
        lines = ["from kt_hf.builtin.smollm2_moe import upcycle"]
        lines += ["from kt_hf.train.reward_model import with_score_head"] if scores else []
        lines += ["", f'model, tokenizer = upcycle({some}dtype="bfloat16")']
        return lines + (["model = with_score_head(model)"] if scores else [])
    auto, more = ("AutoModelForSequenceClassification", ", num_labels=1") if scores else ("AutoModelForCausalLM", "")
    return [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{base}"{more}, dtype="bfloat16")']


def _trained(adapter: Adapter) -> str:
    """What the adapter has LoRA on, in words."""
    ranks = sorted({one.rank for one in adapter.experts.values()})
    shown = " to ".join(map(str, sorted({ranks[0], ranks[-1]})))
    names = ", ".join(sorted({one.name for one in adapter.experts.values()}))
    others = sorted({name.rpartition(".")[2] for name in adapter.modules()})
    text = f"LoRA of rank {shown} on {names} of the routed experts of {len(adapter.layers())} layers"
    return text + (f", and on {', '.join(others)}" if others else "")


def _share(adapter: Adapter) -> float:
    """Of the adapter's numbers, those that are of experts."""
    sizes = {True: 0, False: 0}
    for key, tensor in adapter.tensors():
        count = 1
        for length in tensor.shape:
            count *= length
        sizes[".experts." in key] += count
    return sizes[True] / max(sum(sizes.values()), 1)
