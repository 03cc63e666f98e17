# The postgres image runs this on an empty volume: one database and one user for each server. Prefect
# searches by trigram.
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" \
  --set mlflow="$MLFLOW_PASSWORD" --set prefect="$PREFECT_PASSWORD" <<'SQL'
CREATE USER mlflow PASSWORD :'mlflow';
CREATE USER prefect PASSWORD :'prefect';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE prefect OWNER prefect;
REVOKE CONNECT ON DATABASE mlflow, prefect FROM PUBLIC;
\connect prefect
CREATE EXTENSION IF NOT EXISTS pg_trgm;
SQL
