"""A server that behaves as vLLM 0.32 was seen to behave (docs/serving.md), without a model.

Its answer is the SHA-256 of the weights file that it read when it loaded the adapter.
"""

import asyncio
import hashlib
import json
from argparse import Namespace
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from trans_peft.serving.vllm_plugin import folder_of


class FakeEngine:
    def __init__(self, model: str, api_key: str | None = None, **args):
        self.requests: dict[str, Path] = {}  # LoRA name -> folder, as in the API server
        self.memory: dict[str, str] = {}  # LoRA name -> what the engine has read
        self.is_dead = False
        self.waits = False  # requests wait before vLLM looks their adapter up
        self.bodies: list[dict] = []
        self.key = api_key
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
            Route("/adapters", self._load, methods=["POST"]),
            Route("/invocations", self._complete, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/responses", self._complete, methods=["POST"]),
            *(
                Route(path, self._complete, methods=["POST"])
                for path in ("/v1/embeddings", "/pooling", "/classify", "/tokenize")
            ),
        ]
        self.started = False

        @asynccontextmanager
        async def lifespan(app):
            self.started = True
            yield

        self.app = Starlette(routes=routes, lifespan=lifespan)
        self.app.state.args = Namespace(
            model=model, served_model_name=None, max_lora_rank=8,
            api_key=[api_key] if api_key else None, **args,
        )  # fmt: skip

    def evict(self, name: str) -> None:
        """What the engine does when others need its memory."""
        self.memory.pop(name)

    def _denied(self, request):
        wanted = f"Bearer {self.key}"
        if self.key and request.headers.get("authorization") != wanted:
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    async def _health(self, request):
        return PlainTextResponse("", 503 if self.is_dead else 200)

    async def _models(self, request):
        return self._denied(request) or JSONResponse({"data": [{"id": n} for n in self.requests]})

    async def _load(self, request):
        body = await request.json()
        self.requests[body["lora_name"]] = Path(body["lora_path"])
        return PlainTextResponse("Success")

    async def _unload(self, request):
        if (denied := self._denied(request)) is not None:
            return denied
        name = (await request.json())["lora_name"]
        if self.requests.pop(name, None) is None:
            return JSONResponse({"error": "not found"}, 404)
        return PlainTextResponse("Success")

    async def _complete(self, request):
        if (denied := self._denied(request)) is not None:
            return denied
        body = await request.json()
        self.bodies.append(body)
        while self.waits:
            await asyncio.sleep(0.01)
        name = body.get("model")
        if self.is_dead:
            return JSONResponse({"error": "EngineDeadError"}, 500)
        if not name or name == self.app.state.args.model:
            return self._answer(body, name, "bare base")
        if name not in self.requests:
            folder = folder_of(name)
            if folder is None:
                return JSONResponse({"error": "does not exist"}, 404)
            self.requests[name] = Path(folder)
        if name not in self.memory:
            try:
                data = (self.requests[name] / "adapter_model.safetensors").read_bytes()
            except OSError:
                self.is_dead = True
                return JSONResponse({"error": "EngineDeadError"}, 500)
            self.memory[name] = hashlib.sha256(data).hexdigest()
        return self._answer(body, name, self.memory[name])

    def _answer(self, body, name, text):
        if not body.get("stream"):
            return JSONResponse({"model": name, "choices": [{"text": text}], "echo": body})

        async def events():
            for part in (text[:5], text[5:]):
                event = {"model": name, "choices": [{"text": part}]}
                yield f"data: {json.dumps(event, separators=(',', ':'))}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def answer_of(folder: Path) -> str:
    """Return what the engine answers with the adapter in a folder."""
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
