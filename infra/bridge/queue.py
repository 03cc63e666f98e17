"""The other entrance: S3's events in an SQS queue, fetched by long polling.

A message is deleted once its run exists, or once it is clear that it means nothing. One that can
never be right is left: the queue's redrive policy moves it to the dead-letter queue. While Prefect
does not answer, the messages at hand are kept (their visibility is extended, no others are
fetched): given back, each would count as received, and a long outage would end with good messages
among the dead.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.bridge.app import Clerk
from infra.bridge.desk import Outcome
from infra.bridge.hints import from_s3
from infra.bridge.logs import LOG

__all__ = ["Message", "Queue", "SqsQueue", "consume"]

VISIBILITY_S = 60
_POLL_S = 20  # SQS's longest
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Message:
    """One message at hand: its id (the same each time it is received), its receipt, its body."""

    id: str
    receipt: str
    body: str


class Queue(Protocol):
    """A queue whose messages come back unless they are deleted. Blocking: called in threads.

    Each method raises OSError, or botocore's errors, while the queue does not answer.
    """

    def receive(self) -> list[Message]:
        """Return up to ten messages, invisible to others for `VISIBILITY_S`; waits for one."""

    def extend(self, message: Message) -> None:
        """Keep the message invisible for another `VISIBILITY_S`."""

    def delete(self, message: Message) -> None:
        """The message is done with."""


class SqsQueue:
    """A queue of SQS."""

    def __init__(self, url: str) -> None:
        self._url = url
        # Told by hand: AWS_ENDPOINT_URL may lead to an S3 server that has no queues.
        self._sqs: Any = boto3.client(
            "sqs",
            endpoint_url=url.rsplit("/", 2)[0],
            config=Config(
                connect_timeout=5, read_timeout=_POLL_S + 10, retries={"total_max_attempts": 1}
            ),
        )

    def receive(self) -> list[Message]:
        """Return up to ten messages; waits for one for 20 s."""
        answer = self._sqs.receive_message(
            QueueUrl=self._url,
            MaxNumberOfMessages=10,
            WaitTimeSeconds=_POLL_S,
            VisibilityTimeout=VISIBILITY_S,
        )
        return [
            Message(found["MessageId"], found["ReceiptHandle"], found["Body"])
            for found in answer.get("Messages", [])
        ]

    def extend(self, message: Message) -> None:
        """Keep the message invisible for another `VISIBILITY_S`."""
        self._sqs.change_message_visibility(
            QueueUrl=self._url, ReceiptHandle=message.receipt, VisibilityTimeout=VISIBILITY_S
        )

    def delete(self, message: Message) -> None:
        """Delete the message."""
        self._sqs.delete_message(QueueUrl=self._url, ReceiptHandle=message.receipt)


async def consume(queue: Queue, clerk: Clerk, *, root_uri: str = "", pause_s: float = 5.0) -> None:
    """Answer the messages of the queue, for ever. `pause_s`: before what failed is tried again."""
    while True:
        received = await _unless_silent(queue.receive)
        if received is None:
            await asyncio.sleep(pause_s)
            continue
        async with asyncio.TaskGroup() as group:
            for message in received:
                group.create_task(_settle(message, queue, clerk, root_uri, pause_s))


async def _settle(
    message: Message, queue: Queue, clerk: Clerk, root_uri: str, pause_s: float
) -> None:
    parsed = from_s3(message.body.encode(), message.id, root_uri=root_uri)
    keeping = asyncio.create_task(_keep(message, queue))
    try:
        while True:
            answer = await clerk.take("sqs", parsed, message.id)
            if answer.outcome is not Outcome.UNAVAILABLE:
                break
            await asyncio.sleep(pause_s)
    finally:
        keeping.cancel()
    if answer.outcome is not Outcome.NEVER:
        await _unless_silent(lambda: queue.delete(message))  # if not, it comes back: same id


async def _keep(message: Message, queue: Queue) -> None:
    while True:
        await asyncio.sleep(VISIBILITY_S / 3)
        await _unless_silent(lambda: queue.extend(message))


async def _unless_silent(call: Callable[[], _Value]) -> _Value | None:
    """Call in a thread; None where the queue does not answer, which is logged."""
    try:
        return await asyncio.to_thread(call)
    except (BotoCoreError, ClientError, OSError) as error:
        LOG.warning("the queue does not answer", extra={"why": type(error).__name__})
        return None
