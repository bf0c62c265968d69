"""Reading machine code: what nvdisasm prints of a kernel, counted.

**Redundant loads.** Two loads of global memory read the same address for certain where their address registers hold
the same value and their offsets and widths are equal. The value of a register is told by value numbering: an
instruction whose opcode and operands have the same values as an earlier one computes the same value again. What a load
brings is always new, and numbering starts afresh at every label, since a branch may come in there. So what is counted
is redundant, and not all that is redundant is counted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LINE = re.compile(r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<guard>@!?U?P[T\d]+)\s+)?(?P<code>[A-Z][^;]*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_REGISTER = re.compile(r"\bU?(?:R|P)(?:\d+|Z|T)\b")
_MATRIX = re.compile(r"^(?:[BHIQDO]MMA|[HIQB]GMMA|UTC[A-Z]*MMA)\b")
# The products of m x n x k in HMMA.16816 and HMMA.1688; a GMMA, by four warps, names its own.
_MMA_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32}


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str
    opcode: str  # with its modifiers: LDG.E.128
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Counts:
    """What one warp's code holds.

    Attributes:
        instructions: in the code, padding behind the end left out; by how many loops they are in, none first. A loop
            reaches from the target of a backward branch to the last branch there.
        matrix: opcode -> how many, of instructions for tensor cores.
        loads, stores: bytes that a thread moves with one instruction -> how many, of global memory; copies to shared
            memory are loads.
        redundant_loads: see the module.
        products: multiplications and additions in pairs, of one warp, by its tensor cores or else by FFMA, once through
            the code; by loops, too.
    """

    instructions: tuple[int, ...]
    matrix: Counter[str]
    loads: Counter[int]
    stores: Counter[int]
    redundant_loads: int
    products: tuple[int, ...]


def disassembled(cubin: bytes, nvdisasm: str) -> str:
    """The listing of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout


def counts(listing: str) -> Counts:
    """Count the one kernel of ``listing``."""
    code, labels = _parsed(listing)
    if not code:
        raise ValueError("the listing holds no instruction")
    loops = _loops(code, labels)
    depths = [sum(first <= each.address <= last for first, last in loops.items()) for each in code]
    matrix = Counter(each.opcode for each in code if _MATRIX.match(each.opcode))
    products = [_products(each, bool(matrix)) for each in code]
    loads, stores = (
        Counter(_bytes(each.opcode) for each in code if each.kind in kinds) for kinds in (("LDG", "LDGSTS"), ("STG",))
    )
    deepest = range(max(depths) + 1)
    return Counts(
        tuple(depths.count(depth) for depth in deepest),
        matrix,
        loads,
        stores,
        sum(loads.values()) - _distinct_loads(code, set(labels.values())),
        tuple(sum(n for n, at in zip(products, depths, strict=True) if at == depth) for depth in deepest),
    )


def _parsed(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions up to the padding, and the address that each label stands before."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _LINE.match(line):
            opcode, _, rest = found["code"].partition(" ")
            address = int(found["address"], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
            code.append(Instruction(address, found["guard"] or "", opcode, operands))
    while code and (code[-1].kind == "NOP" or (code[-1].kind == "BRA" and _jump(code[-1], labels) == code[-1].address)):
        code.pop()
    return code, labels


def _jump(instruction: Instruction, labels: dict[str, int]) -> int | None:
    found = _TARGET.search(" ".join(instruction.operands))
    return labels.get(found[1]) if found else None


def _loops(code: Sequence[Instruction], labels: dict[str, int]) -> dict[int, int]:
    """First -> last address of every loop."""
    loops: dict[int, int] = {}
    for each in code:
        target = _jump(each, labels) if each.kind == "BRA" else None
        if target is not None and target < each.address:
            loops[target] = each.address
    return loops


def _bytes(opcode: str) -> int:
    """Bytes that one thread moves."""
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1), ("256", 32)):
        if part in opcode.split("."):
            return size
    return 4


