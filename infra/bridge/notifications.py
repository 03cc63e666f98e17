"""Parses the payloads of all senders into notifications. No I/O.

- `Notification`: a change that needs a reconcile run.
- `Ignored`: a valid payload that needs no run. The project's own writes are among these; otherwise
  reconcile would start itself without end.
- `Rejected`: a payload that can never be valid.

Formats: MLflow's webhooks (`mlflow.webhooks.types`); S3's event records as AWS sends them to SQS
(directly, through SNS, through EventBridge) and as MinIO posts them; events of SeaweedFS's filer
(`filer_pb.EventNotification` as JSON). Only keys in S3 event records are URL-encoded.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from urllib.parse import unquote_plus

from tasks.origin import is_delivery_id, is_plausible
from trans_peft.domain.base import Manifest
from trans_peft.domain.conventions import (
    ADAPTER_ALIAS,
    CHAMPION_ALIAS,
    CONVERTED_SUFFIX,
    RECONCILE_TAG,
    TAG_PREFIX,
)
from trans_peft.domain.names import name_problem

__all__ = [
    "Ignored",
    "Notification",
    "NotificationKind",
    "Parsed",
    "Rejected",
    "from_mlflow",
    "from_s3",
    "is_delivery_id",
]


class NotificationKind(StrEnum):
    """The change that a notification reports."""

    CHAMPION = "champion"  # a user set or removed the alias `champion` of a base
    VERSION = "version"  # a version was registered
    APPROVAL = "approval"  # the alias of an adapter on one base was set or removed
    REQUESTED = "requested"  # a user set the tag that requests a reconcile
    UPLOAD = "upload"  # a manifest was written
    START_UP = "start-up"  # the bridge started


@dataclass(frozen=True)
class Notification:
    """A change that needs a reconcile run.

    Attributes:
        kind: what changed.
        name: name of the registered model, or URI of the upload.
        delivery_id: id of the delivery; retries of one delivery have the same id.
        alias: alias that was set or removed, if any.
        at: time of the change by the sender's clock; None if the payload has none.
    """

    kind: NotificationKind
    name: str
    delivery_id: str
    alias: str = ""
    at: datetime | None = None


@dataclass(frozen=True)
class Ignored:
    """A valid payload that needs no run."""

    reason: str


@dataclass(frozen=True)
class Rejected:
    """A payload that can never be valid."""

    reason: str


Parsed = Notification | Ignored | Rejected

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,1024}")
_MAX_ENVELOPES = 3  # SQS(SNS(EventBridge))


class _RejectedError(Exception):
    pass


def from_mlflow(body: bytes, delivery_id: str) -> Parsed:
    """Parse the body of an MLflow webhook."""
    return _parsed(lambda: _mlflow(_object(body), delivery_id))


def from_s3(body: bytes, delivery_id: str, *, root_uri: str = "") -> Parsed:
    """Parse an S3 event in any format. Uploads outside of `root_uri` are ignored (empty: none)."""
    return _parsed(lambda: _s3(_object(body), delivery_id, root_uri))


def _parsed(parse: Callable[[], Parsed]) -> Parsed:
    try:
        return parse()
    except _RejectedError as error:
        return Rejected(str(error))


def _mlflow(document: dict[str, Any], delivery_id: str) -> Parsed:
    event = f"{document.get('entity')}.{document.get('action')}"
    data = document.get("data")
    if not isinstance(data, dict) or not all(
        isinstance(document.get(field), str) for field in ("entity", "action")
    ):
        raise _RejectedError("not a webhook of MLflow: entity, action or data is missing")
    at = _time(document.get("timestamp"))
    match event:
        case "model_version.created":
            name = _name(data)
            tags = data.get("tags") or {}
            if not isinstance(tags, dict):
                raise _RejectedError("the tags of the version are not an object")
            # A copy that a user made ("Promote model") has the same tags under another name.
            if name in (tags.get(f"{TAG_PREFIX}family"), tags.get(f"{TAG_PREFIX}adapter")):
                return Ignored("this project registered the version")
            return Notification(NotificationKind.VERSION, name, delivery_id, at=at)
        case "model_version_alias.created" | "model_version_alias.deleted":
            name, alias = _name(data), data.get("alias")
            if not isinstance(alias, str):
                raise _RejectedError("the alias has no name")
            if alias == CHAMPION_ALIAS:
                return Notification(NotificationKind.CHAMPION, name, delivery_id, alias, at)
            if ADAPTER_ALIAS.fullmatch(alias):
                return Notification(NotificationKind.APPROVAL, name, delivery_id, alias, at)
            return Ignored("reconcile does not depend on this alias")
        case "model_version_tag.set":
            if data.get("key") == RECONCILE_TAG:
                return Notification(NotificationKind.REQUESTED, _name(data), delivery_id, at=at)
            return Ignored("reconcile does not depend on this tag")
    return Ignored("reconcile does not depend on this event")


def _name(data: dict[str, Any]) -> str:
    """Return the name of the registered model. _RejectedError if no model can have this name."""
    name = data.get("name")
    if not isinstance(name, str) or name_problem("name", name):
        raise _RejectedError("no base family and no adapter can have this name")
    return name


def _s3(document: dict[str, Any], delivery_id: str, root_uri: str) -> Parsed:
    """Return the first upload among the records. An invalid record does not hide a valid one."""
    reason = "no object was written"
    rejected: _RejectedError | None = None
    for written in _written(document, _MAX_ENVELOPES):
        if isinstance(written, _RejectedError):
            rejected = rejected or written
            continue
        key, bucket, at = written
        folder, _, file = key.rpartition("/")
        uri = f"s3://{bucket}/{folder}"
        if file != Manifest.FILE_NAME:
            reason = "the file is not a manifest"
        elif not _BUCKET.fullmatch(bucket) or not _is_valid_key(key):
            rejected = rejected or _RejectedError("no base can be stored under this bucket and key")
        elif folder.endswith(CONVERTED_SUFFIX):
            reason = "the file belongs to the converted form of another upload"
        elif not f"{uri}/".startswith(f"{root_uri.rstrip('/')}/" if root_uri else ""):
            reason = "the file is outside of the prefix for uploads"
        else:
            return Notification(NotificationKind.UPLOAD, uri, delivery_id, at=at)
    if rejected is not None:
        raise rejected
    return Ignored(reason)


def _is_valid_key(key: str) -> bool:
    segments = key.split("/")
    return (
        _KEY.fullmatch(key) is not None and len(segments) > 1 and not {"", ".", ".."} & {*segments}
    )


_Written = tuple[str, str, datetime | None]


def _written(document: dict[str, Any], envelopes: int) -> Iterator[_Written | _RejectedError]:
    """Yield key, bucket and time of each written object, or the error of a malformed record."""
    match document:
        case {"Event": "s3:TestEvent"}:  # sent once, when a notification is configured
            return
        case {"Records": [*records]}:  # S3, also inside MinIO's webhook
            for record in records:
                try:
                    yield from _record(record)
                except _RejectedError as error:
                    yield error
        case {"Type": "Notification", "Message": str(message)}:  # SNS
            if envelopes == 0:
                raise _RejectedError("too many nested SNS messages")
            yield from _written(_object(message.encode(errors="surrogatepass")), envelopes - 1)
        case {"Type": "SubscriptionConfirmation" | "UnsubscribeConfirmation"}:
            return
        case {"source": "aws.s3", "detail-type": str(kind), "detail": {**detail}}:  # EventBridge
            if kind == "Object Created":
                yield (
                    _text(detail, "object", "key"),
                    _text(detail, "bucket", "name"),
                    _time(document.get("time")),
                )
        case {"event_type": str(), "key": str(path), "message": {**event}}:  # SeaweedFS
            yield from _filer_event(path, event)
        case _:
            raise _RejectedError("not an S3 event of a known format")


def _record(record: object) -> Iterator[_Written]:
    if not isinstance(record, dict) or not isinstance(record.get("eventName"), str):
        raise _RejectedError("a record has no event name")
    if record["eventName"].removeprefix("s3:").startswith("ObjectCreated:"):
        encoded = _text(record, "s3", "object", "key")
        try:
            key = unquote_plus(encoded, errors="strict")
        except UnicodeError as error:
            raise _RejectedError("a key is not UTF-8") from error
        yield key, _text(record, "s3", "bucket", "name"), _time(record.get("eventTime"))


def _filer_event(path: str, event: Mapping[Any, Any]) -> Iterator[_Written]:
    """Yield the written object. `path` is the entry's former path; the event holds the new one."""
    entry = event.get("new_entry")
    if entry is None:
        return  # deleted
    if not isinstance(entry, dict):
        raise _RejectedError("the entry of the filer is not an object")
    parent, name = event.get("new_parent_path"), entry.get("name")
    if isinstance(parent, str) and parent and isinstance(name, str) and name:
        path = f"{parent.rstrip('/')}/{name}"
    match path.split("/", 3):
        case ["", "buckets", bucket, key] if not (
            entry.get("is_directory") or key.startswith(".uploads/")  # parts of an upload
        ):
            attributes = entry.get("attributes")
            seconds = attributes.get("mtime") if isinstance(attributes, dict) else None
            yield key, bucket, _time(seconds)


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _RejectedError("the body is not JSON") from error
    if not isinstance(document, dict):
        raise _RejectedError("the body is not a JSON object")
    return document


def _text(value: object, *path: str) -> str:
    """Return the text at this path of a document. _RejectedError if there is none."""
    for field in path:
        value = value.get(field) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise _RejectedError(f"{'.'.join(path)} is missing")
    return value


def _time(value: object) -> datetime | None:
    """Parse ISO 8601 text or seconds since 1970; None for any other value.

    Also None for a time before 2000 or after 2099, which comes from a wrong clock.
    """
    try:
        if isinstance(value, str):
            time = datetime.fromisoformat(value)
            time = time if time.tzinfo else time.replace(tzinfo=UTC)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            time = datetime.fromtimestamp(value, UTC)
        else:
            return None
    except (ValueError, OverflowError, OSError):
        return None
    return time if is_plausible(time) else None
