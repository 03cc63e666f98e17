"""The other entrance: S3's events in an SQS queue, fetched by long polling.

A message is deleted once its run exists, or once it is clear that it means nothing. One that can
never be right, or on which the bridge itself fails, is left: it comes back after `VISIBILITY_S`,
and the queue's redrive policy moves it to the dead-letter queue. Where there is no such policy, it
is deleted after `MOST_RECEIVES` receives. While Prefect does not answer, the messages at hand are
kept (their visibility is extended, no others are fetched): given back, each would count as
received, and a long outage would end with good messages among the dead.

Anybody who may write to the queue chooses what is in a message, so every part of one may be missing
or have any value. No message ends the loop, and none keeps another from being answered.
"""

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.bridge.app import NotificationHandler
from infra.bridge.dispatcher import DispatchOutcome, UnavailableError
from infra.bridge.logs import LOG
from infra.bridge.loops import forever
from infra.bridge.metrics import Place
from infra.bridge.notifications import from_s3, is_delivery_id

__all__ = ["MOST_RECEIVES", "Message", "Queue", "SqsQueue", "consume"]

VISIBILITY_S = 60
MOST_RECEIVES = 10
_POLL_S = 20  # SQS's longest
_LULL_S = 1.0
"""Before the next poll where one found nothing: an endpoint may ignore how long it should wait."""


@dataclass(frozen=True)
class Message:
    """One message at hand: its id (the same each time it is received), its receipt, its body.

    `receives`: how often it has been received, this time included.
    """

    id: str
    receipt: str
    body: str
    receives: int = 1

    @property
    def delivery_id(self) -> str:
        """The id of its delivery: the message's own, if it can be one."""
        if is_delivery_id(self.id):
            return self.id
        return hashlib.sha256(self.id.encode(errors="surrogatepass")).hexdigest()[:32]


class Queue(Protocol):
    """A queue whose messages come back unless they are deleted. Blocking: called in threads.

    Each method may raise any exception: the queue does not answer, or not as it should.
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
        # The URL is explicit: AWS_ENDPOINT_URL may name an S3 server without queues.
        self._sqs: Any = boto3.Session().client(
            "sqs",
            endpoint_url=url.rsplit("/", 2)[0],
            config=Config(
                connect_timeout=5, read_timeout=_POLL_S + 10, retries={"total_max_attempts": 1}
            ),
        )

    def receive(self) -> list[Message]:
        """Return up to ten messages; waits for one for 20 s."""
        with _unavailable():
            answer = self._sqs.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=10,
                WaitTimeSeconds=_POLL_S,
                VisibilityTimeout=VISIBILITY_S,
                AttributeNames=["ApproximateReceiveCount"],
            )
        return [_message(found) for found in answer.get("Messages", [])]

    def extend(self, message: Message) -> None:
        """Keep the message invisible for another `VISIBILITY_S`."""
        with _unavailable():
            self._sqs.change_message_visibility(
                QueueUrl=self._url, ReceiptHandle=message.receipt, VisibilityTimeout=VISIBILITY_S
            )

    def delete(self, message: Message) -> None:
        """Delete the message."""
        with _unavailable():
            self._sqs.delete_message(QueueUrl=self._url, ReceiptHandle=message.receipt)


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise UnavailableError(f"the queue: {error}") from error


def _message(found: dict[str, Any]) -> Message:
    """Return a message with an empty string for each part that the queue's answer lacks."""
    receives = found.get("Attributes", {}).get("ApproximateReceiveCount", "1")
    return Message(
        str(found.get("MessageId", "")),
        str(found.get("ReceiptHandle", "")),
        str(found.get("Body", "")),
        int(receives) if str(receives).isdecimal() else 1,
    )


async def consume(
    queue: Queue, handler: NotificationHandler, *, root_uri: str = "", pause_s: float = 5.0
) -> NoReturn:
    """Answer the messages of the queue, for ever. `pause_s`: before what failed is tried again."""

    async def step() -> None:
        received = await asyncio.to_thread(queue.receive)
        if not received:
            await asyncio.sleep(min(pause_s, _LULL_S))
        async with asyncio.TaskGroup() as group:
            for message in received:
                group.create_task(_settle(message, queue, handler, root_uri, pause_s))

    await forever(Place.QUEUE, step, every_s=0.0, retry_s=pause_s, failures=handler.failures)


async def _settle(
    message: Message, queue: Queue, handler: NotificationHandler, root_uri: str, pause_s: float
) -> None:
    """Answer one message. What fails is noted, and the message comes back."""
    try:
        outcome = await _answered(message, queue, handler, root_uri, pause_s)
        useless = outcome in (DispatchOutcome.REJECTED, DispatchOutcome.FAILED)
        if useless and message.receives >= MOST_RECEIVES:
            LOG.warning(
                "message deleted",
                extra={
                    "delivery": message.delivery_id,
                    "why": f"received {message.receives} times",
                },
            )
        elif useless:
            return
        # If this fails, the message comes back with the same id and finds its run.
        await asyncio.to_thread(queue.delete, message)
    except Exception as error:
        handler.failures.note(Place.MESSAGE, error, delivery=message.delivery_id)


async def _answered(
    message: Message, queue: Queue, handler: NotificationHandler, root_uri: str, pause_s: float
) -> DispatchOutcome:
    """Return what became of the message, however long Prefect is away."""
    body = message.body.encode(errors="surrogatepass")
    parsed = from_s3(body, message.delivery_id, root_uri=root_uri)
    keeping = asyncio.create_task(_keep(message, queue, handler))
    try:
        while True:
            answer = await handler.take("sqs", parsed, message.delivery_id)
            if answer.outcome is not DispatchOutcome.UNAVAILABLE:
                return answer.outcome
            await asyncio.sleep(pause_s)
    finally:
        keeping.cancel()


async def _keep(message: Message, queue: Queue, handler: NotificationHandler) -> NoReturn:
    async def extend() -> None:
        await asyncio.to_thread(queue.extend, message)

    await asyncio.sleep(VISIBILITY_S / 3)
    await forever(Place.MESSAGE, extend, every_s=VISIBILITY_S / 3, failures=handler.failures)
