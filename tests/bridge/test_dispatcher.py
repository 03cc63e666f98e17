import asyncio

import pytest

from infra.bridge.dispatcher import (
    Dispatcher,
    DispatchOutcome,
    DispatchResult,
    Run,
    SingleFlight,
    UnavailableError,
)
from infra.bridge.notifications import Notification, NotificationKind
from tests.bridge.fakes import FakePrefect, FakeRegistry


def champion(name, delivery_id):
    return Notification(NotificationKind.CHAMPION, name, delivery_id, "champion")


def answers(dispatcher, notifications):
    async def ask():
        return await asyncio.gather(
            *(dispatcher.answer(notification) for notification in notifications)
        )

    return asyncio.run(ask())


def test_a_hint_starts_one_run_of_its_family_under_its_delivery_id():
    prefect = FakePrefect()
    dispatcher = Dispatcher(FakeRegistry({"smol": "smol"}), prefect)
    assert answers(dispatcher, [champion("smol", "d1")]) == [
        DispatchResult(DispatchOutcome.STARTED, "run-1")
    ]
    assert prefect.asked == [("smol", "d1")]


def test_a_name_that_is_no_base_and_no_adapter_starts_nothing():
    prefect = FakePrefect()
    dispatcher = Dispatcher(FakeRegistry({}), prefect)
    assert answers(dispatcher, [champion("theirs", "d1")]) == [
        DispatchResult(DispatchOutcome.IGNORED)
    ]
    assert prefect.asked == []


def test_an_adapter_s_hint_is_for_its_family():
    prefect = FakePrefect()
    dispatcher = Dispatcher(FakeRegistry({"faq": "smol"}), prefect)
    answers(dispatcher, [Notification(NotificationKind.APPROVAL, "faq", "d1", "on-0123456789ab")])
    assert prefect.asked == [("smol", "d1")]


@pytest.mark.parametrize("kind", [NotificationKind.UPLOAD, NotificationKind.START_UP])
def test_an_upload_is_for_every_family_and_nobody_is_asked(kind):
    prefect = FakePrefect()
    dispatcher = Dispatcher(FakeRegistry(None), prefect)
    answers(dispatcher, [Notification(kind, "s3://bases/smol/v1", "d1")])
    assert prefect.asked == [(None, "d1")]


def test_a_thousand_hints_at_once_are_a_few_calls_and_every_one_is_answered():
    prefect = FakePrefect()
    registry = FakeRegistry({"a": "a", "b": "b"})
    notifications = [champion("ab"[n % 2], f"d{n}") for n in range(1000)]
    found = answers(Dispatcher(registry, prefect), notifications)
    assert prefect.calls <= 3
    assert len(registry.asked) <= 4
    assert {answer.run_id for answer in found} == {"run-1", "run-2"}
    assert {answer.outcome for answer in found} == {
        DispatchOutcome.STARTED,
        DispatchOutcome.WAITING,
    }


def test_families_that_ask_at_once_share_a_call():
    prefect = FakePrefect()
    names = [f"f{n}" for n in range(50)]
    dispatcher = Dispatcher(FakeRegistry({name: name for name in names}), prefect)
    found = answers(dispatcher, [champion(name, f"d-{name}") for name in names])
    assert len({answer.run_id for answer in found}) == 50
    assert prefect.calls <= 20  # six threads ask the registry


def test_a_hint_that_comes_while_a_call_is_at_work_is_not_answered_by_it():
    """Its run may have read the registry before: what the call found is as old as the call."""

    async def story():
        prefect = FakePrefect(delay_s=0.05)
        dispatcher = Dispatcher(FakeRegistry({"smol": "smol"}), prefect)
        first = asyncio.create_task(dispatcher.answer(champion("smol", "d1")))
        await asyncio.sleep(0.03)
        prefect.waiting = _Forgetful()  # whatever is made from now on begins at once
        second = asyncio.create_task(dispatcher.answer(champion("smol", "d2")))
        assert await first == DispatchResult(DispatchOutcome.STARTED, "run-1")
        assert await second == DispatchResult(DispatchOutcome.STARTED, "run-2")
        assert prefect.calls == 2

    asyncio.run(story())


class _Forgetful(dict):
    def __setitem__(self, key, value):
        pass


def test_a_run_that_began_long_ago_answers_its_own_delivery_and_nobody_who_joined():
    """The first of those who share a call may be the replay of an old delivery."""
    prefect = FakePrefect(runs={"d1": Run("run-0", "d1", begun=True)})
    dispatcher = Dispatcher(FakeRegistry({"smol": "smol"}), prefect)
    first, again, second = answers(
        dispatcher, [champion("smol", "d1"), champion("smol", "d1"), champion("smol", "d2")]
    )
    assert first == again == DispatchResult(DispatchOutcome.STARTED, "run-0")
    assert second == DispatchResult(DispatchOutcome.STARTED, "run-1")


@pytest.mark.parametrize("broken", ["registry", "prefect"])
def test_who_cannot_be_asked_is_unavailable_and_the_next_hint_finds_it_well_again(broken):
    registry, prefect = FakeRegistry({"smol": "smol"}), FakePrefect()
    dispatcher = Dispatcher(registry, prefect)
    ill = registry if broken == "registry" else prefect
    ill.broken = True
    with pytest.raises(UnavailableError):
        answers(dispatcher, [champion("smol", "d1")])
    ill.broken = False
    assert answers(dispatcher, [champion("smol", "d1")]) == [
        DispatchResult(DispatchOutcome.STARTED, "run-1")
    ]


def test_who_is_slow_is_unavailable_after_the_patience():
    prefect = FakePrefect(delay_s=5)
    dispatcher = Dispatcher(FakeRegistry({"smol": "smol"}), prefect, patience_s=0.05)
    with pytest.raises(UnavailableError, match=r"0\.05 s"):
        answers(dispatcher, [champion("smol", "d1")])
    assert asyncio.run(dispatcher.reachable()) is False


def test_who_comes_while_a_call_is_at_work_shares_the_next_one():
    async def story():
        shared, began, go_on = SingleFlight(), [], asyncio.Event()

        async def call(name):
            began.append(name)
            await go_on.wait()
            return name

        first = asyncio.create_task(shared.call("k", lambda: call("first")))
        await asyncio.sleep(0.01)
        others = [
            asyncio.create_task(shared.call("k", lambda n=n: call(f"next {n}"))) for n in range(3)
        ]
        await asyncio.sleep(0.01)
        assert began == ["first"]
        go_on.set()
        assert await first == ("first", True)
        assert [await other for other in others] == [
            ("next 0", True),
            ("next 0", False),
            ("next 0", False),
        ]
        assert began == ["first", "next 0"]
        assert shared._next == shared._last == {}

    asyncio.run(story())


def test_who_stops_waiting_stops_nobody_else():
    async def story():
        shared = SingleFlight()

        async def call():
            await asyncio.sleep(0.02)
            return "done"

        impatient = asyncio.create_task(shared.call("k", call))
        patient = asyncio.create_task(shared.call("k", call))
        await asyncio.sleep(0.005)
        impatient.cancel()
        assert await patient == ("done", False)

    asyncio.run(story())
