"""The section of the fleet report about the changes of one run."""

from tasks.reporting import MAX_LISTED, changes_markdown, limited, obstacle_text
from trans_peft.domain.adapter import ManualOverride
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.fleet import (
    AliasChange,
    ChampionNotReady,
    FleetChanges,
    ObservedOverride,
    VerdictsMissing,
)

V2 = BaseVersion("small", "v2", "memory://v2", 2, "2" * 64, ready=True)


def test_without_changes_the_section_has_one_line():
    assert changes_markdown(FleetChanges()) == "## Changes\n\n- none"
    assert obstacle_text(FleetChanges()) == ""


def test_aliases_overrides_and_the_promotion_are_listed():
    override = ManualOverride(None, 2, "passed", "2026-11-24T00:00:00+00:00")
    changes = FleetChanges(
        aliases=(AliasChange("chat", V2.alias, 2), AliasChange("code", V2.alias, None)),
        manual_overrides=(ObservedOverride("tone", V2.ref, override),),
        promoted=V2,
    )
    assert changes_markdown(changes).splitlines()[2:] == [
        f"- chat: {V2.alias} -> version 2",
        f"- code: {V2.alias} -> none",
        f"- manual override kept: tone on small/v2: {override}",
        "- **serving moved to small/v2**",
    ]


def test_an_obstacle_is_indented_below_its_line():
    waiting = changes_markdown(FleetChanges(obstacle=VerdictsMissing(V2, ("chat", "code"))))
    assert waiting.endswith("- **serving did not move**: small/v2 waits for 2 verdicts: chat, code")
    refused = changes_markdown(FleetChanges(obstacle=ChampionNotReady("small", 3)))
    assert "- **promotion refused**: champion is set on version 3 of small" in refused
    assert "\n    expected: a version that ingestion made ready\n" in refused


def test_long_lists_end_with_the_number_of_others():
    aliases = tuple(AliasChange(f"a{i}", V2.alias, 2) for i in range(MAX_LISTED + 7))
    lines = changes_markdown(FleetChanges(aliases=aliases, promoted=V2)).splitlines()
    assert len(lines) == MAX_LISTED + 4
    assert lines[-2:] == ["- and 7 more", "- **serving moved to small/v2**"]
    assert limited(map(str, range(MAX_LISTED))) == [*map(str, range(MAX_LISTED))]
