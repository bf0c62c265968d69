"""The study of MagNet's training parts: four arms that differ in nothing but their switches, and no work done twice."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastris.bench.report import docs
from fastris.bench.report.switches import switches_page
from fastris.bench.studies import switches as study
from fastris.commands import demo
from fastris.training import from_scratch

SHORT = ["steps=2", "images=2", "scenes=3", "held_out=2", "threads=1"]
ARMS = {
    "none": {},
    "mask_grounding": {"mask_grounding": 1.0},
    "alignment_loss": {"alignment_loss": 0.5},
    "both": {"mask_grounding": 1.0, "alignment_loss": 0.5},
}


class Seen:
    """What each training that is asked for begins with, sees, and gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starts, self.batches, self.learnt = [], [], []
        train, learn, batch = from_scratch.train, demo.learn, from_scratch._batch

        def start(model, dataset, **options):
            self.starts.append({name: value.clone() for name, value in model.state_dict().items()})
            self.batches.append([])
            monkeypatch.setattr(from_scratch, "_batch", noted)
            try:
                return train(model, dataset, **options)
            finally:
                monkeypatch.setattr(from_scratch, "_batch", batch)

        def noted(*arguments):
            self.batches[-1].append(batch(*arguments))
            return self.batches[-1][-1]

        def learn_and_keep(*arguments, **options):
            self.learnt.append(learn(*arguments, **options))
            return self.learnt[-1]

        monkeypatch.setattr(from_scratch, "train", start)
        monkeypatch.setattr(demo, "learn", learn_and_keep)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(file, its content, what was seen) of one seed."""
    path = tmp_path_factory.mktemp("switches") / "found.json"
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        assert study.main([*SHORT, f"json={path}"]) == 0
    return path, json.loads(path.read_text()), seen


def test_four_arms_start_alike_and_see_the_same_scenes_and_phrases(measured):
    _, _, seen = measured
    (first, *others), (batches, *other_batches) = seen.starts, seen.batches
    assert len(others) == len(other_batches) == 3 and len(batches) == 2
    for start in others:
        assert all(torch.equal(start[name], value) for name, value in first.items())
    for found in other_batches:
        assert all(torch.equal(*pair) for step in zip(batches, found, strict=True) for pair in zip(*step, strict=True))
    held_out = [[each.sentence for each in learnt.right.samples] for learnt in seen.learnt]
    assert all(sentences == held_out[0] for sentences in held_out)


def test_each_arm_trains_with_the_switches_that_it_says_and_none_is_the_demo(measured, tmp_path):
    _, content, seen = measured
    assert [(each["arm"], each["switches"]) for each in content["runs"]] == list(ARMS.items())
    losses = dict(zip(ARMS, (learnt.losses[0] for learnt in seen.learnt), strict=True))
    assert losses["mask_grounding"] > losses["none"] + 9  # guessing one of 49,408 words costs 10.8 nats
    assert losses["none"] + 1 < losses["alignment_loss"] < losses["mask_grounding"] < losses["both"] - 1
    for run in content["runs"]:
        assert ("masked_accuracy" in run.get("hidden_words", {})) == ("mask_grounding" in run["switches"])
    options = dict(pair.split("=") for pair in SHORT)
    demo.run(demo.DemoConfig(out=str(tmp_path), progress=False, **{name: int(text) for name, text in options.items()}))
    alone, none = json.loads((tmp_path / "metrics.json").read_text()), content["runs"][0]
    assert all(none[name] == alone[name] for name in alone if name != "seconds")


def test_finished_runs_are_taken_from_the_file_and_an_interrupted_one_is_trained(
    measured, tmp_path, monkeypatch, capsys
):
    _, content, _ = measured
    path = tmp_path / "found.json"
    path.write_text(json.dumps({**content, "runs": content["runs"][:2]}))
    asked = []

    def train_arm(config, arm, seed, stop):
        asked.append(arm)
        if arm == "both" and asked.count("both") == 1:
            raise KeyboardInterrupt
        return {name: content["runs"][list(ARMS).index(arm)][name] for name in content["runs"][2]}

    monkeypatch.setattr(study, "train_arm", train_arm)
    assert study.main([*SHORT, f"json={path}"]) == 130
    out, err = capsys.readouterr()
    assert asked == ["alignment_loss", "both"] and "1 of 4 runs are to come; the same command goes on" in err
    assert "| both | - |" in out and "Not trained yet: both with seed 0." in out
    assert [each["arm"] for each in json.loads(path.read_text())["runs"]] == list(ARMS)[:3]
    assert study.main([*SHORT, f"json={path}"]) == 0
    assert asked == ["alignment_loss", "both", "both"]
    assert "Not trained yet" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["steps=0"], "steps and held_out must be at least 1, images at least 2"),
        (["seeds=1,1"], "seeds must be different numbers of at least 0, got 1,1"),
        (["seeds=-1"], "seeds must be different numbers of at least 0, got -1"),
        (["threads=0"], "threads=0 must lie in 1..1024"),
        (["stepz=3"], "unknown option stepz; did you mean steps?"),
        (["steps=3"], "holds runs with steps 2, which are not to be compared with those of 3; give json=ANOTHER_FILE"),
    ],
)
def test_wrong_options_and_runs_that_are_not_to_be_compared_are_one_line(measured, options, message, capsys):
    path = measured[0]
    before = path.read_bytes()
    assert study.main([*SHORT, f"json={path}", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert path.read_bytes() == before


def test_a_file_of_something_else_is_refused_and_stays(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text('{"format": 1, "cases": []}')
    assert study.main([*SHORT, f"json={path}"]) == 2
    assert "is not of this version's python -m bench.studies.switches; remove it" in capsys.readouterr().err
    assert path.read_text() == '{"format": 1, "cases": []}'


def test_table_has_the_mean_over_seeds_and_from_the_least_to_the_most(measured):
    content = json.loads(json.dumps(measured[1]))
    for run in content["runs"]:
        run["right_phrase"]["mIoU"], run["right_phrase"]["oIoU"] = 0.5, 0.25
        run["other_objects_phrase"]["mIoU"] = 0.125
        if "hidden_words" in run:
            run["hidden_words"] |= {"masked_accuracy": 0.75, "most_frequent_share": 0.0625}
    assert "| none | 50.0 % | 25.0 % | 12.5 % | - | - |" in switches_page(content, "x.json")
    assert "| `mask_grounding=1.0` | 50.0 % | 25.0 % | 12.5 % | 75.0 % | 6.2 % |" in switches_page(content, "x.json")
    assert "One seed: what of a difference is chance is not known." in switches_page(content, "x.json")
    second = [{**run, "seed": 1, "right_phrase": {"mIoU": 0.75, "oIoU": 0.25}} for run in content["runs"]]
    content["runs"] += second
    page = switches_page(content, "x.json")
    assert "| none | 62.5 % (50.0 to 75.0) | 25.0 % (25.0 to 25.0) |" in page
    assert "Seeds 0, 1: the mean, and from the least to the most." in page and "One seed" not in page


def test_page_names_the_command_until_the_file_is_there_and_shows_it_then(measured, tmp_path):
    command = "`python -m bench.studies.switches json=bench/results/switches.json`"
    assert docs.block(tmp_path, "switches") == f"Not measured yet: {command}."
    (tmp_path / docs.RESULTS).mkdir(parents=True)
    (tmp_path / docs.RESULTS / "switches.json").write_bytes(measured[0].read_bytes())
    shown = docs.block(tmp_path, "switches")
    assert shown == switches_page(measured[1], "bench/results/switches.json") and shown.startswith("|   | right phrase")


def test_default_is_what_the_demo_trains():
    lesson = dataclasses.asdict(study.SwitchesConfig().lesson(0))
    free = {"progress": False}
    assert lesson == dataclasses.asdict(demo.DemoConfig()) | free
