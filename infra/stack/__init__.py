"""The whole platform on one machine, from Python packages alone: `python -m infra.stack up`.

Real servers, small databases: MLflow (tracking and registry), Prefect (server and one worker),
SeaweedFS (S3) and the bridge between them, kept alive by supervisor. Everything they write lies
below one state folder that can be deleted, and they listen on 127.0.0.1 only. For more than one
machine see infra/README.md.

    settings.py         what a person may choose, and what follows from it: URLs, environments
    programs.py         the five programs: command and environment of each
    seaweed.py          the S3 server, with every other port of it closed
    supervisor.py       the process manager: its configuration, starting it, asking it
    machine.py          ports and processes of this machine
    job_template.py     what a flow run may choose: no command, no environment
    prefect_objects.py  what a fresh Prefect server needs: pool, queues, GPU slots, automation
    interrupted.py      flow runs that a stopped worker left are told to Prefect
    health.py           whether each program answers
    stack.py            up, down, status
"""
