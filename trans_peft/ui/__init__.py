"""The fleet page: a read-only web application that shows fleets, adapters and verdicts.

`trans-peft ui` starts it. It reads through the ports (`trans_peft.ports.Platform`) alone and writes
nothing. The same views are served as pages and, below `/api`, as JSON.

    settings.py    what an operator sets            snapshots.py  families, read in the background
    index.py       rows of one family, selection    progress.py   what the desired state lacks
    life.py        an adapter, a base version       verdict.py    a verdict and its flipped items
    picture.py     intervals as SVG coordinates     links.py      pages of MLflow and Prefect
    reader.py      all views over one platform      formats.py    figures and states as text
    app.py         pages, JSON and errors           headers.py    security headers
"""
