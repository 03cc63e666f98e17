"""The bridge: hints from MLflow and S3 become one call, "start the idempotent reconcile run".

A hint may be lost, doubled or late: reconcile reads the registry, never what a hint says. So the
bridge keeps nothing. It answers 2xx once the run exists, 5xx while that cannot be said (the sender
tries again), 4xx for what can never be right. `python -m infra.bridge serve`; docs/triggers.md.

    hints.py      every shape of payload: a hint, nothing, or never right
    senders.py    who may send: MLflow's signature, bearer tokens
    app.py        the ASGI application: bodies with a bound, answers
    protocol.py   HTTP/1.1 with a bound and a deadline for headers
    desk.py       one hint, one answer; hints that wait together share a call
    readiness.py  the shared, cached probe behind /ready
    registry.py   what a name in a hint is, asked of MLflow
    starter.py    the runs in Prefect
    prefect_calls.py  calls to Prefect with a deadline, through a client that is replaced
    loops.py      loops that survive what fails in one step
    queue.py      the other entrance: SQS
    verdicts.py   the first verdict of each hint, asked of Prefect's events
    metrics.py    counts and lags for Prometheus
    logs.py       one JSON object a line
    settings.py   the environment
"""
