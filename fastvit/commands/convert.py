"""`fastvit convert`: a checkpoint of any library's, rewritten under timm's names, torchvision's or transformers'."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import _common
from ._common import DONE, UsageError

LIBRARIES = ("timm", "torchvision", "transformers")


def add(commands: argparse._SubParsersAction) -> None:
    text = "rewrite a checkpoint of any library as safetensors, under timm's names or another library's"
    parser = _common.add_command(commands, "convert", text, run, device=False)
    parser.add_argument("checkpoint", type=Path, metavar="IN", help="a file, or a folder with model.safetensors")
    out = ".safetensors; or, for transformers, a folder for its from_pretrained"
    parser.add_argument("output", type=Path, metavar="OUT", help=out)
    parser.add_argument("--model", help="what the weights have to be of; told by names and shapes if not said")
    parser.add_argument("--to", choices=LIBRARIES, default="timm", help="whose names to write (default: timm)")


def run(arguments: argparse.Namespace) -> int:
    output, folder = arguments.output, None
    if arguments.to == "transformers" and output.suffix != ".safetensors":
        output, folder = output / "model.safetensors", output
    elif output.suffix != ".safetensors":
        raise UsageError(f"OUT {output}: unknown format {output.suffix!r}, expected .safetensors")
    else:
        _common.check_writable(output, "OUT")
    from ..models.loading import convert_checkpoint
    from ..report import write_atomically, write_json

    with _common.as_usage_error(ValueError, OSError):
        found = convert_checkpoint(arguments.checkpoint, arguments.model, arguments.to)
        settings = found.transformers_config() if folder else None
    content = found.safetensors()
    if folder:
        _common.make_folder(folder, "OUT")
    write_atomically(output, content)
    if folder:
        write_json(folder / "config.json", settings)
    print(f"from   {found.source}: {arguments.checkpoint}")
    print(f"model  {_described(found, guessed=arguments.model is None)}")
    print(f"to     {arguments.to}, {len(found.state)} tensors: {output}")
    return DONE


def _described(found, guessed: bool) -> str:
    """Which model it is, and what else it may be."""
    config = found.config
    size = f"{config.img_size[0]} x {config.img_size[1]} pixels, {config.num_classes} classes"
    if not guessed:
        return f"{found.models[0]}, {size}"
    if not found.models:
        shape = f"embed_dim {config.embed_dim}, depth {config.depth}, {config.num_heads} heads, {config.mlp}"
        return f"none that is known, {shape}, {size}, as its names and shapes tell"
    others = f" (or {', '.join(found.models[1:])})" if found.models[1:] else ""
    return f"{found.models[0]}{others}, {size}, as its names and shapes tell"
