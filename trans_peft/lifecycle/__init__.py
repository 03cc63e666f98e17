"""Operations on a `Platform`: ingest, train, adopt, transfer, reconcile, promote, resolve."""
