"""Names of families with rules, in every combination of upper and lower case."""

import pytest

from trans_peft.domain.owners import FamilyRule, Owners
from trans_peft.errors import InvalidSpecError

ROOT = "s3://bases"
RULE = FamilyRule(key="/etc/smol.pem")


@pytest.mark.parametrize("other", ["SMOL", "Smol", "smoL"])
def test_rules_of_names_that_differ_in_case_alone_are_refused(other):
    with pytest.raises(InvalidSpecError, match="differ in upper and lower case alone"):
        Owners(ROOT, {"smol": RULE, other: FamilyRule()})


@pytest.mark.parametrize("name", ["SMOL", "Smol", "smoL"])
@pytest.mark.parametrize("rule", [RULE, FamilyRule(prefixes=("s3://team/smol/",))])
@pytest.mark.parametrize("root", [ROOT, ""])
def test_a_family_whose_name_differs_from_a_ruled_one_in_case_alone_is_refused(name, rule, root):
    owners = Owners(root, {"smol": rule})
    for uri in (f"s3://bases/{name}/v1", "s3://bases/smol/v1", "s3://team/smol/v1"):
        assert owners.objection(name, uri) == (
            "its name differs from that of smol in upper and lower case alone"
        )
    assert owners.key(name) == rule.key
    assert owners.prefixes(name) == owners.prefixes("smol")


def test_other_families_follow_the_default_rule():
    owners = Owners(ROOT, {"smol": RULE})
    assert owners.objection("smol2", f"{ROOT}/smol2/v1") is None
    assert owners.key("smol2") == ""
    assert owners.objection("smol", f"{ROOT}/smol/v1") is None
    assert owners.key("smol") == RULE.key
