"""`BaseRef`: one value for the family, the label and the fingerprint of a base version."""

import pytest

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseRef, BaseVersion
from trans_peft.errors import InvalidSpecError

SHA256 = "0123456789abcdef" * 4


def test_a_ready_version_has_a_reference_and_any_other_version_has_none():
    ready = BaseVersion("smol", "v2", "s3://bases/smol/v2", 2, SHA256, ready=True)
    assert ready.ref == BaseRef("smol", "v2", SHA256)
    assert (str(ready.ref), ready.ref.alias) == ("smol/v2", "on-0123456789ab")
    waiting = BaseVersion("smol", "v3", "s3://bases/smol/v3", 3)
    with pytest.raises(InvalidSpecError, match="base version smol/v3 has no fingerprint"):
        _ = waiting.ref


def test_an_adapter_version_is_trained_if_its_two_bases_have_the_same_fingerprint():
    v1, v2 = BaseRef("smol", "v1", "1" * 64), BaseRef("smol", "v2", "2" * 64)
    renamed = BaseRef("smol", "v1-again", "1" * 64)

    def is_trained(base: BaseRef) -> bool:
        return AdapterVersion("chat", 1, base, v1, "w", "LORA", ()).is_trained

    assert (is_trained(v1), is_trained(renamed), is_trained(v2)) == (True, True, False)


def test_an_adapter_version_cannot_combine_bases_of_two_families():
    smol, other = BaseRef("smol", "v1", SHA256), BaseRef("other", "v1", SHA256)
    with pytest.raises(InvalidSpecError, match="chat version 1 is bound to a base of another"):
        AdapterVersion("chat", 1, other, smol, "w", "LORA", ())
