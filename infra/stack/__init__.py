"""The whole platform on one machine, from Python packages alone: `python -m infra.stack up`.

It runs MLflow (tracking and registry), Prefect (server and one worker), SeaweedFS (S3), the
bridge, the fleet page and the exporter of metrics, with small databases, under supervisor. They
write below one state folder, which can be deleted, and listen on 127.0.0.1 only. infra/README.md
describes installations on more machines.

    settings.py         environment variables, and the URLs and environments that they imply
    programs.py         command and environment of each of the seven programs
    seaweed.py          the S3 server, which refuses requests without credentials on all its ports
    supervisor.py       the process manager: configuration, start, requests
    machine.py          ports and processes of this machine
    job_template.py     the variables of a flow run, without command and environment
    prefect_objects.py  Prefect's work pool, queues, GPU slots and automation
    interrupted.py      marks flow runs that a stopped worker left as crashed
    health.py           health checks of the programs
    stack.py            up, down, status
"""
