"""Writes the table of what `fastvit.accelerate` supports into docs/drop-in.md, in some minutes: `TRITON_INTERPRET=1
python tests/dropin_table.py`. A cell is what a check of dropin_checks.py found, run there and then."""

from __future__ import annotations

from pathlib import Path

import torch
from dropin_checks import check_compile, check_distributed, check_export, check_other, cpu_ratio, errors, too_large
from dropin_models import FAMILIES, OTHERS, Family, timm, torchvision, transformers

PAGE = Path(__file__).parents[1] / "docs/drop-in.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
CHECKS = {
    "torch.compile": lambda family: check_compile(family, "triton"),
    "torch.export": check_export,
    "DDP": lambda family: check_distributed(family, "DDP"),
    "FSDP2": lambda family: check_distributed(family, "FSDP2"),
}


def cells(family: Family) -> list[str]:
    """A row of the table."""
    found = [family.name, family.options]
    for dtype in (torch.float32, torch.bfloat16):
        pairs = errors(family, dtype)
        wrong = too_large(pairs, dtype)
        output = next(iter(pairs.values()))
        gradients = (
            torch.tensor([pair for name, pair in pairs.items() if name.startswith("d ")]).square().mean(0).sqrt()
        )
        found.append(f"{output[0]:.1e} / {output[1]:.1e}" + (", wrong" if wrong else ""))
        found.append(f"{gradients[0]:.1e} / {gradients[1]:.1e}")
    found.append(f"{cpu_ratio(family):.2f}")
    for check in CHECKS.values():
        try:
            check(family)
        except Exception as error:
            print(family.name, repr(error)[:2000], flush=True)
            found.append("no")
        else:
            found.append("yes")
    return found


def table(rows: list[list[str]]) -> str:
    heads = ["model", "found in its blocks"]
    heads += [f"{what}, {dtype}" for dtype in ("float32", "bfloat16") for what in ("outputs", "gradients")]
    heads.append("time on a CPU, after / before")
    lines = [[*heads, *CHECKS], ["---"] * (len(heads) + len(CHECKS)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def below() -> str:
    """What stands below the table: other models, which have the same layers, and versions."""
    blocks, attention = [], []
    for name, (_, _, ops) in OTHERS.items():
        check_other(name)
        (blocks if "transformer_block" in ops else attention).append(name)
    libraries = ", ".join(
        f"{library.__name__} {library.__version__}" for library in (torch, timm, torchvision, transformers)
    )
    return (
        f"Other models whose layers are the same to the letter come with these; outputs were tried of "
        f"{', '.join(blocks)}, and with attention alone {', '.join(attention)}. With {libraries}."
    )


if __name__ == "__main__":
    rows = [cells(family) for family in FAMILIES]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{below()}\n\n{END}{after}")
