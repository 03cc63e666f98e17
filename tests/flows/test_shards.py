"""How work is cut into shards, and who is charged when a shard's process dies."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tasks.shards import Ended, cut, in_flight
from trans_peft.domain.outcome import Plan, Reason, Work

WORK = st.lists(
    st.builds(
        Work,
        adapter=st.text("abc", min_size=1, max_size=3),
        source_number=st.just(1),
        base_version=st.sampled_from(["v2", "v3"]),
        reason=st.just(Reason.NEVER_JUDGED),
    ),
    unique=True,
    max_size=20,
)


@given(WORK, st.integers(1, 5))
def test_a_cut_keeps_all_work_once_on_one_base_a_shard(work, size):
    shards = cut(work, size)
    assert sorted(map(str, (item for shard in shards for item in shard))) == sorted(map(str, work))
    assert all(1 <= len(shard) <= size for shard in shards)
    assert all(len({item.base_version for item in shard}) == 1 for shard in shards)


@given(WORK.filter(len), st.data())
def test_only_the_work_under_way_in_a_crashed_shard_is_charged(work, data):
    shard = cut(work, len(work))[0]
    done = data.draw(st.integers(0, len(shard)))
    left = Plan("small", work=shard[done:])
    crashed = Ended("shard", shard, "Crashed", never_ran=False, cancelled=False, crashed=True)
    assert in_flight([crashed], left) == shard[done : done + 1]
    assert in_flight([replace(crashed, crashed=False)], left) == ()
