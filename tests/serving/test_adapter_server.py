"""The adapters of a server process: its settings, and its reads of a real MLflow server."""

import logging
from contextlib import contextmanager
from pathlib import Path

import pytest
from requests import Response

from tests.faults.proxy import RandomFaults, proxied
from tests.serving.fleet import ServingFleet
from trans_peft.client import connect
from trans_peft.errors import InvalidSpecError
from trans_peft.lifecycle.resolve import resolve
from trans_peft.models import adapter_weights_sha256
from trans_peft.serving.adapter_server import AdapterServer, Prepared, ServerSettings
from trans_peft.serving.router import Refusal, RefusalReason


def test_the_settings_come_from_variables_with_defaults():
    found = ServerSettings.from_environment({"TRANS_PEFT_SERVE_FAMILY": "small"})
    assert found == ServerSettings(
        "small", Path("~/.cache/trans-peft/served").expanduser(), None, 5.0
    )
    everything = {
        "TRANS_PEFT_SERVE_FAMILY": "small",
        "TRANS_PEFT_SERVE_FOLDERS": "/data/served",
        "TRANS_PEFT_SERVE_BASE_NAME": "bare",
        "TRANS_PEFT_SERVE_POLL_S": "0.5",
    }
    assert ServerSettings.from_environment(everything) == ServerSettings(
        "small", Path("/data/served"), "bare", 0.5
    )


@pytest.mark.parametrize("poll", ["0", "30", "-1", "nan", "often"])
def test_all_problems_of_the_settings_are_reported(poll):
    with pytest.raises(InvalidSpecError) as caught:
        ServerSettings.from_environment({"TRANS_PEFT_SERVE_POLL_S": poll})
    assert "TRANS_PEFT_SERVE_FAMILY is not set" in str(caught.value)
    assert f"not {poll!r}" in str(caught.value)


@pytest.fixture
def real_fleet(servers, unique, tmp_path, tiny_bases):
    """A fleet in a real registry: UNIQUE-chat and UNIQUE-code serve on v1."""
    fleet = ServingFleet(tmp_path, connect(servers.mlflow_url), unique)
    v1 = fleet.add_base("v1", tiny_bases[0])
    for seed, name in enumerate(("chat", "code"), 1):
        fleet.train(f"{unique}-{name}", v1, seed)
    return fleet


@pytest.mark.servers
def test_a_server_follows_a_real_registry_and_outlives_it(
    servers, real_fleet, unique, tmp_path, tiny_bases, caplog
):
    fleet, v1 = real_fleet, real_fleet.base("v1")
    chat, code = f"{unique}-chat", f"{unique}-code"
    faults = RandomFaults(0, 1.0, ("reset",), bad=False)
    with proxied(servers.mlflow_url, faults, keeps_host=False) as url:
        settings = ServerSettings(unique, tmp_path / "served")
        server = AdapterServer(settings, connect(url))
        server.start(str(tiny_bases[0]), max_rank=8)

        def loaded(name: str) -> str:
            """Prepare and load what answers, as the middleware and the resolver do."""
            adapter = server.route(name)
            assert isinstance(server.prepare(adapter), Prepared)
            return adapter_weights_sha256(server.load(adapter.engine_name))

        assert loaded(chat) == resolve(chat, fleet.platform, base="v1").weights_sha256
        newer = fleet.train(chat, v1, 3)
        server.refresh()
        assert loaded(chat) == newer.weights_sha256
        assert [name.split(".v")[1][0] for name in server.revoked()] == ["1"]

        faults.bad = True
        with caplog.at_level(logging.WARNING, logger="trans_peft.serving"):
            for _ in range(3):
                server.refresh()
        ours = [found for found in caplog.records if found.name.startswith("trans_peft")]
        assert len(ours) == 1
        assert loaded(chat) == newer.weights_sha256
        refusal = server.route(code)
        assert isinstance(refusal, Refusal) and refusal.reason is RefusalReason.REGISTRY_AWAY

        faults.bad = False
        server.refresh()
        assert loaded(code) == resolve(code, fleet.platform, base="v1").weights_sha256


