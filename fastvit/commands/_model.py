"""What embed, classify, attention and validate share: the model that is asked for, and images that are skipped."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import _common
from ._common import DTYPES, positive

if TYPE_CHECKING:
    import torch

    from .. import VisionTransformer, ViTConfig

DEFAULT = "vit_base_patch16_224"  # the model of --pretrained


SHARDS = frozenset({".parquet", ".tar"})  # many images in one file, which `embed --engine ray` alone reads


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    text = f"see fastvit.list_models(); what the checkpoint tells, or {DEFAULT}, if not said"
    parser.add_argument("--model", help=text)
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="download timm's weights from the Hugging Face hub")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights in a .safetensors or .pth file")
    parser.add_argument("--img-size", type=positive(int), help="another image size than the model's own")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def config_of(arguments: argparse.Namespace) -> ViTConfig:
    """The config of the model that is asked for, without building it; raises UsageError where there is none."""
    from dataclasses import replace  # which takes as long to import as all commands

    with _common.as_usage_error(ValueError, OSError):
        if arguments.model is None and arguments.checkpoint:
            from ..models.loading import config_of_checkpoint

            config, _ = config_of_checkpoint(arguments.checkpoint)
        else:
            from ..models.registry import model_entry

            config = model_entry(arguments.model or DEFAULT).config
        return config if arguments.img_size is None else replace(config, img_size=arguments.img_size)


def name_of(arguments: argparse.Namespace) -> str:
    """What to call the model that is asked for."""
    return arguments.model or (str(arguments.checkpoint) if arguments.checkpoint else DEFAULT)


def build(arguments: argparse.Namespace, config: ViTConfig, device: str, num_classes: int) -> VisionTransformer:
    """The model that is asked for, of `config_of`, with its weights, in evaluation; raises UsageError for weights that
    do not fit."""
    from dataclasses import replace

    import torch

    from .. import VisionTransformer, create_model, load_checkpoint

    with _common.as_usage_error(ValueError, OSError):
        if arguments.pretrained:
            name = arguments.model or DEFAULT
            model = create_model(name, True, num_classes=num_classes, img_size=config.img_size)
        else:  # a classifier that does not fit is no error where none is wanted
            model = VisionTransformer(replace(config, num_classes=num_classes))
            load_checkpoint(model, arguments.checkpoint, new_classifier=num_classes == 0)
    return model.to(device, getattr(torch, DTYPES[arguments.dtype])).eval()


MANY = 500  # images that pay for measuring which runtime is the fastest


def served(
    model: VisionTransformer, output: str, batch_size: int, count: int, runtime: str | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives this output of `model` for `count` images: on a CPU the model frozen, which is faster and the same
    within rounding; on a GPU, and where it cannot be frozen, itself. runtime: the frozen model's; `count` decides
    whether it pays to measure which, if not given."""
    from ..frozen import freeze
    from ..report import first_line, note

    if count and next(model.parameters()).device.type == "cpu":
        runtime = runtime or ("auto" if count >= MANY else "torch")
        try:
            frozen = freeze(model, output=output, runtime=runtime, batch_sizes=(min(batch_size, count),))
        except (ValueError, RuntimeError) as error:
            note(f"The model runs as it is, not frozen: {first_line(error)}.")
        else:
            note(f"The model is frozen, on {frozen.runtime}: the same numbers within rounding.")
            return frozen
    if output == "logits":
        return model
    return lambda images: model.forward_head(model.forward_features(images), pre_logits=True)


def quiet_about_large_images() -> None:
    """fastvit.images refuses what Pillow only warns of."""
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Skipped(list):
    """Why images were skipped; each is named on stderr as it comes."""

    def __call__(self, reason: object) -> None:
        from ..report import note

        self.append(reason)
        note(f"skipped {reason}")


def finite(
    arguments: argparse.Namespace, model: VisionTransformer, paths: list[Path], rows: torch.Tensor, skip: Skipped
) -> tuple[list[Path], torch.Tensor]:
    """paths and rows (B, n) of those images whose numbers are all finite; the others are skipped, with the reason."""
    is_finite = rows.isfinite().all(dim=1)
    if is_finite.all():
        return paths, rows
    reason = why_not_finite(arguments, model)
    good = []
    for path, fine in zip(paths, is_finite.tolist(), strict=True):
        if fine:
            good.append(path)
        else:
            skip(f"{path}: {reason}")
    return good, rows[is_finite]


def why_not_finite(arguments: argparse.Namespace, model: VisionTransformer) -> str:
    """What to say of an output that is not: the weights that are not either, or what else could help."""
    dtype = DTYPES[arguments.dtype]
    reason = f"the model's output is not finite in {dtype}"
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        reason += f", nor are the weights of {arguments.checkpoint or name_of(arguments)}: {bad[0]}{more}"
    return reason + ("; --dtype bfloat16 and float32 reach further" if dtype == "float16" else "")
