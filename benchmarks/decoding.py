"""Decoding speed of one stream: tokens/s of a model with an adapter, greedy, after a prompt of a few tokens.

    python benchmarks/decoding.py                      # this tree, the built-in model
    python benchmarks/decoding.py --before ../main     # beside another tree, in turn, so that both see the same machine
    python benchmarks/decoding.py --model qwen3        # 12 drawn layers of Qwen3-30B-A3B's widths, of 16 experts
    python benchmarks/decoding.py --device cuda --placement '{"streamed": 8}' --dtype bfloat16

Each tree is a process of its own that answers on a line; their turns alternate. Printed: tokens/s of the fastest turn
and of the median, and the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def work(options: argparse.Namespace) -> None:
    """Load the model, and generate as many tokens as each line of the standard input says."""
    import torch
    from peft import get_peft_model

    from kt_hf import KTConfig, apply_kt_moe, kt_lora_config
    from kt_hf.train.quiet import quiet_libraries

    quiet_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, ids = _drawn(options) if options.model == "qwen3" else _builtin(options)
    settings: dict[str, Any] = {"kt_backend": options.backend}
    if options.placement:
        settings["kt_expert_placement"] = json.loads(options.placement)
    model = apply_kt_moe(model, KTConfig(**settings))
    torch.manual_seed(1)
    model = get_peft_model(model, kt_lora_config(model, 8)).to(options.device).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros, which would hide what LoRA adds
            parameter.data.normal_(std=0.01)
    inputs = {"input_ids": torch.tensor([ids], device=options.device)}
    print("ready", flush=True)
    for line in sys.stdin:
        new = int(line)
        clock = Clock()
        with _as_chat(model):
            out = model.generate(
                **inputs, max_new_tokens=new + 1, min_new_tokens=new + 1, do_sample=False, streamer=clock
            )[0].tolist()
        print(json.dumps({"seconds": clock.times[-1] - clock.times[1], "ids": out}), flush=True)


@contextlib.contextmanager
def _as_chat(model: Any) -> Iterator[None]:
    """What `kt-hf chat` does around an answer, as far as a tree knows of it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from kt_hf.system.threads import torch_threads
            from kt_hf.use.generation import threads_beside

            stack.enter_context(torch_threads(threads_beside(model)))
        with contextlib.suppress(ImportError):
            from kt_hf.use.row_linears import row_linears

            stack.enter_context(row_linears(model))
        yield


class Clock:
    """A streamer that notes when the prompt and each new token came: the prompt's forward is no decoding."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        """A token has come; the first is the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _builtin(options: argparse.Namespace) -> tuple[Any, list[int]]:
    from kt_hf.builtin.smollm2_moe import default_dtype, upcycle

    model, tokenizer = upcycle(num_layers=options.layers or 30, dtype=default_dtype(options.dtype))
    return model, tokenizer("Python is a language that")["input_ids"]


def _drawn(options: argparse.Namespace) -> tuple[Any, list[int]]:
    """Layers of Qwen3-30B-A3B's widths and top-8, with random weights, and a prompt of random tokens."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from kt_hf.builtin.smollm2_moe import default_dtype

    config = Qwen3MoeConfig(
        vocab_size=32_000, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=options.layers or 12,
        num_experts=16, num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        norm_topk_prob=True, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=default_dtype(options.dtype))
    return model, torch.randint(32_000, (8,)).tolist()


class Tree:
    """The benchmark in a process of its own, on the package of one source tree."""

    def __init__(self, root: Path, arguments: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--work"]
        environment = os.environ | {"PYTHONPATH": str(root)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )
        assert self._read() == "ready"
        self.rates: list[float] = []

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def turn(self, tokens: int) -> list[int]:
        """Generate, note the rate, and return the token ids."""
        assert self._process.stdin
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        answer = json.loads(self._read())
        self.rates.append(tokens / answer["seconds"])
        ids: list[int] = answer["ids"]
        return ids

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Compare the trees, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="root of a source tree to compare with")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where all but the experts runs")
    parser.add_argument("--backend", default="auto", help="kt_backend")
    parser.add_argument("--placement", help="kt_expert_placement, as JSON")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--model", choices=("builtin", "qwen3"), default="builtin")
    parser.add_argument("--layers", type=int, default=0, help="0: 30 of the built-in model, 12 of qwen3")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0 leaves its own number")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options)
    arguments = [argument for argument in sys.argv[1:] if argument != "--work"]
    roots = {"this": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    trees = {name: Tree(root, arguments) for name, root in roots.items()}
    differ = False
    for turn in range(options.turns + 1):
        answers = [tree.turn(4 if turn == 0 else options.tokens) for tree in trees.values()]  # the first warms up
        differ |= any(answer != answers[0] for answer in answers)
    for name, tree in trees.items():
        rates = tree.rates[1:]
        print(f"{name}: at most {max(rates):.2f} tokens/s, median {statistics.median(rates):.2f}")
        tree.close()
    if options.before:
        best, median = (f(trees["this"].rates[1:]) / f(trees["before"].rates[1:]) for f in (max, statistics.median))
        print(f"ratio: {best:.2f} of the fastest turns, {median:.2f} of the medians")
        print("the trees' tokens are " + ("not the same (a tie in bf16, or a fault)" if differ else "the same"))


if __name__ == "__main__":
    main()
