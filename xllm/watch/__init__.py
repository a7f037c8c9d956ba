"""Looks at an engine from outside: what steps it runs (`executor.py`), where its time goes (`profiler.py`), and what of
that is written for others to read (`chrome.py`, `flame.py`). Nothing here changes what is computed."""
