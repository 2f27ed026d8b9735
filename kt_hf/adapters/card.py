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

```bash
kt-hf chat ADAPTER --base BASE_MODEL  # ADAPTER is the folder of this file; without --base it is `{base}`
```

```python
from transformers import AutoModelForCausalLM
from kt_hf import KTConfig, apply_kt_moe

model = AutoModelForCausalLM.from_pretrained("{base}", dtype="bfloat16")
model = apply_kt_moe(model, KTConfig(kt_backend="auto"), adapter="ADAPTER")  # the folder of this file
```

To use it without kt_hf, make it an adapter of stock PEFT, or merge it into the base model:

```bash
kt-hf export ADAPTER OUTPUT --to peft
kt-hf export ADAPTER OUTPUT --to merged --base BASE_MODEL_FOLDER
```

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "OUTPUT")  # of --to peft
```
"""


def write_card(folder: Path, adapter: Adapter) -> None:
    """Put the section into the README.md that PEFT has written, in the place of an earlier one.

    Nothing is written for an adapter without LoRA of experts, which stock PEFT loads whole.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = _SECTION.sub("\n", text)
    if adapter.experts:
        base = adapter.config.get("base_model_name_or_path") or "BASE_MODEL"
        section = _TEXT.format(base=base, trained=_trained(adapter), share=_share(adapter))
        text = f"{text.rstrip()}\n\n{_BEGIN}\n{section}\n{_END}\n".lstrip()
    elif not path.is_file():
        return
    path.write_text(text, encoding="utf-8")


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
