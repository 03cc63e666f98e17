import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trans_peft.validation.decoding.drafts import Draft, DraftAcceptance, common_length

TEXT = list(range(100, 140))
TOKENS = st.lists(st.integers(0, 5), max_size=40)


@pytest.mark.parametrize(
    ("said", "next_"),
    [
        ([], 100),  # nothing is known: from the start
        ([100, 101], 102),  # as drafted
        ([100, 101, 102, 103, 7], 105),  # another token instead of one
        ([100, 101, 102, 103, 106], 107),  # two tokens less
        ([100, 101, 102, 103, 7, 104], 105),  # one token more
        ([100, 101, 102, 103, 7, 104, 105], 106),
        ([7, 8, 9, 10, 103], None),  # not believed before a token agrees by itself
        ([7, 8, 9, 10, 103, 104], 105),
        (TEXT, None),  # at its end
        ([*TEXT, 7, 8], None),
    ],
)
def test_a_draft_is_followed(said, next_):
    draft = Draft(TEXT, first=16)
    draft.observe(said)
    assert draft.proposal()[:1] == ([] if next_ is None else [next_])


def test_the_length_of_proposals_follows_recent_agreement():
    draft, lengths = Draft(TEXT, first=0), []
    for _ in range(5):
        said = [*draft.proposal(), None]
        said[-1] = TEXT[TEXT.index(said[-2]) + 1] if len(said) > 1 else TEXT[len(lengths)]
        draft.observe(said)
        lengths.append(len(draft.proposal()))
    assert lengths == [1, 3, 7, 15, 9]  # the rest of the text
    draft = Draft(TEXT, first=16)
    draft.observe([*TEXT[:12], 7])
    assert len(draft.proposal()) == 6


@given(TOKENS, TOKENS, st.integers(0, 16))
def test_rejected_tokens_are_bounded_by_accepted_tokens(tokens, answer, first):
    draft, at, wasted, right = Draft(tokens, first), 0, 0, 0
    while at < len(answer):
        proposal = draft.proposal()
        agreed = 0
        while agreed < len(proposal) and answer[at + agreed : at + agreed + 1] == [
            proposal[agreed]
        ]:
            agreed += 1
        if at + agreed < len(answer):
            wasted += len(proposal) - agreed
        said = answer[at : at + agreed + 1]
        draft.observe(said)
        at += len(said)
        right += len(said)
    assert wasted <= first + 2 * right


@given(TOKENS, st.integers(0, 40))
def test_the_agreed_prefix_is_the_common_prefix_of_two_texts(tokens, other):
    draft = Draft([*tokens, 9], first=4)
    draft.observe([*tokens[:other], 8])
    assert draft.agreed_prefix == min(other, len(tokens))
    draft.observe(tokens)
    assert draft.agreed_prefix == min(other, len(tokens))


@pytest.mark.parametrize("said", [[], TEXT[:5], TEXT, [*TEXT, 7]])
def test_the_agreed_prefix_of_a_correct_draft_is_infinite(said):
    draft = Draft(TEXT, first=4)
    draft.observe(said)
    assert draft.agreed_prefix == math.inf


def learned(*leads, rows=32):
    trust, drafts = DraftAcceptance(), [Draft(TEXT, first=4) for _ in leads]
    for draft, lead in zip(drafts, leads, strict=True):
        draft.observe(TEXT if lead == math.inf else [*TEXT[:lead], 7])
    trust.record(drafts)
    return trust.first(rows)


@pytest.mark.parametrize(
    ("leads", "first"),
    [
        ([], 8),
        ([0], 8),  # one answer proves little
        ([0] * 3, 0),
        ([3] * 5, 3),
        ([0] * 10 + [5] * 16, 5),
        ([0] * 16 + [5] * 10, 0),
    ],
)
def test_in_a_large_batch_half_of_the_answers_decide_the_first_proposal(leads, first):
    assert learned(*leads) == first


@pytest.mark.parametrize(("rows", "first"), [(1, 30), (4, 30), (8, 9), (16, 3), (32, 0), (99, 0)])
def test_the_smaller_a_batch_the_less_a_wrong_draft_costs(rows, first):
    assert learned(*[30] * 10, *[9] * 10, *[3] * 10, *[0] * 33, rows=rows) == first


def test_correct_drafts_are_proposed_as_a_whole():
    assert learned(*[math.inf] * 20, *[0] * 5) > 10**6


def test_empty_drafts_are_ignored():
    trust = DraftAcceptance()
    trust.record([Draft([], first=16)] * 100)
    assert trust.first(32) == 8


@pytest.mark.parametrize(
    ("lengths", "unread", "common"),
    [
        ([5], 1, 5),
        ([0, 0, 0], 90, 0),
        ([3, 4, 5, 5], 4, 5),
        ([16, 0], 2, 16),
        ([16, 0, 0], 3, 0),
        ([3] * 31 + [20], 32, 6),
        ([0, 1, 2, 40], 4, 3),
        ([1] * 20 + [4] * 2, 22, 2),
        ([1] * 20 + [4] * 2, 440, 4),  # padding is small compared with long prompts
    ],
)
def test_a_batch_checks_no_more_padding_than_tokens(lengths, unread, common):
    assert common_length(lengths, unread) == common


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(0, 99))
def test_the_common_length_is_the_largest_that_is_half_full(lengths, unread):
    def half_full(n):
        return 2 * sum(min(own, n) for own in lengths) + unread // 8 >= n * len(lengths)

    common = common_length(lengths, unread)
    assert half_full(common)
    assert not any(half_full(n) for n in range(common + 1, max(lengths) + 1))
