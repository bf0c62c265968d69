"""Benchmarks of fastris: speed and memory of operators and model, every arm checked before it is timed.

``fastris bench --help``, or ``python -m bench --help`` in a checkout; the folder is imported as ``fastris.bench``.
``python -m pytest bench --benchmark-only`` runs the same cases through pytest-benchmark.

    command.py     the command
    cases/         what is measured (table.py), what is compared (arms.py), and how both are built
    timing/        rounds, an arm's numbers against float64 before its time counts, rooflines, traces
    memory/        bytes kept for the backward pass; ``python -m bench.memory`` for the whole training step
    modelled/      cards that nobody has measured: ``python -m bench.modelled.cards``
    report/        tables.py prints a result file, compare.py what moved, charts.py draws, docs.py fills pages
    studies/       questions of their own: looking once, the data loader, float16 sums
    results/       result files, one per device
"""
