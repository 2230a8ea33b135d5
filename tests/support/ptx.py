"""A machine for PTX, NVIDIA's virtual instructions, in numpy: what a GPU would execute, where there is none.

`parse` reads a kernel's text, a Machine runs it: all threads of some blocks at once, each register an array of their values.
Threads that part wait for each other: those at the lowest basic block go first. What the machine refuses is a PtxError: an
unknown instruction, an access outside of the tensors or not aligned, a race, threads that miss an exchange or a barrier. A
register that nothing wrote holds random bits. Neither ptxas nor a GPU's scheduler is here: it knows nothing of time.
"""

import collections
import dataclasses
import re

import numpy as np

from .ptx_arithmetic import TYPES, UNSIGNED, PtxError, bits, operation
from .ptx_memory import WARP, WORD, Memory, Shared

CHUNK = 8192  # threads that run at once: what they hold stays in the processor's caches
LONGEST = 1_000_000  # basic blocks of a launch
HINTS = re.compile(r"\.(?:nc|ca|cg|cs|cv|lu|wb|wt|L1::\w+|L2::\w+)\b")  # of caches: no value depends on them
CLASSES = {
    "memory": ("ld", "st", "ldmatrix", "stmatrix"), "control": ("bra", "ret", "exit", "bar"), "exchange": ("shfl",),
    "conversion": ("cvt",),
    "choice": ("setp", "selp"), "move": ("mov", "cvta"), "division": ("rsqrt", "sqrt", "div", "rem"),
}  # fmt: skip


# ---- the program ----


@dataclasses.dataclass
class Instruction:
    opcode: str
    guard: str
    operands: list[str]

    def kind(self):
        """Its class, for counts: float32 and float64 by name, integers, and those of CLASSES."""
        name = self.opcode.split(".")[0]
        if name == "ld" and ".param" in self.opcode:
            return "parameter"
        of = [kind for kind, names in CLASSES.items() if name in names]
        return of[0] if of else "float" if re.search(r"\.f(32|64)\b", self.opcode) else "integer"


@dataclasses.dataclass
class Program:
    name: str
    parameters: dict[str, int]  # where each begins in the parameter block
    parameter_bytes: int
    widths: dict[str, int]  # bytes of each register; of a predicate: 0
    blocks: list[list[Instruction]]
    labels: dict[str, int]
    shared: dict[str, int]
    shared_bytes: int | None  # None: the launch says


def _statements(body):
    """(what, text): a label, a statement, or a scope's brace."""
    for text in re.sub(r"//[^\n]*|/\*.*?\*/", "", body, flags=re.S).split(";"):
        text = text.strip()
        while found := re.match(r"[{}]\s*|([$\w]+):\s*|\.(?:loc|pragma)\b[^\n]*\s*", text):
            if found[1] or text[0] in "{}":
                yield ("label", found[1]) if found[1] else (text[0], "")
            text = text[found.end() :]
        if text:
            yield "statement", text


