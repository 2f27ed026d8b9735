"""What kt_hf relies on in the INT8 and INT4 operators, beside what test_contract.py has of all.

Numbers in names are those of the rules in docs/kernel-contract.md.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.cases import KERNEL_MARKS
from tests.support.contract_operator import Operator, error

pytestmark = list(KERNEL_MARKS)

KINDS = pytest.mark.parametrize("kind", ["Int8", "Int4"])
LIMIT = {"Int8": 0.03, "Int4": 0.35}
SIZES = {"H": 128, "inner": 256}
_keys = itertools.count(200_000)


def run(op: Operator, batch: tuple[Tensor, ...], clear: bool = True) -> list[Tensor]:
    """Output, grad_input, grad_weights and the six LoRA gradients."""
    for tensor in op.grads if clear else ():
        tensor.zero_()
    out = op.forward(*batch[:3])
    grad_input, grad_weights, lora = op.backward(batch[3])
    return [out, grad_input, grad_weights, *(t.clone() for t in lora)]


def worst(found: list[Tensor], op: Operator, batch: tuple[Tensor, ...]) -> float:
    out, grad_input, grad_weights, lora = op.reference(*batch)
    return max(error(a, b) for a, b in zip(found, [out, grad_input, grad_weights, *lora], strict=True))


@KINDS
@pytest.mark.parametrize("rank", [0, 8, 64])
def test_numbers_against_the_original_weights(kind: str, rank: int) -> None:
    op = Operator(kind=kind, rank=rank, **SIZES)
    batch = op.batch(64)
    found = run(op, batch)
    assert error(found[0], op.reference(*batch)[0]) < LIMIT[kind]
    assert worst(found, op, batch) < LIMIT[kind]


@pytest.mark.parametrize(
    ("kind", "sizes"), [("Int8", {"H": 96, "inner": 64}), ("Int8", {"H": 64, "inner": 96}),
                        ("Int4", {"H": 64, "inner": 128}), ("Int4", {"H": 128, "inner": 64})]
)  # fmt: skip
def test_rule_1_multiples_raise(kind: str, sizes: dict[str, int]) -> None:
    with pytest.raises(RuntimeError):
        Operator(kind=kind, **sizes)


@KINDS
def test_rule_3_max_len_is_a_multiple_of_32(kind: str) -> None:
    Operator(kind=kind, max_len=32, **SIZES)
    with pytest.raises(RuntimeError, match="multiple of M_STEP"):
        Operator(kind=kind, max_len=33, **SIZES)


def test_rule_11_int8_overwrites_every_gradient() -> None:
    op = Operator(kind="Int8", **SIZES)
    batch = op.batch(32, experts=range(0, 4))
    for tensor in op.grads:
        tensor.fill_(7.0)
    assert worst(run(op, batch, clear=False), op, batch) < LIMIT["Int8"]
    assert not any(tensor[4:].any() for tensor in op.grads)


def test_rule_11_int4_adds_to_some_and_wants_zeros() -> None:
    op = Operator(kind="Int4", **SIZES)
    batch = op.batch(32)
    first = run(op, batch)
    again = run(op, batch, clear=False)
    changed = [not torch.equal(a, b) for a, b in zip(first[3:], again[3:], strict=True)]
    assert any(changed), "every buffer is overwritten now: they need not be cleared"
    assert all(torch.equal(a, b) for a, b in zip(first, run(op, batch), strict=True))


@KINDS
def test_rule_14_base_weights_may_go(kind: str) -> None:
    op = Operator(kind=kind, **SIZES)
    batch = op.batch(16)
    before = run(op, batch)
    for tensor in (op.gate, op.up, op.down):
        tensor.fill_(9.0)
    assert all(torch.equal(a, b) for a, b in zip(before, run(op, batch), strict=True))


@KINDS
def test_backward_weights_that_are_shared_are_made_of_the_packed_ones(kind: str) -> None:
    """So gradients differ a little from those with weights of their own, and output does not."""
    own, shared = (Operator(kind=kind, share_backward_bb=share, **SIZES) for share in (False, True))
    batch = own.batch(64)
    a, b = run(own, batch), run(shared, batch)
    assert torch.equal(a[0], b[0])
    assert error(a[1], b[1]) < LIMIT[kind]
    assert worst(b, shared, batch) < LIMIT[kind]


def saved(folder: Path, kind: str, share: bool) -> tuple[Operator, Path]:
    """An operator that saved its weights, and the folder of the layer."""
    key = next(_keys)
    op = Operator(kind=kind, save=True, path=str(folder), layer_idx=key, share_backward_bb=share, E=2, K=1, **SIZES)
    return op, folder / f"_layer_{key}"


def loaded(layer: Path, place: Path, kind: str, share: bool) -> Operator:
    """An operator of another key, that finds the layer's folder by a link."""
    key = next(_keys)
    place.mkdir()
    (place / f"_layer_{key}").symlink_to(layer)
    return Operator(
        kind=kind, saved=True, path=str(place), layer_idx=key, share_backward_bb=share, E=2, K=1, **SIZES
    )  # fmt: skip


@KINDS
@pytest.mark.parametrize(("written", "share"), [("with", False), ("with", True), ("without", True)])
def test_saved_weights_are_the_online_ones_to_the_bit(kind: str, written: str, share: bool, tmp_path: Path) -> None:
    """Whatever else was written: shared backward weights are always made of the forward ones."""
    op, layer = saved(tmp_path, kind, share=written == "without")
    if share and written == "with":
        op = Operator(kind=kind, share_backward_bb=True, E=2, K=1, **SIZES)
    batch = op.batch(64)
    other = loaded(layer, tmp_path / "again", kind, share)
    assert all(torch.equal(a, b) for a, b in zip(run(op, batch), run(other, batch), strict=True))


@KINDS
def test_without_saved_backward_weights_gradients_are_wrong_unless_shared(kind: str, tmp_path: Path) -> None:
    op, layer = saved(tmp_path, kind, share=True)
    batch = op.batch(64)
    found = run(loaded(layer, tmp_path / "again", kind, share=False), batch)
    wrong = error(found[1], op.reference(*batch)[1])
    assert not wrong < 0.5, "it is refused or repacked now: the check could go"


@pytest.mark.parametrize("what", ["missing", "short"])
def test_a_file_that_is_not_whole_raises(what: str, tmp_path: Path) -> None:
    _, layer = saved(tmp_path, "Int8", share=False)
    file = next(layer.rglob("INT8_up_1_*quant*"))
    file.unlink() if what == "missing" else file.write_bytes(b"short")
    with pytest.raises(RuntimeError, match=r"INT8_up_1_\d+Byte_quant_.kt"):
        loaded(layer, tmp_path / "again", "Int8", share=False)


@KINDS
def test_names_and_sizes_of_saved_files(kind: str, tmp_path: Path) -> None:
    _, layer = saved(tmp_path, kind, share=False)
    files = {file.relative_to(layer).as_posix(): file.stat().st_size for file in layer.rglob("*.kt")}
    packed = 128 * 256 // (1 if kind == "Int8" else 2)
    wide, narrow = 256 * 4, 128 * 4  # scales in fp32, one an output row
    wanted = {}
    for name, rows in (("gate", wide), ("up", wide), ("down", narrow)):
        for expert in (0, 1):
            back = narrow if rows == wide else wide
            for part, scale in ((name, rows), (f"{name}_bwd", back)):
                start = f"_numa_0/{kind.upper()}_{part}_{expert}"
                wanted[f"{start}_{packed}Byte_quant_.kt"] = packed
                wanted[f"{start}_{scale}Byte_scale_.kt"] = scale
    assert files == wanted
