-- The postgres image runs this on an empty volume. Prefect searches by trigram.
CREATE DATABASE mlflow;
CREATE DATABASE prefect;
\connect prefect
CREATE EXTENSION IF NOT EXISTS pg_trgm;