ANSWERS = [
    b"", b"{}", b"[]", b"<html>log in</html>", b'{"error": "x"}',
    b'{"model_versions": [{"nom": 1}]}',
    b'{"registered_models": [{"nom": 1}], "registered_model": {"name": 1}}',
    b'{"registered_model": {"name": "x"}, "model_versions": "x", "registered_models": null}',
]  # fmt: skip


@pytest.fixture
def odd_answers(monkeypatch):
    """Answer requests to MLflow's REST API whose path ends with `of` by other bytes."""
    from mlflow.utils import rest_utils

    request = rest_utils._get_http_response_with_retries

    @contextmanager
    def answering(content, of):
        def respond(method, url, *arguments, **options):
            if not url.endswith(of):
                return request(method, url, *arguments, **options)
            response = Response()
            response.status_code, response._content = 200, content
            return response

        with monkeypatch.context() as patch:
            patch.setattr(rest_utils, "_get_http_response_with_retries", respond)
            yield

    return answering


@pytest.mark.servers
def test_an_odd_answer_of_the_registry_keeps_what_is_loaded_and_routes_nothing_else(
    real_fleet, unique, tmp_path, tiny_bases, odd_answers
):
    chat, code = f"{unique}-chat", f"{unique}-code"
    server = AdapterServer(ServerSettings(unique, tmp_path / "served"), real_fleet.platform)
    server.start(str(tiny_bases[0]), max_rank=8)
    adapter = server.route(chat)
    server.prepare(adapter)
    server.load(adapter.engine_name)
    for content in ANSWERS:
        for of in ("", "registered-models/get", "registered-models/search", "versions/search"):
            if content == b"{}" and of.endswith("search"):
                continue  # MLflow's own answer to a search that finds nothing
            with odd_answers(content, of):
                server.refresh()
            assert server.route(chat) == adapter, (content, of)
            assert server.revoked() == ()
            refusal = server.route(code)
            assert isinstance(refusal, Refusal), (content, of)
            assert refusal.reason is RefusalReason.REGISTRY_AWAY
            server.refresh()
            assert server.route(code).name == code


def test_an_unexpected_error_of_a_read_counts_as_a_registry_that_is_away(fleet, monkeypatch):
    settings = ServerSettings(fleet.family, fleet.folder / "served")
    server = AdapterServer(settings, fleet.platform)
    server.start(str(fleet.bases["v1"]), max_rank=8)
    chat = server.route("chat")
    server.prepare(chat)
    server.load(chat.engine_name)

    def odd(family):
        raise KeyError("name")

    monkeypatch.setattr(fleet.registry, "fleet", odd)
    server.refresh()
    assert server.route("chat") == chat
    assert server.route("code").reason is RefusalReason.REGISTRY_AWAY


def test_a_folder_that_cannot_be_cleaned_does_not_end_the_start(fleet, caplog):
    folder = fleet.folder / "served"
    for name in ("chat.v9.0123456789ab", ".state"):
        (folder / name).mkdir(parents=True)
    (folder / "chat.v9.0123456789ab" / ".complete").write_text("")
    (folder / ".state" / "lock").write_text("a file where a folder belongs")
    server = AdapterServer(ServerSettings(fleet.family, folder), fleet.platform)
    server.start(str(fleet.bases["v1"]), max_rank=8)
    assert "unused folders in" in caplog.text
    assert server.prepare(server.route("chat")).reason is RefusalReason.DAMAGED


def test_an_output_layer_that_vllm_does_not_adapt_is_refused(qwen2_fleet):
    settings = ServerSettings(qwen2_fleet.family, qwen2_fleet.folder / "served")
    server = AdapterServer(settings, qwen2_fleet.platform)
    server.start(str(qwen2_fleet.bases["v1"]), max_rank=8)
    assert isinstance(server.prepare(server.route("plain")), Prepared)
    refusal = server.prepare(server.route("adapts-output-layer"))
    assert refusal.reason is RefusalReason.UNSUPPORTED
    assert "output_layer: false" in refusal.message
