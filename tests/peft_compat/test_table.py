"""The table of what kt_hf replaces in PEFT and transformers."""

from __future__ import annotations

import importlib.util

import pytest

from kt_hf.errors import KTAMXNotAvailableError
from kt_hf.peft_compat.patches import PATCHES, Patch, _wrapper


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.owner}.{patch.name}")
def test_each_is_in_place_once(patch: Patch) -> None:
    if importlib.util.find_spec(patch.package) is None:
        assert patch.optional
        pytest.skip(f"{patch.package} is not installed")
    if not patch.needed:
        pytest.skip(f"not needed from {patch.package} {patch.until}")
    function = getattr(patch.resolve(), patch.name)
    assert getattr(function, "_kt_hf", False)
    assert not getattr(function.__wrapped__, "_kt_hf", False)
    assert patch.why
    assert callable(_wrapper(patch.wrapper))  # none is mistyped


def test_none_is_listed_twice() -> None:
    assert len({(patch.owner, patch.name) for patch in PATCHES}) == len(PATCHES)


@pytest.mark.parametrize(
    ("owner", "name"), [("peft.PeftModel", "saved_pretrained"), ("peft.utils.gone", "f"), ("peft.GoneModel", "f")]
)
def test_a_function_that_is_gone_is_named_with_versions(owner: str, name: str) -> None:
    with pytest.raises(KTAMXNotAvailableError, match=rf"{owner}.{name} \(drops\), which peft \d.* pip install"):
        Patch(owner, name, "checks.refuse_merge", "drops", "0.21").resolve()
