"""Notifications from a queue: in memory, and with moto's SQS and S3 (mocks of AWS's)."""

import asyncio
import json
import threading

import pytest

from infra.bridge import queue as queue_module
from infra.bridge.app import NotificationHandler
from infra.bridge.dispatcher import Dispatcher
from infra.bridge.metrics import Metrics
from infra.bridge.queue import SqsQueue, consume
from tests.bridge.fakes import FakePrefect, FakeQueue, FakeRegistry
from tests.bridge.test_app import uploaded

MANIFEST = json.dumps(uploaded())
WEIGHTS = json.dumps(uploaded("smol/v1/model.safetensors"))
INVALID = '{"neither": "nor"}'


def consume_until(queue, prefect, *, until, meanwhile=None, timeout_s=20):
    handler = NotificationHandler(Dispatcher(FakeRegistry({}), prefect), Metrics())

    async def scenario():
        consumer = asyncio.create_task(consume(queue, handler, pause_s=0.02))
        async with asyncio.timeout(timeout_s):
            if meanwhile is not None:
                await meanwhile()
            while not until():
                assert not consumer.done(), consumer.result()
                await asyncio.sleep(0.005)
        consumer.cancel()

    asyncio.run(scenario())


def test_a_message_is_deleted_once_its_run_exists_or_if_it_is_ignored():
    queue, prefect = FakeQueue(MANIFEST, WEIGHTS), FakePrefect()
    consume_until(queue, prefect, until=lambda: len(queue.deleted) == 2)
    assert prefect.asked == [(None, "0")]


def test_an_invalid_message_is_left_for_the_dead_letter_queue():
    queue, prefect = FakeQueue(INVALID, MANIFEST), FakePrefect()

    def turned():
        if queue.deleted == [MANIFEST]:
            queue.end_visibility_timeout()
        return queue.dead == [INVALID]

    consume_until(queue, prefect, until=turned)
    assert queue.deleted == [MANIFEST]
    assert len(prefect.asked) == 1


def test_while_prefect_is_away_messages_are_kept_and_none_is_counted_as_received(monkeypatch):
    monkeypatch.setattr(queue_module, "VISIBILITY_S", 0.03)
    queue, prefect = FakeQueue(MANIFEST), FakePrefect()
    prefect.broken = True

    async def outage():
        await asyncio.sleep(0.2)
        assert queue.deleted == []
        assert len(queue.extended) >= 3
        ((_, _, receives),) = queue.hidden.values()
        assert receives == 1
        prefect.broken = False

    consume_until(queue, prefect, until=lambda: queue.deleted == [MANIFEST], meanwhile=outage)


def test_polling_continues_after_an_outage_of_the_queue():
    queue, prefect = FakeQueue(MANIFEST), FakePrefect()
    queue.silent = True

    async def outage():
        await asyncio.sleep(0.1)
        queue.silent = False

    consume_until(queue, prefect, until=lambda: queue.deleted == [MANIFEST], meanwhile=outage)


@pytest.fixture(scope="module")
def aws():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        yield threading.Lock()
    server.stop()


def test_an_upload_to_s3_with_a_queue_starts_reconcile_and_invalid_messages_are_dead_lettered(
    aws, unique, monkeypatch
):
    import boto3

    s3, sqs = boto3.Session().client("s3"), boto3.Session().client("sqs")

    def arn(url):
        found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        return found["Attributes"]["QueueArn"]

    def count(url):
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)

    dead = sqs.create_queue(QueueName=f"{unique}-dead")["QueueUrl"]
    redrive = json.dumps({"deadLetterTargetArn": arn(dead), "maxReceiveCount": "2"})
    url = sqs.create_queue(QueueName=unique, Attributes={"RedrivePolicy": redrive})["QueueUrl"]
    s3.create_bucket(Bucket=unique)
    notify = {"QueueArn": arn(url), "Events": ["s3:ObjectCreated:*"]}
    s3.put_bucket_notification_configuration(
        Bucket=unique, NotificationConfiguration={"QueueConfigurations": [notify]}
    )  # sends s3:TestEvent
    sqs.send_message(QueueUrl=url, MessageBody=INVALID)
    for name in ("model.safetensors", "trans_peft_manifest.json"):
        s3.put_object(Bucket=unique, Key=f"smol/v1/{name}", Body=b"{}")
    monkeypatch.setattr(queue_module, "VISIBILITY_S", 1)
    monkeypatch.setattr(queue_module, "_POLL_S", 1)
    prefect = FakePrefect()
    consume_until(SqsQueue(url), prefect, until=lambda: count(dead) == 1 and count(url) == 0)
    assert len(prefect.asked) == 1
