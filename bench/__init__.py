"""Benchmarks of fastris: speed and memory of operators and model, every arm checked before it is timed.

``fastris bench --help``, or ``python -m bench --help`` in a checkout; the folder is imported as ``fastris.bench``.
``python -m bench.report.tables FILE`` prints a result file as Markdown, ``python -m bench.report.compare OLD NEW`` what moved, and
``python -m pytest bench --benchmark-only`` runs the same cases through pytest-benchmark.

    cases.py       what is measured: one table of cases; builders.py and stages.py make them
    arms.py        what is compared: one table of implementations; repaired.py is the strong baseline
    problem.py     a case made concrete: a module and tensors, in one dtype on one device
    check.py       an arm's numbers against float64, before its time counts, by the rule of bounds.py
    harness.py     rounds, timing, memory of a step, and what happens when an arm fails
    roofline.py    operations, compulsory bytes, and the two ceilings measured in the same run
    memory.py      bytes that the forward pass keeps for the backward pass, by stages of the model
    live.py        what is alive between forward and backward; whole.py counts the whole model with it, recompute.py
                   is ``python -m bench.memory.kept``, accumulation.py float16 sums
    machine.py     what the numbers were measured on
    command.py     the command; report.py and details.py print its tables
    compare.py     what moved beyond noise since an older result file
    tracing.py     traces with named stages
    test_cases.py  the cases under pytest-benchmark
    charts.py      charts of result files as SVG
    readme.py      README's blocks and charts, generated; ``--check`` says where they disagree with the result files
    look_once.py   several expressions about one image, against asking one by one
    cards.py       a model of the training step on cards that were not measured: traffic.py counts operations,
                   step_traffic.py the stages of a step, kernel_traffic.py what the Triton kernels move
    loader.py      what the data loader delivers, beside what a step needs: ``python -m bench.studies.loader``
    results/       result files, one per device
"""
