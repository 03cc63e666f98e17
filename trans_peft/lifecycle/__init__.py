"""The verbs: ingest, train, adopt, transfer, reconcile, resolve. Each takes a `Platform`."""
