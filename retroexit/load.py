"""Read a wrapped generator from its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from retroexit.core.files import reading
from retroexit.core.identity import Identity, fingerprint
from retroexit.core.modules import device_of
from retroexit.core.samples import example_call
from retroexit.errors import CheckpointError, ModeError, OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.hub import local_folder
from retroexit.model import EarlyExitGenerator, check_generator
from retroexit.plugins.description import Description
from retroexit.plugins.host import host
from retroexit.routing.latency import Latency
from retroexit.saving import (
    bank_folder,
    fill_predictor,
    find_key,
    options_from_json,
    read_calibration,
    read_manifest,
    read_predictor,
    read_weights,
)
from retroexit.standin import part_to_wrap
from retroexit.wrapping.options import adapter_options

__all__ = ["from_pretrained", "load"]


def load(
    folder: str | Path,
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    adapter: Description | str | bool | None = None,
    key: Callable[..., Tensor] | None = None,
) -> EarlyExitGenerator:
    """Read a wrapped generator that ``model.save`` or `retroexit.fit` wrote.

    Args:
        folder: The folder, or a repository ``"user/name"`` on the Hugging Face hub if there is no such folder.
        generator: The same trained generator, weights included, which are not saved in the folder.
        example_inputs: Positional inputs to record it with; without them its first call records.
        example_kwargs: Keyword inputs.
        adapter: As for `retroexit.wrap`.
        key: The key function of its `Guidance`, which is not saved; by default the adapter's.

    Returns:
        The wrapped generator, with its branches, predictor and bank.

    Raises:
        CheckpointError: If files or a key function are missing, files are damaged, or they belong to another
            generator.
        PluginError: If the bank's search back-end is not installed.
        ModeError: If the generator is in train mode.
    """
    folder, generator = _check_arguments(folder, generator)
    part = part_to_wrap(generator, adapter, has_inputs=example_inputs is not None or bool(example_kwargs))
    generator, adapter, description = part.generator, part.adapter, part.description
    if example_inputs is None and description.example_inputs is not None:
        example_inputs, example_kwargs = description.example_inputs(generator)
    args, kwargs = example_call(example_inputs, example_kwargs)
    manifest = read_manifest(folder)
    with reading(folder / "model.json", "Copy it again."):
        key = find_key(folder, manifest, key, description.key)
        options = options_from_json(manifest, key, **adapter_options(generator, adapter, description))
        model = EarlyExitGenerator(generator, options)
        model.about, bank_of = dict(manifest["about"]), str(manifest["fingerprint"])
        predictor, router = read_predictor(manifest["predictor"]), model.router
        limit = manifest["guide_limit"]
        router.guide_limit = None if limit is None else float(limit)
        router.latency = None if manifest["latency"] is None else Latency.from_json(manifest["latency"])
        _check_model(folder, manifest, model)
        tensors = read_weights(folder, str(manifest["weights_sha256"]))
        router.calibration = read_calibration(folder, manifest["calibration_sha256"])
        place = bank_folder(folder, manifest["bank_sha256"])
    if predictor is not None:
        fill_predictor(predictor, _under("predictor.", tensors), folder)
        router.predictor = predictor.to(device_of(generator)).eval()
    if place is not None:
        retriever = None if options.guidance is None else host().retriever(options.guidance.retriever)
        bank = GuidanceBank.load(place, bank_of, retriever_class=retriever)
        bank.meta["fingerprint"] = fingerprint(generator)  # the same network, maybe in another precision
        model.bank = bank
    model.restore(_under("branches.", tensors))
    if example_inputs is not None or example_kwargs:
        model.record(*args, **kwargs)
    return part.complete(model)


def from_pretrained(
    name: str | Path,
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    adapter: Description | str | bool | None = None,
    key: Callable[..., Tensor] | None = None,
    **options: Any,
) -> EarlyExitGenerator:
    """Do as `load`, for a folder or a repository ``"user/name"`` on the Hugging Face hub.

    ``options`` are those of `huggingface_hub.snapshot_download`, such as ``revision``, ``token``, ``local_files_only``.
    """
    folder = local_folder(name, **options)
    return load(folder, generator, example_inputs, example_kwargs, adapter=adapter, key=key)


def _check_arguments(folder: str | Path, generator: nn.Module) -> tuple[Path, nn.Module]:
    if isinstance(folder, nn.Module):
        raise OptionError(
            f"folder must come first, then the generator, got a {type(folder).__name__} as the folder. Call "
            "retroexit.load(folder, generator)."
        )
    generator = check_generator(generator)
    if generator.training:
        raise ModeError(
            f"{type(generator).__name__} must be in eval mode, got train mode. Call generator.eval() first."
        )
    return local_folder(folder), generator


def _check_model(folder: Path, manifest: dict[str, Any], model: EarlyExitGenerator) -> None:
    """Check that the files belong to this generator and adapter."""
    kind = type(model.generator).__name__
    difference = Identity.from_json(manifest["generator"]).difference(Identity.of(model.generator))
    if difference:
        raise CheckpointError(
            f"{folder} belongs to another generator than this {kind}: {difference}. Load the weights that it was "
            "fitted with first."
        )
    needs_adapter = manifest["predictor"] is not None and manifest["predictor_reads"] == "inputs"
    if needs_adapter and model.options.predictor_inputs is None:
        raise CheckpointError(
            f"the predictor in {folder} reads a map that an adapter makes from the inputs, but no adapter "
            f"recognises a {kind}. Install the plug-in that it was fitted with."
        )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
