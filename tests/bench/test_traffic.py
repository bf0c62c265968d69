"""The model of a training step counts what runs, adds up, and says that it is a model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from fastris import CRIS, CRISConfig, use_impl
from fastris.bench.cases.table import CASES
from fastris.bench.modelled import cards, traffic
from fastris.bench.modelled.traffic import Traffic
from fastris.bench.report import charts, pages


@pytest.fixture(scope="module")
def stages():
    """Path -> stage -> operations of a tiny model's step."""
    return traffic.count_stages(2, "tiny")


def counted(work):
    with Traffic() as seen:
        work()
    return [(o.name.removeprefix("aten."), o.flops, o.bytes) for o in seen.operations]


def totals(operations):
    return {key: sum(o[key] * o["count"] for o in operations) for key in ("flops", "bytes")}


def test_a_product_reads_its_factors_and_writes_its_result_once():
    left, right = torch.ones(4, 8), torch.ones(8, 3)
    assert counted(lambda: left @ right) == [("mm", 2 * 4 * 8 * 3, 4 * (4 * 8 + 8 * 3 + 4 * 3))]


def test_views_and_empty_memory_cost_nothing_and_expanded_axes_count_once():
    x = torch.ones(5, 6)
    assert counted(lambda: (x.t(), x[2:], x.view(30), x.expand(7, 5, 6), torch.empty_like(x))) == []
    assert counted(lambda: x[:1].expand(5, 6) + x) == [("add", 0, 4 * (6 + 30 + 30))]


def test_what_is_changed_in_place_is_read_and_written_and_what_is_overwritten_only_written():
    x, y = torch.ones(10), torch.ones(10)
    assert counted(lambda: x.add_(y)) == [("add_", 0, 4 * 30)]
    assert counted(lambda: x.copy_(y)) == [("copy_", 0, 4 * 20)]
    assert counted(lambda: x.zero_()) == [("zero_", 0, 4 * 10)]


def test_a_table_is_read_only_where_it_is_looked_up():
    table, rows = torch.ones(1000, 8), torch.tensor([1, 2, 3])
    assert counted(lambda: F.embedding(rows, table)) == [("embedding", 0, 4 * 3 * 8 * 2 + 8 * 3)]


def test_both_gradients_of_a_grouped_convolution_cost_what_its_forward_pass_does():
    x, weight = torch.ones(1, 8, 5, 5, requires_grad=True), torch.ones(4, 2, 3, 3, requires_grad=True)
    operations = counted(lambda: F.conv2d(x, weight, padding=1, groups=4).sum().backward())
    flops = {name: flops for name, flops, _ in operations if flops}
    assert flops == {"convolution": 2 * 25 * 4 * 2 * 9, "convolution_backward": 2 * 2 * 25 * 4 * 2 * 9}


def test_an_operation_takes_the_longest_of_products_bytes_and_launch():
    rates = cards.Rates(low=1e9, wide=1e8, bytes=1e6, launch=1e-3)
    one = {"flops": 0, "bytes": 0, "wide": False, "count": 1}
    assert rates.milliseconds([one]) == pytest.approx(1)
    assert rates.milliseconds([{**one, "flops": 10**7}]) == pytest.approx(10)
    assert rates.milliseconds([{**one, "flops": 10**7, "wide": True}]) == pytest.approx(100)
    assert rates.milliseconds([{**one, "flops": 10**7, "bytes": 10**5, "count": 2}]) == pytest.approx(200)


@pytest.mark.parametrize(
    ("name", "published"),
    [("RTX 3060 12GB", 25.5), ("RTX 4070", 58.3), ("RTX 4090", 165.2), ("RTX 5090", 209.5), ("H200", 989)],
)
def test_matrix_rates_are_the_vendors_dense_ones_with_float32_sums(name, published):
    (card,) = [card for card in cards.CARDS if card.name == name]
    assert card.matrix_rate / 1e12 == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize("path", ["reference", "torch"])
def test_stages_add_up_to_the_whole_step(stages, path):
    config = dataclasses.replace(CRISConfig.preset("tiny"), dropout=0.0)
    with traffic.shapes_of(path, gpu=True):
        model = CRIS(config).train()
        data = torch.empty(2, 3, 96, 96), torch.ones(2, config.word_len, dtype=torch.int64), torch.empty(2, 1, 96, 96)
        _, whole = traffic.count_training(lambda: model(*data)[2], [], torch.bfloat16)
    together = {key: sum(totals(o)[key] for o in stages[path].values()) for key in ("flops", "bytes")}
    assert together["flops"] == totals(whole)["flops"]
    assert together["bytes"] - totals(stages[path]["Adam"])["bytes"] == pytest.approx(totals(whole)["bytes"], rel=0.02)


def test_repaired_moves_fewer_bytes_and_the_algebra_multiplies_less(stages):
    sums = {
        path: {key: sum(totals(o)[key] for o in counted.values()) for key in ("flops", "bytes")}
        for path, counted in stages.items()
    }
    assert sums["repaired"]["bytes"] < sums["reference"]["bytes"]
    assert sums["torch"]["flops"] < sums["reference"]["flops"]


def test_counting_leaves_no_tensor_without_numbers_behind():
    case = next(case for case in CASES if case.name == "decoder")
    small = dataclasses.replace(case, sizes={**case.sizes, **case.small})
    traffic.count_case(small, "torch", torch.float32, gpu=False)
    with use_impl("torch"):
        problem = small.problem()
        assert torch.isfinite(problem.forward()[0]).all()


def test_kernels_multiply_as_the_algebra_does_and_move_fewer_bytes():
    batch, side = 2, 26
    with traffic.shapes_of("torch", gpu=True):
        for plain, kernels in (
            (
                traffic._counted_upsampling(batch, 512, 512, side),
                traffic.upsampling_kernels(batch, 512, 512, side),
            ),
            (traffic._counted_similarity(batch, 256, 104), traffic.similarity_kernels(batch, 256, 104)),
        ):
            launches = traffic.merged(kernels)
            assert totals(launches)["bytes"] < totals(plain)["bytes"]
            assert totals(launches)["flops"] == pytest.approx(totals(plain)["flops"], rel=0.2)


def test_every_table_of_the_page_says_that_it_is_modelled():
    content = pages.load_model(cards.RESULT)
    page = pages.cards_page(content, "x.json")
    assert page.startswith("**Modelled, not measured:**")
    for table in [part for part in page.split("\n\n") if part.startswith("|")]:
        head = page[: page.index(table)].splitlines()[-2] + table.splitlines()[0]
        assert "odelled" in head or "share" in head or "card" in head, table
    assert "Modelled, not measured" in charts.cards_chart(content).title


def test_a_file_of_something_else_is_no_model(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"format": 1, "cases": []}))
    with pytest.raises(ValueError, match=r"other\.json is not of this version's python -m bench\.modelled\.cards"):
        pages.load_model(path)
    assert cards.main(["--help"]) == 2
