"""Machine code is read right, occupancy is as the programming guide says, and what got worse is found and named."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

pytest.importorskip("triton")

from fastris.gate import listing, sass, tables
from fastris.gate.builds import Build
from fastris.gate.listing import LISTED, Row
from fastris.gate.work import Work

LISTING = """
	.target	sm_86
.text._some_kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   IMAD.WIDE R2, R0, 0x10, R8 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 LDG.E.128 R12, desc[UR4][R2.64] ;
        /*0040*/                   IMAD.WIDE R16, R0.reuse, 0x10, R8 ;
        /*0050*/                   LDG.E.128 R20, [R16.64] ;
        /*0060*/                   LDG.E.128 R20, [R16.64+0x10] ;
        /*0070*/                   LDG.E.64 R24, [R16.64] ;
        /*0080*/                   IMAD.WIDE R16, R1, 0x10, R8 ;
        /*0090*/                   LDG.E.U16 R24, [R16.64] ;
.L_x_1:
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R48+0x800], [R2.64] ;
.L_x_0:
        /*00b0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00c0*/                   HMMA.16816.F32.BF16 R4, R8, R14, R4 ;
        /*00d0*/               @P0 BRA `(.L_x_0) ;
        /*00e0*/              @!P1 BRA `(.L_x_1) ;
        /*00f0*/                   STG.E.64 [R2.64], R4 ;
        /*0100*/                   EXIT ;
.L_x_2:
        /*0110*/                   BRA `(.L_x_2);
        /*0120*/                   NOP;
"""


def test_instructions_are_counted_by_loop_and_padding_is_not():
    found = sass.counts(LISTING)
    assert found.instructions == (12, 2, 3)
    assert found.matrix == Counter({"HMMA.16816.F32.BF16": 2})
    assert found.products == (0, 0, 2 * 16 * 8 * 16)


def test_widths_of_global_memory_are_in_bytes_a_thread():
    found = sass.counts(LISTING)
    assert found.loads == Counter({16: 5, 8: 1, 2: 1}) and found.stores == Counter({8: 1})


def test_loads_of_the_same_value_offset_and_width_are_redundant_in_straight_code_alone():
    repeats = LISTING.replace("LDG.E.128 R12, desc[UR4][R2.64]", "NOP")
    another_value = LISTING.replace("R16, R0.reuse", "R16, R1")
    behind_a_label = LISTING.replace("        /*0050*/", ".L_x_3:\n        /*0050*/")
    assert [sass.counts(each).redundant_loads for each in (LISTING, repeats, another_value, behind_a_label)] == [
        2,
        1,
        1,
        1,
    ]


def test_products_without_tensor_cores_are_those_of_ffma():
    code = "        /*0000*/                   FFMA R0, R1, R2, R0 ;\n        /*0010*/                   EXIT ;\n"
    assert sass.counts(code).products == (32,)


def test_group_products_of_four_warps_are_shared_among_them():
    code = "        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;\n"
    assert sass.counts(code).products == (64 * 64 * 16 // 4,)


def test_an_empty_listing_is_an_error():
    with pytest.raises(ValueError, match="no instruction"):
        sass.counts(".target sm_86")


def a_build(**changes) -> Build:
    build = Build("similarity taps: train", 4, "sm_86", "bfloat16", 20_000, 64, 0, 101_376)
    return dataclasses.replace(build, **changes)


@pytest.mark.parametrize(
    ("changes", "arch", "warps", "limit"),
    [
        ({"registers": 32, "shared": 0}, "sm_86", 48, "full"),
        ({"registers": 168, "shared": 0}, "sm_86", 12, "registers"),
        ({"registers": 65, "shared": 0, "num_warps": 8}, "sm_90", 24, "registers"),
        ({"shared": 49_152}, "sm_86", 8, "shared memory"),
        ({"shared": 49_152}, "sm_90", 16, "shared memory"),
        ({"registers": 16, "shared": 0, "num_warps": 1}, "sm_86", 16, "block slots"),
    ],
)
def test_warps_that_stay_are_limited_as_the_programming_guide_says(changes, arch, warps, limit):
    assert listing.resident_warps(a_build(**changes), LISTED[arch][1]) == (warps, limit)


def test_unrolled_loops_count_as_often_as_their_products_say():
    counted = sass.Counts((10, 20), Counter(), Counter(), Counter(), 0, (0, 4096))
    rolled, unrolled = (Work(1, 1, 1, padded, (8,), 1) for padded in (8 * 4096 * 4, 2 * 4096 * 4))
    assert listing._executed(counted, rolled, 4) == 10 + 20 * 8
    assert listing._executed(counted, unrolled, 4) == 10 + 20 * 2


ROW = Row(
    "similarity taps: train", "bfloat16", 64, 0, 20_000, 24, "registers", 16, 16.0, 8.0, "128b:40", 40, 0, 700, 100.0,
    1.2, 0.1, 0.4, "memory", 1.0,
)  # fmt: skip


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "sm_86.csv"
    path.write_text(tables.text("sm_86", [ROW]))
    return path


def test_a_table_survives_its_file(table):
    assert tables.read(table) == (tables.triton.__version__, {(ROW.name, ROW.dtype): ROW})


def test_the_same_and_the_better_pass(table):
    better = dataclasses.replace(ROW, registers=40, warps=48, load_bytes=16.0, store_bytes=16.0)
    assert tables.compare("sm_86", [ROW], table) == ([], [])
    assert tables.compare("sm_86", [better], table) == ([], [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack": 8}, "8 bytes of stack, 0 in the table"),
        ({"warps": 16, "limit": "shared memory"}, r"16 warps stay \(shared memory\), 24 in the table"),
        ({"load_bytes": 8.0}, "loads of 8.0 bytes, 16.0 before"),
        ({"store_bytes": 4.0}, "stores of 4.0 bytes, 8.0 before"),
    ],
)
def test_what_got_worse_is_named_with_kernel_card_and_the_way_to_refresh(table, change, words):
    failures, remarks = tables.compare("sm_86", [dataclasses.replace(ROW, **change)], table)
    assert len(failures) == 1 and not remarks
    with pytest.raises(
        AssertionError, match=f"similarity taps: train .bfloat16. on sm_86 got worse: {words}; .*--refresh"
    ):
        raise AssertionError(failures[0])


def test_builds_that_the_table_does_not_know_are_remarked_and_do_not_fail(table):
    failures, remarks = tables.compare("sm_86", [dataclasses.replace(ROW, name="similarity taps: new")], table)
    assert not failures and "1 builds are not in the table and 1 of its rows are gone" in remarks[0]


def test_another_triton_compares_nothing_and_says_so(table):
    table.write_text(tables.text("sm_86", [ROW], version="3.0.0"))
    failures, remarks = tables.compare("sm_86", [dataclasses.replace(ROW, warps=1)], table)
    assert not failures and "the table is of Triton 3.0.0" in remarks[0] and "nothing but spills" in remarks[0]


def test_a_file_that_is_no_table_is_named(tmp_path):
    path = tmp_path / "sm_86.csv"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"sm_86.csv is no table of the compile gate .*--refresh"):
        tables.read(path)
    assert "no table to compare with" in tables.compare("sm_86", [ROW], tmp_path / "none.csv")[1][0]
