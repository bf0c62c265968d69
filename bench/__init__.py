"""Benchmarks of fastris: speed and memory of operators and model, every arm checked before it is timed.

``fastris bench --help``, or ``python -m bench --help`` in a checkout; the folder is imported as ``fastris.bench``.
``python -m pytest bench --benchmark-only`` runs the same cases through pytest-benchmark.

    command.py     the command; options.py its options, and what the ``python -m bench.*`` commands share
    memory.py      what the model's whole training step keeps and needs: ``python -m bench.memory``
    switch_memory.py  what CRIS's switches add to that, for training's settings of small GPUs
    counter.py     the one counter of bytes kept for the backward pass
    cases/         what is measured (table.py), what is compared (arms.py), and how both are built
    timing/        rounds, an arm's numbers against float64 before its time counts, rooflines, traces
    report/        results.py reads files and says what is best; tables, pages, charts, what moved; docs.py fills pages
    gpu_hour.py    what a GPU is needed for, as one command: ``python -m bench.gpu_hour``; hour/ has its steps
    modelled/      cards that nobody has measured: ``python -m bench.modelled.cards``
    studies/       questions of their own: looking once, the data loader, float16 sums, training parts
    results/       result files, one per device

Imports run one way: command, gpu_hour, memory, modelled and studies know report, which knows timing, which knows cases.
"""
