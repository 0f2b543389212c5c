"""`fastvit attention`: a picture of where the class token of a block attends to in an image."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import _common
from ._common import DONE, UsageError
from ._model import add_model_arguments, build, config_of, name_of, quiet_about_large_images, why_not_finite


def add(commands: argparse._SubParsersAction) -> None:
    text = "a picture of where the class token of a block attends to in an image"
    parser = _common.add_command(commands, "attention", text, run)
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".png, .jpg, .webp")
    parser.add_argument("--block", type=int, default=-1, help="its number, from 0; the last if not said")
    parser.add_argument("--head", type=int, help="only this head, from 0; their mean and each of them if not said")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    output = _common.check_writable(arguments.output, "OUT")
    device = _common.checked_device(arguments.device)
    config = config_of(arguments)
    if not -config.depth <= arguments.block < config.depth:
        raise UsageError(
            f"--block is {arguments.block}, expected one of {name_of(arguments)}'s, 0 to {config.depth - 1}"
        )
    heads = range(config.num_heads)
    if arguments.head is not None and arguments.head not in heads:
        raise UsageError(f"--head is {arguments.head}, expected one of {name_of(arguments)}'s, 0 to {heads[-1]}")
    from .. import heatmaps, images

    with _common.as_usage_error(ValueError):
        heatmaps.check_format(output)
    quiet_about_large_images()
    pixels = images.read(arguments.image, config)
    model = build(arguments, config, device, num_classes=0)
    import torch

    from .. import attention_maps

    block = arguments.block % config.depth
    with torch.inference_mode():
        weights = attention_maps(model, pixels[None].to(device), [block])[0][0]  # (heads, queries, keys)
    if not (weights.sum(dim=-1) > 0.5).all():  # a row sums to 1, unless what it was made of is not finite
        raise ValueError(f"{arguments.image}: {why_not_finite(arguments, model)}")
    queries = weights[:, :1] if config.class_token else weights
    maps = queries[..., config.num_prefix_tokens :].mean(dim=1).unflatten(1, config.grid_size).cpu().numpy()
    shown = {f"head {head}": maps[head] for head in (heads if arguments.head is None else [arguments.head])}
    if arguments.head is None:
        shown = {f"mean of {len(heads)} heads": maps.mean(axis=0)} | shown
    query = "the class token" if config.class_token else "all tokens"
    title = f"{name_of(arguments)}, block {block}: attention of {query} to each patch"
    heatmaps.save(output, pixels.permute(1, 2, 0).numpy(), shown, title)
    print(f"block {block}, {', '.join(shown)}: {output}")
    return DONE
