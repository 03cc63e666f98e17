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
            *(dispatcher.dispatch(notification) for notification in notifications)
        )

    return asyncio.run(ask())


def test_a_notification_starts_one_run_of_its_family_under_its_delivery_id():
    prefect = FakePrefect()
    dispatcher = Dispatcher(FakeRegistry({"smol": "smol"}), prefect)
    assert answers(dispatcher, [champion("smol", "d1")]) == [
        DispatchResult(DispatchOutcome.STARTED, "run-1")
    ]
    assert prefect.asked == [("smol", "d1")]


def test_another_model_starts_no_run():
    prefect = FakePrefect()
    dispatcher = Dispatcher(FakeRegistry({}), prefect)
    assert answers(dispatcher, [champion("theirs", "d1")]) == [
        DispatchResult(DispatchOutcome.IGNORED)
    ]
    assert prefect.asked == []


def test_a_notification_about_an_adapter_is_for_its_family():
    prefect = FakePrefect()
    dispatcher = Dispatcher(FakeRegistry({"faq": "smol"}), prefect)
    answers(dispatcher, [Notification(NotificationKind.APPROVAL, "faq", "d1", "on-0123456789ab")])
    assert prefect.asked == [("smol", "d1")]


@pytest.mark.parametrize("kind", [NotificationKind.UPLOAD, NotificationKind.START_UP])
def test_an_upload_is_for_all_families_without_a_look_up(kind):
    prefect = FakePrefect()
    dispatcher = Dispatcher(FakeRegistry(None), prefect)
    answers(dispatcher, [Notification(kind, "s3://bases/smol/v1", "d1")])
    assert prefect.asked == [(None, "d1")]


def test_a_thousand_concurrent_notifications_share_calls():
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


def test_concurrent_families_share_calls():
    prefect = FakePrefect()
    names = [f"f{n}" for n in range(50)]
    dispatcher = Dispatcher(FakeRegistry({name: name for name in names}), prefect)
    found = answers(dispatcher, [champion(name, f"d-{name}") for name in names])
    assert len({answer.run_id for answer in found}) == 50
    assert prefect.calls <= 20  # eight threads query the registry


def test_a_notification_during_a_call_waits_for_the_next_call():
    """The run of that call may have read the registry before the notification arrived."""

    async def scenario():
        prefect = FakePrefect(delay_s=0.05)
        dispatcher = Dispatcher(FakeRegistry({"smol": "smol"}), prefect)
        first = asyncio.create_task(dispatcher.dispatch(champion("smol", "d1")))
        await asyncio.sleep(0.03)
        prefect.waiting = _NoneWaiting()  # runs that are created from here on begin immediately
        second = asyncio.create_task(dispatcher.dispatch(champion("smol", "d2")))
        assert await first == DispatchResult(DispatchOutcome.STARTED, "run-1")
        assert await second == DispatchResult(DispatchOutcome.STARTED, "run-2")
        assert prefect.calls == 2

    asyncio.run(scenario())


class _NoneWaiting(dict):
    def __setitem__(self, key, value):
        pass


def test_a_run_that_has_begun_answers_its_own_delivery_only():
    """The first of several callers of one call may be the replay of an old delivery."""
    prefect = FakePrefect(runs={"d1": Run("run-0", "d1", has_begun=True)})
    dispatcher = Dispatcher(FakeRegistry({"smol": "smol"}), prefect)
    first, again, second = answers(
        dispatcher, [champion("smol", "d1"), champion("smol", "d1"), champion("smol", "d2")]
    )
    assert first == again == DispatchResult(DispatchOutcome.STARTED, "run-0")
    assert second == DispatchResult(DispatchOutcome.STARTED, "run-1")


@pytest.mark.parametrize("broken", ["registry", "prefect"])
def test_a_broken_server_is_unavailable_until_it_recovers(broken):
    registry, prefect = FakeRegistry({"smol": "smol"}), FakePrefect()
    dispatcher = Dispatcher(registry, prefect)
    server = registry if broken == "registry" else prefect
    server.broken = True
    with pytest.raises(UnavailableError):
        answers(dispatcher, [champion("smol", "d1")])
    server.broken = False
    assert answers(dispatcher, [champion("smol", "d1")]) == [
        DispatchResult(DispatchOutcome.STARTED, "run-1")
    ]


def test_a_slow_server_is_unavailable_after_the_timeout():
    prefect = FakePrefect(delay_s=5)
    dispatcher = Dispatcher(FakeRegistry({"smol": "smol"}), prefect, timeout_s=0.05)
    with pytest.raises(UnavailableError, match=r"0\.05 s"):
        answers(dispatcher, [champion("smol", "d1")])
    assert asyncio.run(dispatcher.is_ready()) is False


def test_callers_during_a_call_share_the_next_one():
    async def scenario():
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

    asyncio.run(scenario())


def test_cancelling_one_caller_does_not_cancel_the_call():
    async def scenario():
        shared = SingleFlight()

        async def call():
            await asyncio.sleep(0.02)
            return "done"

        impatient = asyncio.create_task(shared.call("k", call))
        patient = asyncio.create_task(shared.call("k", call))
        await asyncio.sleep(0.005)
        impatient.cancel()
        assert await patient == ("done", False)

    asyncio.run(scenario())
