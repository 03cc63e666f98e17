"""The decision for each request, as a table: name and registry -> version or error."""

import time
from dataclasses import replace

import pytest

from trans_peft.domain.base import BaseRef
from trans_peft.serving.manifest import IdleEntry, ServedAdapter, ServingManifest
from trans_peft.serving.router import BareBase, Refusal, Router

BASE = BaseRef("small", "v2", "2" * 64)
CHAT = ServedAdapter("chat", 3, BASE, "c" * 64, "LORA", "direct", "passed", "p" * 64)
MAIL = ServedAdapter("mail", 1, BASE, "a" * 64, "LORA", "training")
IDLE = (
    IdleEntry(
        "blocked", "blocked manually", "blocked does not serve on small/v2: blocked manually"
    ),
    IdleEntry("moved", "manually set on a version for another base", "moved: another base"),
    IdleEntry("odd", "unreadable", "a tag is wrong"),
    IdleEntry("unsure", "inconclusive", "unsure does not serve: verdict inconclusive: -8 to +2"),
    IdleEntry("young", "no verdict", "young does not serve on small/v2: no verdict"),
)
MANIFEST = ServingManifest(BASE, ("serving", "champion"), (CHAT, MAIL), IDLE)
NEXT = replace(MANIFEST, base_aliases=("champion",))
OLD = replace(MANIFEST, base_aliases=())
LOADED = {CHAT.engine_name}
AWAY = Router(MANIFEST, "refused", LOADED)

TABLE = [
    # what, router, model, answer: an adapter, "base", or (status, code, part of the message)
    ("serves", Router(MANIFEST), "chat", CHAT),
    ("another serves", Router(MANIFEST), "mail", MAIL),
    ("on a base that does not serve yet", Router(NEXT), "chat", CHAT),
    ("on a base that served before", Router(OLD), "chat", CHAT),
    ("canary", Router(NEXT), "chat@next", CHAT),
    ("canary on serving", Router(MANIFEST), "chat@next",
     (404, "base_is_not_next", "serving and champion")),
    ("canary on an old base", Router(OLD), "chat@next", (404, "base_is_not_next", "no alias")),
    ("canary of an idle adapter", Router(NEXT), "unsure@next",
     (404, "adapter_not_served", "-8 to +2")),
    ("another suffix", Router(NEXT), "chat@v1", (404, "adapter_unknown", "chat@v1")),
    ("no model", Router(MANIFEST), None, (400, "model_missing", "names no model")),
    ("empty", Router(MANIFEST), "", (400, "model_missing", "names no model")),
    ("suffix alone", Router(NEXT), "@next", (404, "adapter_unknown", "''")),
    ("a number", Router(MANIFEST), 7, (400, "model_missing", "names no model")),
    ("a list", Router(MANIFEST), ["chat"], (400, "model_missing", "names no model")),
    ("unknown", Router(MANIFEST), "chta",
     (404, "adapter_unknown", "adapters that serve: chat, mail")),
    ("engine name", Router(MANIFEST), CHAT.engine_name, (404, "adapter_unknown", "")),
    ("other case", Router(MANIFEST), "Chat", (404, "adapter_unknown", "")),
    ("blocked", Router(MANIFEST), "blocked", (404, "adapter_blocked", "blocked manually")),
    ("other base", Router(MANIFEST), "moved", (404, "adapter_for_another_base", "another base")),
    ("unreadable", Router(MANIFEST), "odd", (404, "adapter_unreadable", "a tag is wrong")),
    ("inconclusive", Router(MANIFEST), "unsure", (404, "adapter_not_served", "inconclusive")),
    ("no verdict", Router(MANIFEST), "young", (404, "adapter_not_served", "no verdict")),
    ("not read yet", Router(None), "chat", (503, "registry_unavailable", "not read yet")),
    ("away, loaded", AWAY, "chat", CHAT),
    ("away, not loaded", AWAY, "mail", (503, "registry_unavailable", "refused")),
    ("away, unknown", AWAY, "new", (503, "registry_unavailable", "refused")),
    ("away, blocked", AWAY, "blocked", (503, "registry_unavailable", "")),
    ("away, canary loaded", Router(NEXT, "refused", LOADED), "chat@next", CHAT),
    ("bare base", Router(MANIFEST, base_name="base"), "base", "base"),
    ("bare base not allowed", Router(MANIFEST), "base", (404, "adapter_unknown", "")),
    ("bare base, away later", Router(MANIFEST, "refused", base_name="base"), "base", "base"),
    ("bare base, away from the start", Router(None, "refused", base_name="base"), "base",
     (503, "registry_unavailable", "refused")),
    ("the base has an adapter's name, away", Router(MANIFEST, "refused", base_name="chat"), "chat",
     (503, "registry_unavailable", "refused")),
    ("and the adapter is loaded", Router(MANIFEST, "refused", LOADED, "chat"), "chat", CHAT),
    ("a path as the base's name", Router(MANIFEST, base_name="/m" * 99), "/m" * 99, "base"),
    ("longer than any name", Router(MANIFEST), "c" * 101, (404, "adapter_unknown", "at most 100")),
    ("that, on a canary", Router(MANIFEST), "c" * 101 + "@next",
     (404, "adapter_unknown", "at most 100")),
    ("that, away", AWAY, "c" * 101, (404, "adapter_unknown", "at most 100")),
    ("control characters", Router(MANIFEST), "\x1b[2J\n",
     (404, "adapter_unknown", "'\\x1b[2J\\n'")),
    ("the adapter wins over the base's name", Router(MANIFEST, base_name="chat"), "chat", CHAT),
    ("so does an idle one", Router(MANIFEST, base_name="unsure"), "unsure",
     (404, "adapter_not_served", "")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "router", "model", "answer"), TABLE, ids=[row[0] for row in TABLE]
)
def test_a_request_is_answered_by_the_version_that_serves_or_by_an_error(
    what, router, model, answer
):
    found = router.route(model)
    if answer == "base":
        assert found == BareBase()
    elif isinstance(answer, ServedAdapter):
        assert found == answer
    else:
        assert isinstance(found, Refusal)
        assert (found.status, found.reason) == answer[:2]
        assert answer[2] in found.message


