"""What real adapters answered, marked by us and by each suite's peer.

`outputs/<suite>.jsonl` holds outputs as `{"id", "output", "reference"}`, malformed ones included,
with the "sanitized" program of evalplus where the suite is one of programs.
"""

import json
from pathlib import Path

import pytest

from tests.validation.peers import PEERS, disagreements
from trans_peft.validation.scoring import marker
from trans_peft.validation.suites import PUBLISHED, named

FILES = sorted((Path(__file__).parent / "outputs").glob("*.jsonl"))


def test_every_suite_has_a_peer():
    assert PEERS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_real_outputs_are_marked_as_the_peer_marks_them(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) >= 200
    assert disagreements(file.stem, marker(named(file.stem)), rows) == []