def _split(operands):
    """At the commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands)] if operands.strip() else []


def _declared(statement, widths, scopes):
    """Registers. In a scope each has a name of its own, which the innermost of `scopes` then says."""
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
    width = 0 if kind == "pred" else np.dtype(TYPES[kind]).itemsize
    for name in _split(names):
        stem, _, count = name.partition("<")
        for register in [stem + str(i) for i in range(int(count[:-1]))] if count else [name]:
            if scopes:
                scopes[-1][register] = register = f"{register}.{len(widths)}"
            widths[register] = width


def _renamed(statement, scopes):
    for scope in reversed(scopes):
        statement = re.sub(r"[%$\w]+", lambda found, scope=scope: scope.get(found[0], found[0]), statement)
    return statement


def _laid_out(text):
    """({name: offset}, bytes in all) of parameters or of shared variables."""
    places, end = {}, 0
    for align, kind, name, count in re.findall(
        r"(?:\.align\s+(\d+)\s+)?\.([busf]\d+)(?:\s+\.ptr[^,%$\w]*(?:\.\w+\s+)*(?:\.align\s+\d+)?)?\s+([$\w]+)(?:\[(\d*)\])?",
        text,
    ):
        size = np.dtype(TYPES[kind]).itemsize
        align = int(align or size)
        places[name] = -(-end // align) * align
        end = places[name] + size * int(count or 1)
    return places, end


def parse(text, shared=""):
    """The Program of one `.entry`; shared: the module's own `.shared` declarations."""
    name, parameters, body = re.search(r"\.entry\s+([$\w]+)\s*\((.*?)\)(.*)", text, re.S).groups()
    places, parameter_bytes = _laid_out(parameters)
    body = body[body.index("{") + 1 :].split("\n}")[0]
    widths, blocks, labels, scopes = {}, [[]], {}, []
    for what, statement in _statements(body):
        if what == "label":
            if blocks[-1]:
                blocks.append([])
            labels[statement] = len(blocks) - 1
        elif what == "{":
            scopes.append({})
        elif what == "}":
            scopes.pop()
        elif statement.startswith(".reg"):
            _declared(statement, widths, scopes)
        elif statement.startswith(".shared"):
            shared += statement + ";\n"
        elif statement.startswith("."):
            raise PtxError(f"unknown directive {statement}")
        else:
            statement = _renamed(statement, scopes)
            guard, opcode, operands = re.match(r"(?:@(!?[%\w.]+)\s+)?([\w.:]+)\s*(.*)", statement, re.S).groups()
            blocks[-1].append(Instruction(HINTS.sub("", opcode), guard or "", _split(operands)))
            if opcode.split(".")[0] in ("bra", "ret", "exit"):
                blocks.append([])
    if not blocks[-1]:
        blocks[-1].append(Instruction("ret", "", []))
    variables, shared_bytes = _laid_out(shared)
    return Program(
        name, places, parameter_bytes, widths, blocks, labels, variables, None if "[]" in shared else shared_bytes
    )


def kernels(text):
    """{name: text} of a module's entries, and its shared variables' declarations."""
    head, *entries = re.split(r"\n(?=(?:\.visible\s+)?\.entry\b)", text)
    shared = "\n".join(re.findall(r"^(?:\.extern\s+|\.visible\s+)?(\.shared[^;]*;)", head, re.M))
    return {re.search(r"\.entry\s+([$\w]+)", entry)[1]: entry for entry in entries}, shared


# ---- the launch ----


class Counts:
    """What launches executed: instructions by kind, summed over threads, and what each tensor saw (ptx_memory.py::Memory)."""

    def __init__(self):
        self.instructions, self.memory, self.threads = collections.Counter(), collections.Counter(), 0