def test_a_router_without_adapters_says_so():
    found = Router(replace(MANIFEST, adapters=())).route("unknown")
    assert isinstance(found, Refusal) and "serve: none" in found.message


NAMES = ["x" * 2_000_000, "adapter-x" * 1111, "adapter-x" * 11, "adapter-x", "\x00" * 100]


@pytest.mark.parametrize("name", NAMES, ids=[str(len(name)) for name in NAMES])
@pytest.mark.parametrize("suffix", ["", "@next"])
@pytest.mark.parametrize("state", [{}, {"registry_error": "refused"}])
def test_an_unknown_name_is_refused_at_once_and_is_not_echoed_in_full(name, suffix, state):
    many = tuple(sorted((replace(CHAT, name=f"adapter-{i}") for i in range(1000)),
                        key=lambda found: found.name))  # fmt: skip
    router = Router(replace(MANIFEST, adapters=many), **state)
    began = time.process_time()
    found = router.route(name + suffix)
    assert time.process_time() - began < 0.2
    assert isinstance(found, Refusal)
    assert len(found.message) < 600


@pytest.mark.parametrize("number", [0, 499, 999])
def test_of_many_adapters_the_names_most_like_an_unknown_one_are_named_first(number):
    many = tuple(replace(CHAT, name=f"adapter-{i:03}") for i in range(1000))
    found = Router(replace(MANIFEST, adapters=many)).route(f"adapter-{number:03}a")
    assert isinstance(found, Refusal)
    assert f"serve: adapter-{number:03}, " in found.message
    assert found.message.endswith("and 995 more")
