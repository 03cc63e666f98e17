"""Count the training rows that are suite items before training, and refuse verdicts above a limit.

An adapter that was trained on items of its suite repeats answers that it has seen. The old base and
the new one then agree on these items, and a loss on other questions does not show.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from trans_peft.data import Example, read_examples
from trans_peft.data.overlap import near_matches
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.evaluation import GatePolicy, Judgment, Suite, Verdict
from trans_peft.domain.leakage import SuiteLeakage
from trans_peft.ports import ArtifactStore

__all__ = ["count_leakage", "leakage_problem", "with_leakage"]


def count_leakage(
    rows: Sequence[Example], suites: Sequence[Suite], store: ArtifactStore
) -> tuple[SuiteLeakage, ...]:
    """Return for each suite how many training rows have nearly the prompt of an item.

    `rows` are all rows that the weights depend on, also those of validation.
    Near matches are those of `trans_peft.data.overlap`. Answers and system messages are not
    compared. A suite whose items have different answered questions before their own is left out: a
    row matches no such prompt. Raises what `read_examples` raises for a suite.
    """
    prompts = [row.prompt_text() for row in rows]
    found = []
    for suite in suites:
        items = read_examples(suite.data, store, limit=suite.limit)
        texts = [item.prompt_text() for item in items]
        if suite.harness is not None and suite.harness.num_fewshot and not _share_a_half(texts):
            continue
        matches = near_matches(prompts, texts)
        found.append(SuiteLeakage(suite.name, matches.texts, len(rows), matches.items, len(items)))
    return tuple(found)


def _share_a_half(texts: Sequence[str]) -> bool:
    """Return whether at least half of the shortest text is a beginning of all texts."""
    # Characters, not components of a path.
    shared = os.path.commonprefix(texts)  # noqa: RUF071
    return 2 * len(shared) >= min(map(len, texts))


def leakage_problem(policy: GatePolicy, source: AdapterVersion) -> str | None:
    """Return why the policy's limit refuses an adapter, None if it does not.

    The limit is about required suites. An adapter whose training rows were not counted, because it
    was adopted or trained before they were, is refused as well.
    """
    limit = policy.max_leakage_points
    if limit is None:
        return None
    counted = {found.suite: found for found in source.leakage}
    problems = []
    for name in policy.requires(suite.name for suite in source.suites):
        found = counted.get(name)
        if found is None:
            problems.append(f"{name}: the training rows were not compared with its items")
        elif found.points > limit:
            problems.append(str(found))
    return f"{'; '.join(problems)}, limit {limit:g} points" if problems else None


def with_leakage(judgment: Judgment, policy: GatePolicy, source: AdapterVersion) -> Judgment:
    """Return a judgment with the adapter's counts. `passed` is refused above the policy's limit."""
    judgment = replace(judgment, leakage=source.leakage)
    problem = leakage_problem(policy, source)
    if problem is None or judgment.verdict is not Verdict.PASSED:
        return judgment
    return replace(
        judgment,
        verdict=Verdict.INCONCLUSIVE,
        reason=f"training rows are items of the suite: {problem}; otherwise passed: "
        f"{judgment.reason}",
    )
