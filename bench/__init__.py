"""Benchmarks: `python -m bench SUITE --out DIR`, `python -m bench report DIR`, `python -m bench compare A.json B.json`.

Data flow, one way: shapes → workload (adapters with X, S and `.grad`) → a suite's candidates → measure (check, then
time in alternation) → results (one JSON per suite) → report and compare. A candidate whose check fails is reported
with its error and never timed.

    shapes.py       layers of named models
    workload.py     those layers with captured activations; costs.py: what a step must read and write
    measure.py      checks, alternation, quantiles, operations, memory; cuda.py: graph replay on a cold cache
    loop.py         the method as a per-layer loop, the yardstick and the oracle of the `step` suite
    suites/         lorsum, solve, step, train, scaling, products; `cpu` and `gpu` are selections of them
    report.py       page.html, and the tables of docs/benchmarks.md; targets.py: which goals hold
"""