def _products(instruction: Instruction, has_matrix: bool) -> int:
    """Pairs of a multiplication and an addition that a warp does with it."""
    parts = instruction.opcode.split(".")
    if not has_matrix:
        return 32 if parts[0] == "FFMA" else 64 if parts[0] == "FFMA2" else 0
    if parts[0].endswith("GMMA"):
        sizes = next((part.split("x") for part in parts if re.fullmatch(r"\d+x\d+x\d+", part)), None)
        return int(sizes[0]) * int(sizes[1]) * int(sizes[2]) // 4 if sizes else 0
    return next((_MMA_SHAPES[part] for part in parts if part in _MMA_SHAPES), 0) if _MATRIX.match(parts[0]) else 0


def _distinct_loads(code: Sequence[Instruction], label_addresses: set[int]) -> int:
    """Loads of global memory that are not known to repeat an earlier one's address, offset and width."""
    values: dict[str, object] = {}
    numbers: dict[object, int] = {}
    seen: set[object] = set()
    distinct = 0
    for place, each in enumerate(code):
        if each.address in label_addresses:
            values, seen = {"epoch": place}, set()
        sources = tuple(_value(operand, values) for operand in each.operands[1:])
        if each.kind in ("LDG", "LDGSTS"):
            address = (_value(_address(each), values), _bytes(each.opcode))
            distinct += address not in seen
            seen.add(address)
        moves = each.kind.startswith(("LD", "ATOM", "SHFL", "S2")) or _MATRIX.match(each.opcode) or each.kind == "CS2R"
        key: object = ("fresh", place) if moves else (each.opcode, sources)
        if each.guard:  # what was there before may stay
            key = (key, each.guard, _value(each.guard, values), tuple(values.get(name) for name in _written(each)))
        number = numbers.setdefault(key, len(numbers))
        for part, name in enumerate(_written(each)):
            values[name] = (number, part)
    return distinct


def _address(instruction: Instruction) -> str:
    """What stands in the last brackets: of a copy to shared memory its source, behind any descriptor."""
    return re.findall(r"\[([^]]*)\]", " ".join(instruction.operands))[-1]


def _value(operand: str, values: dict[str, object]) -> object:
    """The operand's text with the value of each register that it names in the register's place."""
    text = operand.replace(".reuse", "")
    known = tuple(values.get(name, (name, values.get("epoch"))) for name in _with_pairs(text))
    return re.sub(_REGISTER, "", text), known


def _with_pairs(text: str) -> Iterator[str]:
    for found in _REGISTER.finditer(text):
        name = found[0]
        yield name
        if text[found.end() :].startswith(".64") and name[-1].isdigit():
            yield re.sub(r"\d+", lambda number: str(int(number[0]) + 1), name)


def _written(instruction: Instruction) -> list[str]:
    """What the instruction writes: its first operand, with the registers behind it where it is wide, and predicates."""
    if instruction.kind.startswith(("ST", "RED", "BRA", "BAR", "EXIT", "LDGSTS", "LDGDEPBAR", "NOP")):
        return []
    names = []
    for operand in instruction.operands[:2]:
        if not re.fullmatch(r"U?(?:R|P)(?:\d+)", operand):
            break
        names.append(operand)
        if "P" not in operand:
            break
    if not names or "P" in names[0]:
        return names
    parts = instruction.opcode.split(".")
    matrix = _MATRIX.match(instruction.opcode)
    width = 4 if "128" in parts or matrix else 2 if {"64", "WIDE"} & set(parts) else 1
    prefix, first = re.fullmatch(r"(U?R)(\d+)", names[0]).groups()  # type: ignore[union-attr]
    names = [f"{prefix}{int(first) + i}" for i in range(width)]
    second = instruction.operands[1] if len(instruction.operands) > 1 else ""
    return [*names, second] if re.fullmatch(r"U?P\d+", second) else names
