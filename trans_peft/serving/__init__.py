"""Serve adapters by verdict: an adapter answers on a base only where its version serves there.

`manifest` states which adapters serve on one base. `folders` keeps their files for a server, and
`export` writes them for other servers. `router`, `adapter_server` and the two `vllm_` modules make
a vLLM server follow the registry. `pyfunc` is what MLflow loads.
"""
