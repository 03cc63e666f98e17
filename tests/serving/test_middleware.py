"""The middleware before a server that behaves as vLLM: every answer is by verdict, or an error."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from starlette.testclient import TestClient

from tests.serving.fake_engine import FakeEngine, answer_of
from tests.serving.fleet import lora_folder
from trans_peft.errors import StoreError
from trans_peft.serving.adapter_server import AdapterServer, ServerSettings, current
from trans_peft.serving.vllm_middleware import ServeByVerdict
from trans_peft.text.saved_template import write_template


class Served:
    """A fake engine behind the middleware, and a client of it."""

    def __init__(self, client, engine, server):
        self.client, self.engine, self.server = client, engine, server

    def ask(self, model, path="/v1/completions", **body):
        return self.client.post(path, json={"model": model, "prompt": "1", **body})

    def text(self, model):
        response = self.ask(model)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == model
        return response.json()["choices"][0]["text"]

    def refused(self, model, path="/v1/completions", **body):
        response = self.ask(model, path, **body)
        return response.status_code, response.json()["error"]["code"]

    def follow(self):
        """Wait until the background task has read the registry again, twice."""
        for _ in range(2):
            router = self.server._router
            deadline = time.monotonic() + 10
            while self.server._router is router:
                assert time.monotonic() < deadline
                time.sleep(0.005)


@pytest.fixture
def serve(fleet, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.delenv("VLLM_SKIP_MODEL_NAME_VALIDATION", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,trans-peft")

    @contextmanager
    def start(base="v1", *, base_name=None, headers=None, **args):
        engine = FakeEngine(str(fleet.bases[base]), **args)
        settings = ServerSettings(fleet.family, tmp_path / "served", base_name, 0.1)
        server = AdapterServer(settings, fleet.platform, clock=lambda: time.monotonic() * 1000)
        engine.app.add_middleware(ServeByVerdict, make_server=lambda: server)
        with TestClient(engine.app, headers=headers, raise_server_exceptions=False) as client:
            yield Served(client, engine, server)
        assert current() is None

    return start


def weights(fleet, name, number, tmp_path):
    version = fleet.registry.versions(name)[number - 1]
    folder = tmp_path / "expected" / f"{name}{number}"
    if not folder.exists():
        fleet.registry.download(version, folder)
    return answer_of(folder)


def test_each_name_is_answered_by_the_registered_weights_of_its_version(serve, fleet, tmp_path):
    with serve("v1") as served:
        assert served.text("chat") == weights(fleet, "chat", 1, tmp_path)
        assert served.text("code") == weights(fleet, "code", 1, tmp_path)
        assert served.text("chat") != served.text("code")
        names = {fleet.served(name, "v1").engine_name for name in ("chat", "code")}
        assert set(served.engine.requests) == names


def test_a_server_of_another_base_answers_with_what_serves_there(serve, fleet, tmp_path):
    with serve("v2") as served:
        assert served.text("chat") == weights(fleet, "chat", 2, tmp_path)
        assert set(served.engine.requests) == {fleet.served("chat", "v2").engine_name}
        assert served.refused("code") == (404, "adapter_not_served")
        assert "inconclusive" in served.ask("code").json()["error"]["message"]


def test_the_canary_name_is_answered_on_the_champion_that_does_not_serve_yet(serve, fleet):
    with serve("v2") as served:
        assert served.refused("chat@next") == (404, "base_is_not_next")
        fleet.catalog.set_alias_manually(fleet.family, "champion", 2)
        served.follow()
        assert served.text("chat@next") == served.text("chat")
        fleet.catalog.set_serving(fleet.base("v2"))
        served.follow()
        assert served.refused("chat@next") == (404, "base_is_not_next")
        assert served.text("chat")


@pytest.mark.parametrize("body", [{}, {"model": ""}, {"model": None}, {"model": 1}, {"model": []}])
def test_a_request_without_a_model_is_never_answered_from_the_bare_base(serve, body):
    with serve() as served:
        response = served.client.post("/v1/completions", json={"prompt": "1", **body})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "model_missing")
        assert served.engine.bodies == []


def nested(depth):
    return b'{"model": "chat", "x": ' + b"[" * depth + b"]" * depth + b"}"


BODIES = [
    (b"", "is not valid JSON"),
    (b"nonsense", "is not valid JSON: Expecting value"),
    (b"\xff", "is not valid JSON"),
    (b'{"model": "chat", "x": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    (b"[1]", "must be a JSON object"),
    (b'"chat"', "must be a JSON object"),
    (b"[" * 100_000, "is nested too deeply"),
    (nested(1500), "is nested too deeply"),
]


@pytest.mark.parametrize(("data", "problem"), BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_object_is_refused(serve, data, problem):
    with serve() as served:
        response = served.client.post("/v1/completions", content=data)
        assert response.status_code == 400
        assert problem in response.json()["error"]["message"]
        assert served.engine.bodies == []


def test_of_two_models_in_a_body_the_engine_sees_the_one_that_was_judged(serve, fleet):
    with serve() as served:
        data = b'{"model": "code", "model": "chat"}'
        assert served.client.post("/v1/completions", content=data).status_code == 200
        assert served.engine.bodies == [{"model": fleet.served("chat", "v1").engine_name}]


CLOSED = [
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/adapters"),
    ("POST", "/invocations"),
    ("GET", "/docs"),
    ("POST", "/v1/completions/"),
    ("POST", "//v1/completions"),
    ("PUT", "/v1/completions"),
    ("POST", "/a/route/of/next/year"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_other_route_is_closed(serve, tmp_path, method, path):
    body = {"lora_name": "evil", "lora_path": str(lora_folder(tmp_path / "evil")), "model": "evil"}
    with serve() as served:
        response = served.client.request(method, f"http://testserver{path}", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "route_closed")
        assert served.engine.requests == {}
        assert served.engine.bodies == []


def test_websockets_are_closed(serve):
    from starlette.websockets import WebSocketDisconnect

    with (
        serve() as served,
        pytest.raises(WebSocketDisconnect),
        served.client.websocket_connect("/v1/realtime"),
    ):
        pass


def test_the_list_of_models_has_the_names_of_clients(serve, fleet):
    with serve(base_name="bare") as served:
        served.text("chat")
        data = served.client.get("/v1/models").json()["data"]
        assert [model["id"] for model in data] == ["bare", "chat", "code"]
        assert data[1]["root"] == fleet.served("chat", "v1").engine_name
        assert served.client.get("/health").status_code == 200


def test_the_bare_base_answers_only_under_the_name_that_the_operator_allows(serve, fleet):
    with serve() as served:
        assert served.refused("bare") == (404, "adapter_unknown")
        assert served.refused(str(fleet.bases["v1"])) == (404, "adapter_unknown")
    with serve(base_name="bare") as served:
        assert served.text("bare") == "bare base"
        assert served.refused(str(fleet.bases["v1"])) == (404, "adapter_unknown")


def test_a_block_reaches_a_loaded_adapter_and_unloads_it(serve, fleet):
    with serve() as served:
        served.text("chat")
        fleet.registry.set_alias_manually("chat", fleet.base("v1").alias, None)
        served.follow()
        assert served.refused("chat") == (404, "adapter_blocked")
        assert served.engine.requests == {}
        assert served.text("code")


def test_a_request_that_was_accepted_ends_on_its_weights_while_the_alias_moves(
    serve, fleet, tmp_path
):
    with serve() as served, ThreadPoolExecutor() as threads:
        old = fleet.served("chat", "v1").engine_name
        first = served.text("chat")
        served.engine.evict(old)
        served.engine.requests.clear()  # as after a start: vLLM has to ask the resolver
        served.engine.waits = True
        asked = threads.submit(served.text, "chat")
        while len(served.engine.bodies) < 2:
            time.sleep(0.005)
        newer = fleet.train("chat", fleet.base("v1"), seed=9)
        served.follow()
        served.engine.waits = False
        assert asked.result(30) == first
        assert served.text("chat") == weights(fleet, "chat", newer.number, tmp_path)
        served.follow()
        assert set(served.engine.requests) == {fleet.served("chat", "v1").engine_name}


def test_an_approval_a_new_version_and_a_rollback_reach_the_server(serve, fleet, tmp_path):
    v1, v2 = fleet.base("v1"), fleet.base("v2")
    with serve("v2") as served:
        assert served.refused("code") == (404, "adapter_not_served")
        fleet.registry.set_alias_manually("code", v2.alias, 2)
        served.follow()
        assert served.text("code") == weights(fleet, "code", 2, tmp_path)
    with serve("v1") as served:
        first = served.text("chat")
        newer = fleet.train("chat", v1, seed=9)
        served.follow()
        assert served.text("chat") == weights(fleet, "chat", newer.number, tmp_path) != first
        assert set(served.engine.requests) == {fleet.served("chat", "v1").engine_name}
        fleet.registry.set_alias_manually("chat", v1.alias, 1)
        served.follow()
        assert served.text("chat") == first


def test_a_registry_that_is_away_changes_nothing_for_what_is_loaded(serve, fleet, monkeypatch):
    with serve() as served:
        before = served.text("chat")

        def away(*_):
            raise StoreError("MLflow cannot be reached")

        with monkeypatch.context() as patch:
            for method in ("adapters", "versions", "adapter", "download"):
                patch.setattr(fleet.registry, method, away)
            patch.setattr(fleet.catalog, "versions", away)
            served.follow()
            assert served.text("chat") == before
            assert served.refused("code") == (503, "registry_unavailable")
            assert served.refused("unknown") == (503, "registry_unavailable")
            assert "MLflow cannot be reached" in served.ask("code").json()["error"]["message"]
        served.follow()
        assert served.text("code")
        assert served.text("chat") == before


def test_a_base_that_is_gone_from_the_registry_serves_nothing(serve, fleet, monkeypatch):
    with serve() as served:
        served.text("chat")
        monkeypatch.setattr(fleet.catalog, "versions", lambda family: ())
        served.follow()
        status, code = served.refused("chat")
        assert (status, code) == (503, "registry_unavailable")


def test_a_swapped_file_is_not_served_even_after_an_eviction(serve, fleet, tmp_path):
    other = lora_folder(tmp_path / "other", 7) / "adapter_model.safetensors"
    with serve() as served:
        served.text("chat")
        name = fleet.served("chat", "v1").engine_name
        path = tmp_path / "served" / name / other.name
        path.chmod(0o644)
        path.write_bytes(other.read_bytes())
        served.engine.evict(name)
        assert served.refused("chat") == (500, "adapter_damaged")
        assert served.text("code")


def test_a_deleted_folder_does_not_end_the_engine(serve, fleet, tmp_path):
    with serve() as served:
        before = served.text("chat")
        name = fleet.served("chat", "v1").engine_name
        shutil.rmtree(tmp_path / "served" / name)
        served.engine.evict(name)
        assert served.text("chat") == before
        assert served.client.get("/health").status_code == 200


def test_weights_that_were_swapped_in_the_registry_are_not_served(serve, fleet, tmp_path):
    files = fleet.registry._files["chat", 1]
    files["adapter_model.safetensors"] = (
        lora_folder(tmp_path / "other", 7) / "adapter_model.safetensors"
    ).read_bytes()
    with serve() as served:
        assert served.refused("chat") == (500, "adapter_damaged")
        assert served.engine.requests == {}


def test_an_adapter_that_the_engine_would_not_serve_as_trained_is_refused(serve, fleet):
    fleet.train("deep", fleet.base("v1"), layers=3)
    fleet.train("wide", fleet.base("v1"), rank=16)
    with serve() as served:
        for name, text in (("deep", "no module model.layers.2"), ("wide", "at most 8")):
            assert served.refused(name) == (422, "adapter_unsupported")
            assert text in served.ask(name).json()["error"]["message"]
        assert served.engine.requests == {}


def test_a_stream_has_the_name_that_the_client_asked_for(serve, fleet):
    with serve() as served:
        expected = served.text("chat")
        response = served.ask("chat", stream=True)
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if "{" in line]
        assert [event["model"] for event in events] == ["chat", "chat"]
        assert "".join(event["choices"][0]["text"] for event in events) == expected
        assert response.headers["trans-peft-version"] == fleet.served("chat", "v1").engine_name


def test_the_name_inside_of_a_text_is_left_as_it_is(serve, fleet):
    with serve() as served:
        inner = fleet.served("chat", "v1").engine_name
        prompt = f'{{"model":"{inner}"}}'
        response = served.ask("chat", prompt=prompt)
        assert response.json()["echo"]["prompt"] == prompt
        assert int(response.headers["content-length"]) == len(response.content)


def test_without_the_api_key_nothing_is_answered_and_no_name_is_told(serve, fleet, monkeypatch):
    with serve(api_key="secret") as served:
        for response in (
            served.ask("chat"),
            served.ask("unknown"),
            served.client.get("/v1/models"),
        ):
            assert response.status_code == 401
            assert response.json() == {"error": "Unauthorized"}
        assert not list(served.server.settings.folders.glob("chat*"))
    with serve(api_key="secret", headers={"authorization": "Bearer secret"}) as served:
        assert served.text("chat")
        fleet.registry.set_alias_manually("chat", fleet.base("v1").alias, None)
        served.follow()
        assert served.engine.requests == {}  # the middleware has the key to unload


def test_an_adapter_with_the_template_of_the_base_needs_nothing_more(serve, fleet, tmp_path):
    template = (fleet.bases["v1"] / "chat_template.jinja").read_text()
    draft = lora_folder(tmp_path / "draft", 5)
    write_template(draft, template)
    fleet._register(draft, "plain", fleet.base("v1"), None)
    messages = [{"role": "user", "content": "hi"}]
    with serve() as served:
        assert served.ask("plain", "/v1/chat/completions", messages=messages).status_code == 200
        assert "chat_template" not in served.engine.bodies[-1]


def test_an_adapter_with_a_template_of_its_own_is_asked_with_it(serve, fleet, tmp_path):
    template = "{{ messages[0]['content'] }}"
    draft = lora_folder(tmp_path / "draft", 5)
    (draft / "chat_template.jinja").write_text(template)
    fleet._register(draft, "styled", fleet.base("v1"), None)
    messages = [{"role": "user", "content": "hi"}]
    with serve() as served:
        for path in ("/v1/chat/completions", "/v1/responses"):
            assert served.refused("styled", path, messages=messages) == (422, "adapter_unsupported")
        assert served.ask("styled").status_code == 200
        assert served.ask("chat", "/v1/chat/completions", messages=messages).status_code == 200
        assert served.refused("chat", "/v1/chat/completions", chat_template="{{ 1 }}")[0] == 404
    with serve(trust_request_chat_template=True) as served:
        assert served.ask("styled", "/v1/chat/completions", messages=messages).status_code == 200
        assert served.engine.bodies[-1]["chat_template"] == template
        assert served.ask("chat", "/v1/chat/completions", messages=messages).status_code == 200
        assert "chat_template" not in served.engine.bodies[-1]


TEMPLATES = [
    {"chat_template": "{{ 1 }}"},
    {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    {"chat_template_kwargs": {"enable_thinking": False, "chat_template": None}},
]
WITH_TEMPLATE = [
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/embeddings", "/pooling", "/classify", "/tokenize",
    "/score", "/rerank",
]  # fmt: skip


@pytest.mark.parametrize("path", WITH_TEMPLATE)
@pytest.mark.parametrize("body", TEMPLATES)
def test_a_template_in_a_request_is_refused_on_every_route(serve, path, body):
    with serve(trust_request_chat_template=True, base_name="bare") as served:
        for name in ("chat", "bare"):
            assert served.refused(name, path, messages=[], **body) == (404, "route_closed")
        assert served.engine.bodies == []


def test_other_options_of_the_template_pass(serve):
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    with serve() as served:
        assert served.ask("chat", "/v1/chat/completions", messages=[], **options).status_code == 200
        assert served.engine.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/classify", "/tokenize"])
def test_a_chat_on_another_route_has_the_template_of_the_adapter(serve, fleet, tmp_path, path):
    template = "{{ messages[0]['content'] }}"
    draft = lora_folder(tmp_path / "draft", 5)
    (draft / "chat_template.jinja").write_text(template)
    fleet._register(draft, "styled", fleet.base("v1"), None)
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    with serve() as served:
        assert served.refused("styled", path, **chat) == (422, "adapter_unsupported")
        assert served.ask("styled", path).status_code == 200
    with serve(trust_request_chat_template=True) as served:
        assert served.ask("styled", path, **chat).status_code == 200
        assert served.engine.bodies[-1]["chat_template"] == template


def test_the_bare_base_never_answers_under_the_name_of_an_adapter(serve, fleet, monkeypatch):
    def away(*_):
        raise StoreError("MLflow cannot be reached")

    with serve("v2", base_name="chat") as served:
        fleet.registry.retire_manually("chat")
        served.follow()
        assert served.refused("chat") == (404, "adapter_unknown")
        assert [model["id"] for model in served.client.get("/v1/models").json()["data"]] == []
    for name in ("bare", "code", "chat", "chat@next"):
        with monkeypatch.context() as patch:
            patch.setattr(fleet.catalog, "versions", away)
            with serve("v2", base_name=name) as served:  # the registry is away from the start
                assert served.refused(name) == (503, "registry_unavailable")
    for name, refused in {"code": "adapter_not_served", "chat@next": "base_is_not_next"}.items():
        with serve("v2", base_name=name) as served:
            assert served.refused(name) == (404, refused)
            with monkeypatch.context() as patch:
                patch.setattr(fleet.catalog, "versions", away)
                served.follow()
                assert served.refused(name) == (503, "registry_unavailable")


ODD_FOLDERS = ["the folder is a file", "a dangling link in it", "part is a file", "use is a file"]


@pytest.mark.parametrize("case", ODD_FOLDERS)
def test_odd_files_in_the_folders_are_an_error_of_this_server(serve, fleet, tmp_path, case):
    code = tmp_path / "served" / fleet.served("code", "v1").engine_name
    state = tmp_path / "served" / ".state"
    with serve() as served:
        served.text("chat")
        if case == "the folder is a file":
            code.write_text("")
        elif case == "a dangling link in it":
            code.mkdir()
            (code / "x").symlink_to("/nowhere")
        else:
            name = case.partition(" ")[0]
            (state / name).rename(tmp_path / name)
            (state / name).write_text("")
        status, reason = served.refused("code")
        assert (status, reason) == (500, "adapter_damaged")
        assert "code version 1 cannot be loaded" in served.ask("code").json()["error"]["message"]
        assert served.text("chat")


def startup_message(app):
    """Return what the app sends to the server that starts it."""
    import asyncio

    sent = []

    async def run():
        async def receive():
            return {"type": "lifespan.startup"}

        async def send(message):
            sent.append(message)

        await app({"type": "lifespan", "state": {}}, receive, send)

    asyncio.run(run())
    return sent[-1]["type"], sent[-1].get("message", "")


def behind_middleware(fleet, model, tmp_path):
    engine = FakeEngine(model)
    settings = ServerSettings(fleet.family, tmp_path / "served")
    engine.app.add_middleware(
        ServeByVerdict, make_server=lambda: AdapterServer(settings, fleet.platform)
    )
    return engine


START = [
    ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"}, "asks no resolver"),
    ({"VLLM_SKIP_MODEL_NAME_VALIDATION": "1"}, "from the bare base"),
    ({"VLLM_PLUGINS": ""}, "does not list trans-peft"),
    ({"VLLM_PLUGINS": "lora_filesystem_resolver"}, "does not list trans-peft"),
]


@pytest.mark.parametrize(("variables", "problem"), START)
def test_settings_with_which_vllm_ignores_the_middleware_end_the_start(
    fleet, tmp_path, monkeypatch, variables, problem
):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    kind, message = startup_message(behind_middleware(fleet, str(fleet.bases["v1"]), tmp_path).app)
    assert kind == "lifespan.startup.failed"
    assert problem in message


@pytest.mark.parametrize("case", ["unknown base", "another base under the name", "no folder"])
def test_a_server_with_a_base_that_is_not_in_the_registry_does_not_start(
    fleet, tmp_path, tiny_bases, monkeypatch, case
):
    from tests.tiny import write_tiny_base

    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    folder = tmp_path / "v1"
    if case == "unknown base":
        write_tiny_base(folder, seed=9)
    elif case == "another base under the name":
        shutil.copytree(tiny_bases[0], folder)
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.1}))
    engine = behind_middleware(fleet, str(folder), tmp_path)
    kind, message = startup_message(engine.app)
    assert kind == "lifespan.startup.failed"
    assert ("is not a folder" if case == "no folder" else "no ready base version") in message
    assert not engine.started


def test_the_resolver_without_the_middleware_refuses_to_work(monkeypatch):
    from trans_peft.errors import InvalidSpecError
    from trans_peft.serving.vllm_plugin import folder_of

    with pytest.raises(InvalidSpecError, match="--middleware"):
        folder_of("chat.v1.0123456789ab")
