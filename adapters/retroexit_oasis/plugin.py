"""The plug-in that describes OASIS generators: this package's and the official one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retroexit.plugins import Description, hookimpl
from retroexit_oasis.datasets import DATASETS
from retroexit_oasis.discriminator import OASISDiscriminator
from retroexit_oasis.generator import OASISGenerator, SPADEBlock
from retroexit_oasis.objective import OASISObjective

__all__ = ["retroexit_build_stage", "retroexit_describe"]


@hookimpl
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Describe an OASIS generator: this package's, or an object of the official code."""
    if not isinstance(generator, OASISGenerator) and not _is_official(generator):
        return None
    body = generator.get_submodule("body")
    return Description(
        name="OASIS",
        stages=tuple(f"body.{name}" for name, _ in body.named_children()),
        example_inputs=_example_inputs,
        image_range=(-1.0, 1.0),
        predictor_inputs=_label_map,
        value_after=3,  # keys come from l_1, the first attach point; values from l_3 (paper section 4.1)
        discriminator=_discriminator,
        adversarial=_objective(generator),
    )


@hookimpl
def retroexit_build_stage(stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
    """Make a thin SPADE block: the hidden width of its normalisations stays, a shortcut is grown if needed.

    Blocks of the official code hold the options of their constructor.
    """
    if isinstance(stage, SPADEBlock):
        painter = stage.norm_0.mlp_shared[0]
        assert isinstance(painter, nn.Conv2d)
        return SPADEBlock(in_channels, out_channels, painter.in_channels, painter.out_channels)
    if type(stage).__name__ == "ResnetBlock_with_SPADE" and hasattr(stage, "opt"):
        official: Any = type(stage)
        thin: nn.Module = official(in_channels, out_channels, stage.opt)
        return thin
    return None


def _is_official(generator: nn.Module) -> bool:
    """Recognise ``OASIS_Generator`` by its name and parts, because its code is not an importable package."""
    parts = {name for name, _ in generator.named_children()}
    return (
        type(generator).__name__ == "OASIS_Generator"
        and parts >= {"body", "conv_img", "fc"}
        and hasattr(generator, "opt")
    )


def _example_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make a one-hot label map of vertical stripes, every label once, of the size that was trained on."""
    num_labels = _num_labels(generator)
    if isinstance(generator, OASISGenerator):
        height, width = generator.crop
    else:
        opt: Any = generator.opt
        height, width = round(opt.crop_size / opt.aspect_ratio), opt.crop_size
    device = next(generator.parameters()).device
    stripe = torch.arange(width, device=device) * num_labels // width  # (W,)
    label = nn.functional.one_hot(stripe, num_labels).T.float()  # (W, labels) -> (labels, W)
    return (label[None, :, None, :].expand(1, -1, height, -1).contiguous(),), {}


def _num_labels(generator: nn.Module) -> int:
    if isinstance(generator, OASISGenerator):
        return generator.num_labels
    opt: Any = generator.opt
    return int(opt.semantic_nc)


def _discriminator(generator: nn.Module) -> nn.Module:
    """Make a fresh discriminator for images of this generator, official ones included."""
    return OASISDiscriminator(_num_labels(generator))


def _objective(generator: nn.Module) -> OASISObjective:
    """Use the authors' weight of LabelMix for the data set with this number of labels."""
    weights = {dataset.num_labels: dataset.labelmix_weight for dataset in DATASETS.values()}
    return OASISObjective(weights.get(_num_labels(generator), 10.0))


def _label_map(label: Tensor, z: Tensor | None = None) -> Tensor:
    """Return the label map, the predictor's input.

    The paper's predictor also reads the noise, one of 100 fixed vectors (section 4.1). Here the noise is usually
    drawn inside ``forward``, where the predictor cannot read it.
    """
    return label
