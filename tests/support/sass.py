"""Reads NVIDIA machine code as cuobjdump prints it, on any machine: triton's wheel brings the tool."""

import collections
import dataclasses
import pathlib
import re
import shutil
import subprocess

import triton

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def cuobjdump(*arguments):
    command = [str(part) for part in (CUOBJDUMP, *arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def demangle(names):
    """{mangled name: as it was written}"""
    command = [shutil.which("c++filt"), *names]
    return dict(
        zip(names, subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines(), strict=True)
    )


@dataclasses.dataclass
class Instruction:
    address: int
    predicate: str
    name: str
    operands: str

    def target(self):
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if self.name.startswith("BRA") and found else None


def kernels(path, architecture):
    """{mangled name: [Instruction]} of one architecture's machine code."""
    result = {}
    for block in cuobjdump("-arch", architecture, "-sass", path).split("Function : ")[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;", block)
        code = [Instruction(int(address, 16), predicate, *rest) for address, predicate, *rest in lines]
        result[block.split("\n", 1)[0].strip()] = code
    return result


def registers(path, architecture):
    """{mangled name: registers per thread}, and the stack must be empty."""
    text = cuobjdump("-arch", architecture, "--dump-resource-usage", path)
    used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    return {name: (int(count), int(stack)) for name, count, stack in used}


def count(code, pattern):
    """How many instructions have such a name, of which there are few different ones."""
    names = collections.Counter(instruction.name for instruction in code)
    return sum(number for name, number in names.items() if re.fullmatch(pattern, name))


def fast_path(code, stores, roots=None, loads=None):
    """The instructions that a thread in the middle of a large aligned tensor executes: the shortest way from the entry to the
    exit with this many 16-byte stores, square roots and 16-byte loads, all where no number is given, and a band's quarters."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    states = collections.defaultdict(
        dict
    )  # per instruction: (quarters, square roots, loads, stores) -> the shortest way there
    states[0] = {(0, 0, 0, 0): (0, None, None)}  # its length, last instruction, and the way to that
    done = {}
    for i, instruction in enumerate(code):
        if not (here := states.pop(i, None)):
            continue
        name, target, following = instruction.name, instruction.target(), [i + 1]
        counts = (
            name == "FMUL" and instruction.operands.endswith(" 0.25"),
            name.startswith("MUFU.RSQ"),
            re.fullmatch(r"LDG\.E.*\.128.*", name) is not None,
            re.fullmatch(r"STG\.E.*\.128.*", name) is not None,
        )
        if name.startswith("EXIT"):
            following = [None, *following] if instruction.predicate else [None]
        elif target is not None:
            conditional = instruction.predicate or "P" in instruction.operands
            following = [position[target], *following] if conditional else [position[target]]
        places = [
            done if j is None else states[j] for j in following if j is None or j > i
        ]  # back: the trap after the end
        for before, way in here.items():
            key = tuple(sum(both) for both in zip(before, counts, strict=True))
            way = (way[0] + 1, i, way)
            for place in places:
                if key not in place or way[0] < place[key][0]:
                    place[key] = way
    way, path = (
        done[max(key for key in done if key[3] == stores and roots in (None, key[1]) and loads in (None, key[2]))],
        [],
    )
    while way[1] is not None:
        path.append(code[way[1]])
        way = way[2]
    return path[::-1]
