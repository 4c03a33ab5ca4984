"""Compile the Triton backend's kernels for a card that need not be here, and show what they take of it.

    python tools/compile_kernels.py                      # every variant, for a Hopper GPU
    python tools/compile_kernels.py --capability 80 --quick

Registers per thread (255 at most), bytes of registers spilled to memory per thread, and shared memory of a program. The
exit code is 1 where a kernel spills more than a few values. Needs Triton, which brings its own assembler, and no GPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from amclr_scale.similarity import triton_kernels as kernels
from amclr_scale.similarity.triton_sigmoid import sigmoid_kernel
from amclr_scale.similarity.triton_tiles import GIVEN, MEMORY, NARROW, Tile

POINTERS = {"A", "K", "W", "W_LOW", "SUMS", "PARTS", "OUT", "ONE", "SCALE", "BIAS", "RATE", "SHIFT", "MASS", "MOMENT"}
POINTERS |= {"POSITIVE", "POSITIVE_WEIGHT", "ROW_LIMIT", "COLUMN_LIMIT"}
GROUPS = {"ROW_GROUP", "COLUMN_GROUP", "ROW_GROUP_2", "COLUMN_GROUP_2"}
POINTERS |= GROUPS
UNMASKED = {"GROUPS": 0, "ONLY_SAME": False, "LIMITED": False}
MASKED = {"GROUPS": 2, "ONLY_SAME": False, "LIMITED": True}
POINTERS |= {f"{side}_{name}" for side in ("ROW", "COLUMN") for name in ("RATE", "SHIFT", "FACTOR")}
ALIGNED = ("stride_a", "stride_k", "stride_w")  # multiples of 16 elements in the sizes that matter


FEW = 256


@dataclass(frozen=True)
class Variant:
    label: str
    kernel: Any
    operand: str  # Triton's name of the type of A and K
    weights: str
    number: str
    constants: dict[str, Any]
    tile: Tile | None

    def compile(self, capability: int) -> Any:
        names = self.kernel.arg_names
        types = {"A": self.operand, "K": self.operand, "W": self.weights, "W_LOW": self.weights}
        types |= dict.fromkeys(GROUPS, "i32")
        signature = {
            name: "constexpr" if name in self.constants
            else f"*{types.get(name, self.number)}" if name in POINTERS else "i32"
            for name in names
        }  # fmt: skip
        divisible = [["tt.divisibility", 16]]
        attributes = {(i,): divisible for i, name in enumerate(names) if name in POINTERS or name in ALIGNED}
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages} if self.tile else {}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def variants(capability: int, *, quick: bool) -> list[Variant]:
    """Every combination that the backend launches, or one of each kind."""
    found: list[Variant] = []
    table = NARROW[MEMORY.get(divmod(capability, 10), "small")]

    def add(
        label: str, kernel: Any, operand: str, weights: str, number: str, tile: Tile | None, **constants: Any
    ) -> None:
        known = {} if tile is None else {
            "BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "GROUP": tile.group, "STAGES": tile.stages,
            "PRECISION": "ieee",
        }  # fmt: skip
        known |= UNMASKED | constants
        used = {name: value for name, value in known.items() if name in kernel.arg_names}
        found.append(Variant(label, kernel, operand, weights, number, used, tile))

    for operand, width in (("bf16", 512),) if quick else (("bf16", 512), ("bf16", 768), ("fp16", 512), ("bf16", 1536)):
        source = {"WIDTH": width, "GIVEN": False, "DOUBLE": False, "EVEN": True, "FAR": False}
        on = (True,) if quick else (False, True)
        for exclude in on:
            for go_on in on:
                add(f"{operand} {width}, exclude={exclude}, continue={go_on}", kernels.accumulate_kernel, operand,
                    "bf16", "fp32", table["accumulate"], DIAGONAL=True, STORE_POSITIVE=True, EXCLUDE=exclude,
                    CONTINUE=go_on, **source)  # fmt: skip
        for rows, columns, common, low in ((1, 1, 1, 0), (1, 1, 0, 1), (1, 0, 0, 0), (0, 1, 0, 0))[: 1 if quick else 4]:
            add(f"{operand} {width}, rows={rows}, columns={columns}, common={common}, low={low}",
                kernels.weights_kernel, operand, "bf16", "fp32", table["weights"], ROWS=bool(rows),
                COLUMNS=bool(columns), DIAGONAL=True, COMMON=bool(common), LOW=bool(low), **source)  # fmt: skip
        add(f"{operand} {width}, masked", kernels.accumulate_kernel, operand, "bf16", "fp32", table["sigmoid"],
            DIAGONAL=True, STORE_POSITIVE=True, EXCLUDE=True, CONTINUE=True, **MASKED, **source)  # fmt: skip
        add(f"{operand} {width}, masked", kernels.weights_kernel, operand, "bf16", "fp32", table["sigmoid"], ROWS=True,
            COLUMNS=True, DIAGONAL=True, COMMON=False, LOW=False, **MASKED, **source)  # fmt: skip
        for low in (False,) if quick else (False, True):
            add(f"{operand} {width}, low={low}", sigmoid_kernel, operand, "bf16", "fp32", table["sigmoid"],
                DIAGONAL=True, STORE=True, LOW=low, **source)  # fmt: skip
    for number in ("fp32",) if quick else ("fp32", "fp64"):
        source = {"WIDTH": 16, "GIVEN": True, "DOUBLE": number == "fp64", "EVEN": False, "FAR": True}
        for kernel_name in ("accumulate", "accumulate_columns"):
            add(f"given {number}, {kernel_name}", kernels.accumulate_kernel, number, number, number,
                GIVEN[kernel_name], DIAGONAL=True, STORE_POSITIVE=True, EXCLUDE=True, CONTINUE=True,
                **source)  # fmt: skip
        add(f"given {number}", kernels.weights_kernel, number, number, number, GIVEN["weights"], ROWS=True,
            COLUMNS=True, DIAGONAL=True, COMMON=False, LOW=False, **source)  # fmt: skip
        add(f"given {number}", sigmoid_kernel, number, number, number, GIVEN["sigmoid"], DIAGONAL=True,
            STORE=True, LOW=False, **source)  # fmt: skip
        add(number, kernels.merge_kernel, number, number, number, None, BM=256)
    add("", kernels.common_kernel, "fp32", "fp32", "fp32", None, BLOCK=2048)
    return found


def usage(compiled: Any) -> tuple[int, int]:
    """Registers per thread, and bytes per thread that were spilled to memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, max(stack, local)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--capability", type=int, default=90, choices=(80, 86, 89, 90, 100), help="of the card, times ten"
    )
    parser.add_argument("--quick", action="store_true", help="one variant of each kind")
    args = parser.parse_args()
    table = Table("kernel", "variant", "registers", "spilled bytes", "shared KiB", "warpgroup products")
    spilled = 0
    for variant in variants(args.capability, quick=args.quick):
        compiled = variant.compile(args.capability)
        registers, bytes_out = usage(compiled)
        spilled = max(spilled, bytes_out)
        wgmma = "yes" if "wgmma" in compiled.asm["ptx"] else ""
        name = variant.kernel.fn.__name__
        table.add_row(
            name, variant.label, str(registers), str(bytes_out), f"{compiled.metadata.shared / 1024:.0f}", wgmma
        )
    Console(width=140).print(f"triton {triton.__version__}, compute capability {args.capability / 10}", table)
    return 1 if spilled > FEW else 0


if __name__ == "__main__":
    sys.exit(main())
