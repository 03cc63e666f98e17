"""The bridge starts reconcile when MLflow or S3 sends a notification.

A notification may be lost, duplicated or late, because reconcile reads the registry and never the
notification. The bridge therefore keeps no state. It answers 2xx once the run exists, 5xx when the
sender should try again, and 4xx for a request that can never succeed. Start it with
`python -m infra.bridge serve`; docs/triggers.md describes it.

    notifications.py   parses payloads of every sender into notifications
    authentication.py  checks MLflow's signatures and bearer tokens
    app.py             ASGI application: reads bounded bodies and answers requests
    protocol.py        HTTP/1.1 with a size limit and a deadline for headers
    dispatcher.py      finds or starts the run for a notification; concurrent ones share a call
    readiness.py       the shared, cached probe behind /ready
    registry.py        looks up in MLflow which family a notification concerns
    run_starter.py     finds and creates reconcile runs in Prefect
    prefect_calls.py   calls to Prefect with a timeout, on a client that is replaced
    loops.py           background loops that continue after exceptions
    queue.py           receives notifications from SQS
    first_verdict.py   measures the time from a notification to its first verdict
    metrics.py         Prometheus metrics
    logs.py            JSON log lines
    settings.py        environment variables
"""
