"""The first hour on a GPU: what ``python -m bench.gpu_hour`` does, step by step.

    plan.py       the steps in their order: what each is for, its share of the time, where its work is written
    runner.py     does them, each as a process of its own in a time box; goes on where an earlier start ended
    boxed.py      one process in its time box: ended with all its children when the box is full or nothing moves
    record.py     the files in the folder, and what makes a finished step stale
    work.py       the process of a step: ``python -m bench.hour.work STEP FOLDER ...``
    device.py tests.py sanitizer.py kernels.py tune.py training.py profile.py curve.py
                  a step each: ``items(place)`` gives its measurements one by one
    problems.py   what the steps measure: cases and arms, at the sizes of a GPU or of a CPU
    summary.py    summary.md: the goals beside what was measured, and how every step ended

A step is a list of items. Each is on disk before the next begins, so that whatever ends a step (its time box, Ctrl-C,
an illegal memory access) costs one item.
"""
