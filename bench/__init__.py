"""Benchmarks of fastris: speed and memory of operators and model, every arm checked before it is timed.

Run from a checkout as ``python -m bench --help``; ``python -m bench.report FILE`` prints a result file as Markdown.

    cases.py    what is measured: one table of cases, and how each is built
    arms.py     what is compared: one table of implementations
    problem.py  a case made concrete: a module and tensors, in one dtype on one device
    check.py    an arm's numbers against float64, before its time counts
    harness.py  rounds, timing, and what happens when an arm fails
    memory.py   bytes that the forward pass keeps for the backward pass
    machine.py  what the numbers were measured on
    loader.py   what the data loader delivers, beside what a step needs: python -m bench.loader
    report.py   tables from result files
    results/    result files, one per device
"""
