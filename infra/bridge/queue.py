"""Receives S3's events from an SQS queue by long polling.

The bridge deletes a message once its run exists, or if it needs no run. It leaves a message that
can never be valid, or on which the bridge itself fails: the message returns after `VISIBILITY_S`,
and the queue's redrive policy moves it to the dead-letter queue. Without such a policy, the bridge
deletes it after `MAX_RECEIVES` receives.

While Prefect does not answer, the bridge extends the visibility of the messages that it holds and
receives no others. If it returned them, each would count as received, and a long outage would move
valid messages to the dead-letter queue.

Every client that may write to the queue chooses the content of a message, so any part may be
missing or have any value. No message ends the loop or blocks another one.
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
from infra.bridge.loops import run_forever
from infra.bridge.metrics import FailureSource
from infra.bridge.notifications import from_s3, is_delivery_id

__all__ = ["MAX_RECEIVES", "Message", "MessageQueue", "SqsQueue", "consume"]

VISIBILITY_S = 60
MAX_RECEIVES = 10
_POLL_S = 20  # the longest that SQS allows
_EMPTY_PAUSE_S = 1.0
"""Pause after a poll without messages, because an endpoint may ignore the requested wait."""


@dataclass(frozen=True)
class Message:
    """One received message.

    Attributes:
        id: id of the message, the same each time it is received.
        receipt: handle by which it is deleted or extended.
        body: text of the message.
        receives: how often it has been received, this time included.
    """

    id: str
    receipt: str
    body: str
    receives: int = 1

    @property
    def delivery_id(self) -> str:
        """The id of the message if it is a valid delivery id, else a hash of it."""
        if is_delivery_id(self.id):
            return self.id
        return hashlib.sha256(self.id.encode(errors="surrogatepass")).hexdigest()[:32]


class MessageQueue(Protocol):
    """A queue whose messages return unless they are deleted. Blocking: called in threads.

    Each method may raise any exception, for example if the queue does not answer.
    """

    def receive(self) -> list[Message]:
        """Wait for messages and return up to ten, invisible to others for `VISIBILITY_S`."""

    def extend(self, message: Message) -> None:
        """Keep the message invisible for another `VISIBILITY_S`."""

    def delete(self, message: Message) -> None:
        """Delete the message."""


class SqsQueue:
    """An SQS queue."""

    def __init__(self, url: str) -> None:
        self._url = url
        # Explicit, because AWS_ENDPOINT_URL may name an S3 server, which has no queues.
        self._sqs: Any = boto3.Session().client(
            "sqs",
            endpoint_url=url.rsplit("/", 2)[0],
            config=Config(
                connect_timeout=5, read_timeout=_POLL_S + 10, retries={"total_max_attempts": 1}
            ),
        )

    def receive(self) -> list[Message]:
        """Wait up to 20 s for messages and return up to ten."""
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
        raise UnavailableError(f"SQS: {error}") from error


def _message(found: dict[str, Any]) -> Message:
    """Return a message with an empty string for each part that the response lacks."""
    receives = found.get("Attributes", {}).get("ApproximateReceiveCount", "1")
    return Message(
        str(found.get("MessageId", "")),
        str(found.get("ReceiptHandle", "")),
        str(found.get("Body", "")),
        int(receives) if str(receives).isdecimal() else 1,
    )


async def consume(
    queue: MessageQueue, handler: NotificationHandler, *, root_uri: str = "", pause_s: float = 5.0
) -> NoReturn:
    """Process the messages of the queue without end. `pause_s` is the pause before a retry."""

    async def step() -> None:
        received = await asyncio.to_thread(queue.receive)
        if not received:
            await asyncio.sleep(min(pause_s, _EMPTY_PAUSE_S))
        async with asyncio.TaskGroup() as group:
            for message in received:
                group.create_task(_process(message, queue, handler, root_uri, pause_s))

    await run_forever(
        FailureSource.QUEUE, step, interval_s=0.0, retry_s=pause_s, failures=handler.failures
    )


async def _process(
    message: Message,
    queue: MessageQueue,
    handler: NotificationHandler,
    root_uri: str,
    pause_s: float,
) -> None:
    """Process one message. A failure is recorded, and the message returns later."""
    try:
        outcome = await _handle(message, queue, handler, root_uri, pause_s)
        is_invalid_or_failed = outcome in (DispatchOutcome.REJECTED, DispatchOutcome.FAILED)
        if is_invalid_or_failed and message.receives >= MAX_RECEIVES:
            LOG.warning(
                "message deleted",
                extra={
                    "delivery": message.delivery_id,
                    "reason": f"received {message.receives} times",
                },
            )
        elif is_invalid_or_failed:
            return
        # If this fails, the message returns with the same id and finds its run.
        await asyncio.to_thread(queue.delete, message)
    except Exception as error:
        handler.failures.record(FailureSource.MESSAGE, error, delivery=message.delivery_id)


async def _handle(
    message: Message,
    queue: MessageQueue,
    handler: NotificationHandler,
    root_uri: str,
    pause_s: float,
) -> DispatchOutcome:
    """Handle the message until Prefect is available, and return the outcome."""
    body = message.body.encode(errors="surrogatepass")
    parsed = from_s3(body, message.delivery_id, root_uri=root_uri)
    extending = asyncio.create_task(_extend_visibility(message, queue, handler))
    try:
        while True:
            result = await handler.handle("sqs", parsed, message.delivery_id)
            if result.outcome is not DispatchOutcome.UNAVAILABLE:
                return result.outcome
            await asyncio.sleep(pause_s)
    finally:
        extending.cancel()


async def _extend_visibility(
    message: Message, queue: MessageQueue, handler: NotificationHandler
) -> NoReturn:
    async def extend() -> None:
        await asyncio.to_thread(queue.extend, message)

    await asyncio.sleep(VISIBILITY_S / 3)
    await run_forever(
        FailureSource.MESSAGE, extend, interval_s=VISIBILITY_S / 3, failures=handler.failures
    )
