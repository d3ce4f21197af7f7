"""What the appliance keeps: files, jobs, events, adapters, the predictor's fit, usage, in SQLite.

`database` runs functions on one writer thread; `files`, `jobs`, `adapters` and `predictor` are those
functions; `usage` is a database of its own; `lock` keeps a second appliance out. Knows neither torch nor
aiohttp.
"""