class Machine:
    """A Program, made ready: each instruction a function of (threads of some blocks, which of them are active)."""

    def __init__(self, program, seed=0):
        self.program = program
        self.rng, self.operations = np.random.default_rng(seed), {}
        self.blocks = [[self._compiled(instruction) for instruction in block] for block in program.blocks]
        self.kinds = [collections.Counter(instruction.kind() for instruction in block) for block in program.blocks]

    def launch(self, grid, block, parameters, spans, shared_bytes=0, counts=None):
        """Runs the kernel over (x, y, z) of blocks and threads. parameters: the parameter block's bytes."""
        if len(parameters) != self.program.parameter_bytes:
            raise PtxError(
                f"{self.program.name} has {self.program.parameter_bytes} bytes of parameters, got {len(parameters)}"
            )
        memory = Memory(spans, None if counts is None else counts.memory)
        size = int(np.prod(block))
        at_once, blocks = max(CHUNK // size, 1), int(np.prod(grid))
        if self.program.shared_bytes is not None:
            shared_bytes = self.program.shared_bytes
        with np.errstate(all="ignore"):
            for first in range(0, blocks, at_once):
                count = min(at_once, blocks - first)
                shared = Shared(count, shared_bytes, self.rng)
                threads = Threads(self, grid, block, first, count, parameters, memory, shared)
                executed = threads.run()
                if counts is not None:
                    counts.threads += threads.count
                    for kinds, times in zip(self.kinds, executed, strict=True):
                        counts.instructions.update({kind: n * times for kind, n in kinds.items() if times})

    # ---- operands ----

    def _read(self, operand, kind):
        """A function of (threads, active): the operand's values, in this type; one value stands for all threads."""
        dtype = np.dtype(TYPES[kind])
        if operand.startswith("{"):
            return self._packed(_split(operand[1:-1]), dtype)
        if operand in self.program.widths:
            width = self.program.widths[operand]
            if (width == 0) != (kind == "pred") or dtype.itemsize > max(width, 1):
                raise PtxError(f"{operand} is read as {kind}")

            def read(threads, active):
                value = threads.register(operand)
                if active is not None and len(value) > 1:
                    value = value[active]
                if width == 0:
                    return value
                return (
                    value.view(dtype) if width == dtype.itemsize else value.astype(UNSIGNED[dtype.itemsize]).view(dtype)
                )

            return read
        if operand in SPECIAL:
            return lambda threads, active: _chosen(threads.special(operand), active).view(dtype)
        place = self.program.shared.get(operand, self.program.parameters.get(operand))  # each in a space of its own
        value = _immediate(operand, dtype) if place is None else np.array([place], dtype)
        return lambda threads, active: value

    def _packed(self, parts, dtype):
        width = dtype.itemsize // len(parts)
        reads = [self._read(part, f"b{8 * width}") for part in parts]
        unsigned = UNSIGNED[dtype.itemsize]

        def read(threads, active):
            words = [read(threads, active).astype(unsigned) for read in reads]
            return sum((word << unsigned(8 * width * i) for i, word in enumerate(words[1:], 1)), words[0]).view(dtype)

        return read

    def _write(self, operand):
        """A function of (threads, values, active). What is narrower than the register is extended, by its sign if it has one."""
        if operand == "_":
            return lambda threads, value, active: None
        if operand not in self.program.widths:
            raise PtxError(f"{operand} is written, which is no register")
        width = self.program.widths[operand]

        def write(threads, value, active):
            if width and value.dtype.itemsize < width:
                value = value.astype(np.dtype(f"{'i' if value.dtype.kind == 'i' else 'u'}{width}"))
            elif max(width, 1) != value.dtype.itemsize or (width == 0) != (value.dtype == np.bool_):
                raise PtxError(f"{operand} is given a value of {value.dtype}")
            value = bits(value)
            if active is not None:
                before = threads.register(operand)
                after = np.array(np.broadcast_to(before, threads.count))
                after[active] = value
                value = after
            threads.registers[operand] = value

        return write

    # ---- instructions ----

    def _compiled(self, instruction):
        """(guard or None, function of (threads, active)); of branches and exits: their instruction."""
        name = instruction.opcode.split(".")[0]
        guard = None
        if instruction.guard:
            predicate, wanted = self._read(instruction.guard.lstrip("!"), "pred"), not instruction.guard.startswith("!")
            guard = lambda threads, active: predicate(threads, active) == wanted  # noqa: E731
        special = {
            "ld": self._load, "st": self._store, "mov": self._move, "shfl": self._exchange, "bar": self._barrier,
            "ldmatrix": self._matrices, "stmatrix": self._matrices,
        }  # fmt: skip
        if name in ("bra", "ret", "exit"):
            return guard, self.program.labels[instruction.operands[0]] if name == "bra" else END
        return guard, special.get(name, self._arithmetic)(instruction)

    def _arithmetic(self, instruction):
        if instruction.opcode not in self.operations:
            self.operations[instruction.opcode] = operation(instruction.opcode, self.rng)
        computes = self.operations[instruction.opcode]
        target, *sources = instruction.operands
        if len(sources) != len(computes.sources):
            raise PtxError(f"{instruction.opcode} has {len(sources)} sources, not {len(computes.sources)}")
        reads = [self._operand(source, kind) for source, kind in zip(sources, computes.sources, strict=True)]
        write, function = self._write(target), computes.function
        return lambda threads, active: write(threads, function(*[read(threads, active) for read in reads]), active)

    def _operand(self, source, kind):
        if not source.startswith("!"):
            return self._read(source, kind)
        read = self._read(source[1:], kind)
        return lambda threads, active: ~read(threads, active)

    def _move(self, instruction):
        kind, (target, source) = instruction.opcode.split(".")[-1], instruction.operands
        read = self._read(source, kind)
        if not target.startswith("{"):
            write = self._write(target)
            return lambda threads, active: write(threads, read(threads, active), active)
        writes = [self._write(part) for part in _split(target[1:-1])]
        width = np.dtype(TYPES[kind]).itemsize // len(writes)

        def move(threads, active):
            word = bits(read(threads, active))
            for i, write in enumerate(writes):
                write(threads, (word >> word.dtype.type(8 * width * i)).astype(UNSIGNED[width]), active)

        return move

    def _place(self, operand):
        """(what comes before, the offset) of an address."""
        base, sign, offset = re.fullmatch(r"\[\s*([^\s+\]-]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", operand).groups()
        return base, int(offset or "0", 0) * (-1 if sign == "-" else 1)

    def _words(self, instruction):
        """(space, type of an element, how many)"""
        _, space, *rest = instruction.opcode.split(".")
        kind = rest[-1]
        count = int(rest[0][1:]) if rest[0] in ("v2", "v4", "v8") else 1
        if kind not in TYPES or space not in ("param", "global", "shared") or len(rest) != (1 if count == 1 else 2):
            raise PtxError(f"unknown instruction {instruction.opcode}")
        return space, kind, count

    def _load(self, instruction):
        space, kind, count = self._words(instruction)
        dtype, (target, source) = np.dtype(TYPES[kind]), instruction.operands
        base, offset = self._place(source)
        writes = [self._write(part) for part in (_split(target[1:-1]) if target.startswith("{") else [target])]
        if len(writes) != count:
            raise PtxError(f"{instruction.opcode} has {len(writes)} targets")
        address = self._address(space, base, offset)

        def load(threads, active):
            if space == "param":
                words = threads.parameter(address(threads, active), count * dtype.itemsize)
            else:
                memory = threads.shared if space == "shared" else threads.memory
                words = memory.load(address(threads, active), count * dtype.itemsize, threads.numbers(active))
            words = words.view(dtype).reshape(-1, count)
            for i, write in enumerate(writes):
                write(threads, words[:, i].copy(), active)

        return load

    def _store(self, instruction):
        space, kind, count = self._words(instruction)
        dtype, (target, source) = np.dtype(TYPES[kind]), instruction.operands
        address = self._address(space, *self._place(target))
        parts = _split(source[1:-1]) if source.startswith("{") else [source]
        reads = [self._read(part, kind) for part in parts]
        if len(reads) != count:
            raise PtxError(f"{instruction.opcode} has {len(reads)} sources")

        def store(threads, active):
            memory, numbers = threads.shared if space == "shared" else threads.memory, threads.numbers(active)
            words = np.empty((len(numbers), count), UNSIGNED[dtype.itemsize])
            for i, read in enumerate(reads):
                words[:, i] = bits(read(threads, active))
            memory.store(address(threads, active), words.view(WORD[count * dtype.itemsize])[:, 0], numbers)

        return store

    def _matrices(self, instruction):
        """ldmatrix, stmatrix: 8x8 matrices of 16 bits in shared memory. A lane gives a row's address.

        It has two elements of each matrix: neighbours in a row or, transposed, in a column.
        """
        found = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16", instruction.opcode)
        if not found:
            raise PtxError(f"unknown instruction {instruction.opcode}")
        loads, kind = found[1] == "ld", np.uint16 if found[2] else np.uint32
        target, source = instruction.operands if loads else instruction.operands[::-1]
        base, offset = self._place(source)
        read, registers = self._read(base, "u32"), _split(target.strip("{}"))
        moves = [self._write(register) if loads else self._read(register, "b32") for register in registers]

        def move(threads, active):
            here, lane, warp = threads.mask(active), _chosen(threads.lane, active), _chosen(threads.warp, active)
            if not here.reshape(-1, WARP)[warp].all():
                raise PtxError(f"{instruction.opcode}: a lane is not there")
            rows = np.zeros(threads.count, np.uint64)
            rows[here] = read(threads, active) + np.uint64(offset)
            if (rows % 16).any():
                raise PtxError(f"{instruction.opcode}: a row at an address that 16 bytes do not divide")
            blocks, numbers = _chosen(threads.block, active), threads.numbers(active)
            for i, each in enumerate(moves):
                near, far = lane // 4, lane % 4
                mine = [(near, 4 * far)] if kind == np.uint32 else [(2 * far, 2 * near), (2 * far + 1, 2 * near)]
                places = [threads.shared.addresses(rows[warp * WARP + 8 * i + row] + at, blocks) for row, at in mine]
                if loads:
                    parts = [threads.shared.load(place, kind(0).itemsize, numbers) for place in places]
                    each(threads, np.stack(parts, -1).view(np.uint32)[:, 0], active)
                else:
                    parts = (
                        np.array(np.broadcast_to(each(threads, active), len(numbers)))
                        .view(kind)
                        .reshape(len(numbers), -1)
                    )
                    for place, part in zip(places, parts.T, strict=True):
                        threads.shared.store(place, part, numbers)

        return move

    def _address(self, space, base, offset):
        in_register = base in self.program.widths
        read = self._read(base, f"u{8 * self.program.widths[base]}" if in_register else "u64")

        def address(threads, active):
            value = read(threads, active).astype(np.uint64) + np.uint64(offset % 2**64)
            if space == "param":
                return value
            value = np.broadcast_to(value, len(threads.numbers(active)))
            return threads.shared.addresses(value, _chosen(threads.block, active)) if space == "shared" else value

        return address

    def _exchange(self, instruction):
        """shfl.sync: a value of another lane of the warp. All that the mask names must be here."""
        _, sync, mode, _ = instruction.opcode.split(".")
        if sync != "sync" or mode not in ("down", "bfly", "up", "idx"):
            raise PtxError(f"unknown instruction {instruction.opcode}")
        target, *sources = instruction.operands
        write, *also = [self._write(part) for part in target.split("|")]
        value, other, clamp, members = [self._read(source, "u32") for source in sources]

        def exchange(threads, active):
            lane = _chosen(threads.lane, active).astype(np.int64)
            here = threads.mask(active)
            warp = here.reshape(-1, WARP)[_chosen(threads.warp, active)]
            b, c, mask = (
                np.broadcast_to(read(threads, active), lane.shape).astype(np.int64) for read in (other, clamp, members)
            )
            wanted = (mask[:, None] >> np.arange(WARP) & 1).astype(bool)
            if (wanted & ~warp).any() or not (mask >> lane & 1).all():
                raise PtxError(f"{instruction.opcode}: a lane that its mask names is not there")
            segment, limit = c >> 8 & 31, c & 31
            most, least = (lane & segment) | (limit & ~segment), lane & segment
            b = b & 31
            source = {"down": lane + b, "up": lane - b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
            inside = source >= most if mode == "up" else source <= most
            source = np.where(inside, source, lane)
            if not wanted[np.arange(len(lane)), source].all():
                raise PtxError(f"{instruction.opcode}: a lane outside of its mask is read")
            values = np.zeros(threads.count, np.uint32)
            values[here] = value(threads, active)
            write(threads, values[_chosen(threads.warp, active) * WARP + source], active)
            for write_inside in also:
                write_inside(threads, inside, active)

        return exchange

    def _barrier(self, instruction):
        if instruction.opcode not in ("bar.sync", "bar.warp.sync"):
            raise PtxError(f"unknown instruction {instruction.opcode}")
        of_warp = "warp" in instruction.opcode

        def barrier(threads, active):
            here, group = threads.mask(active), threads.warp if of_warp else threads.block
            if (np.isin(group, np.unique(group[here])) & threads.alive & ~here).any():
                raise PtxError(f"{instruction.opcode}: a thread is not there")
            if of_warp:
                threads.shared.warp_barrier(threads.number[here])
            else:
                threads.shared.barrier(np.unique(threads.block[here]))

        return barrier


END = 2**30  # in place of a block: the thread has left
SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"} | {"%laneid"}


def _chosen(value, active):
    return value if active is None or len(value) == 1 else value[active]


def _immediate(operand, dtype):
    """A number, one value for all threads."""
    if found := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", operand):
        word = np.array([int(found[2], 16)], np.uint32 if found[1] in "fF" else np.uint64)
        if word.dtype.itemsize != dtype.itemsize:
            raise PtxError(f"{operand} is read as {dtype}")
        return word.view(dtype)
    if not (found := re.fullmatch(r"(-?(?:0x[0-9a-fA-F]+|\d+))U?", operand)):
        raise PtxError(f"unknown operand {operand}")
    if dtype == np.bool_:
        return np.array([int(found[1], 0) != 0])
    value = int(found[1], 0) % 2 ** (8 * dtype.itemsize)
    return np.array([value], UNSIGNED[dtype.itemsize]).view(dtype)


class Threads:
    """The threads of some blocks, and their registers."""

    def __init__(self, machine, grid, block, first, count, parameters, memory, shared):
        self.machine, self.parameters, self.memory, self.shared = machine, parameters, memory, shared
        size = int(np.prod(block))
        self.count = count * size
        thread = np.arange(self.count, dtype=np.int64)
        self.block = thread // size
        self.number = (first * size + thread + 1).astype(np.int32)
        # Warps are a block's: what is left of its last one is empty.
        self.lane = (thread % size % WARP).astype(np.uint32)
        self.warp = thread // WARP
        if size % WARP:
            raise PtxError(f"a block of {size} threads is no whole warps")
        self.alive = np.ones(self.count, bool)
        self.registers, self.specials = {}, {"%laneid": self.lane}
        for name, index, extent in (("tid", thread % size, block), ("ctaid", first + self.block, grid)):
            for axis, n in zip("xyz", extent, strict=True):
                self.specials[f"%{name}.{axis}"] = (index % n).astype(np.uint32)
                self.specials[f"%n{name}.{axis}"] = np.array([n], np.uint32)
                index = index // n

    def register(self, name):
        if name not in self.registers:  # nothing has written it
            width = self.machine.program.widths[name]
            random = self.machine.rng.integers(0, 2 ** (8 * width) if width else 2, self.count, UNSIGNED[width or 1])
            self.registers[name] = random if width else random.astype(bool)
        return self.registers[name]

    def special(self, name):
        return self.specials[name]

    def parameter(self, offsets, size):
        """Words of `size` bytes of the parameter block."""
        if (offsets % np.uint64(size)).any() or (offsets + np.uint64(size) > len(self.parameters)).any():
            raise PtxError("a parameter is read that is none, or is not aligned")
        at = offsets.astype(np.int64)[:, None] + np.arange(size)
        return np.frombuffer(self.parameters, np.uint8)[at].view(WORD[size])[:, 0]

    def numbers(self, active):
        return _chosen(self.number, active)

    def mask(self, active):
        mask = np.zeros(self.count, bool)
        mask[slice(None) if active is None else active] = True
        return mask

    def run(self):
        """To the end; how often each basic block ran, summed over threads."""
        executed = [0] * len(self.machine.blocks)
        following = 0  # each thread's next block; one number where it is the same
        for _ in range(LONGEST):
            here = following if isinstance(following, int) else int(following.min())
            if here == END:
                return executed
            active = None if isinstance(following, int) else np.flatnonzero(following == here)
            executed[here] += self.count if active is None else len(active)
            jump = self._run_block(here, active)
            if isinstance(jump, int) and active is None:
                following = jump
                continue
            following = np.full(self.count, following) if isinstance(following, int) else following
            following[slice(None) if active is None else active] = jump
            self.alive = following != END
            if (following == following[0]).all():
                following = int(following[0])
        raise PtxError(f"{self.machine.program.name} does not end")

    def _run_block(self, here, active):
        """Each active thread's next block."""
        for guard, what in self.machine.blocks[here]:
            passed = active
            if guard is not None:
                chosen = guard(self, active)
                if isinstance(what, int):
                    if chosen.all():
                        return what
                    return np.where(chosen, what, here + 1) if chosen.any() else here + 1
                if not chosen.all():
                    chosen = np.broadcast_to(chosen, self.count if active is None else len(active))
                    passed = np.flatnonzero(chosen) if active is None else active[chosen]
                    if not len(passed):
                        continue
            if isinstance(what, int):
                return what
            what(self, passed)
        return here + 1
