"""The plugin for vLLM (entry point `vllm.general_plugins`): a resolver of prepared adapters.

vLLM asks a resolver for the folder of a LoRA name that it has not loaded. This one only returns
folders that the middleware has prepared (`vllm_middleware`), under names that contain the version
and the hash. Seen with vLLM 0.32.
"""

import os

from trans_peft.errors import InvalidSpecError
from trans_peft.serving.adapter_server import current

__all__ = ["folder_of", "register"]


def register() -> None:
    """Register the resolver, if `TRANS_PEFT_SERVE_FAMILY` is set. vLLM calls it in each process."""
    if not os.environ.get("TRANS_PEFT_SERVE_FAMILY"):
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class VerdictResolver(LoRAResolver):
        """Returns the folder of an adapter version that serves on this server's base."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            folder = folder_of(lora_name)
            if folder is None:
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=folder)

    name = "trans-peft"
    if name not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(name, VerdictResolver())


def folder_of(lora_name: str) -> str | None:
    """Return the folder to load under a name, or None. Raises InvalidSpecError without middleware.

    Without the middleware, nothing would follow the registry.
    """
    server = current()
    if server is None:
        raise InvalidSpecError(
            "this server does not follow the registry",
            expected="--middleware trans_peft.serving.vllm_middleware.ServeByVerdict",
            found="the plugin alone, which would keep old versions",
            do="start the server with that argument",
        )
    folder = server.load(lora_name)
    return None if folder is None else str(folder)
