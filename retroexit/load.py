"""Read a wrapped generator from its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from retroexit.core.files import MANIFEST, read_tensors, sha256_of
from retroexit.core.identity import Identity, fingerprint, unwrapped
from retroexit.core.modules import device_of
from retroexit.errors import CheckpointError, RetroExitError
from retroexit.guidance.bank import GuidanceBank
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.description import Description
from retroexit.plugins.host import host
from retroexit.routing.latency import Latency
from retroexit.saving.model_files import fill_predictor, read_calibration, read_manifest, read_predictor
from retroexit.saving.settings import options_from_json, with_key
from retroexit.wrapping.options import WrapOptions, shadowed_keywords

__all__ = ["load"]


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
        folder: The folder.
        generator: The same trained generator, weights included; it is not part of what was saved.
        example_inputs: Positional inputs to record it with; without them its first call records.
        example_kwargs: Keyword inputs.
        adapter: What a plug-in knows about the generator, as for `retroexit.wrap`.
        key: The key function of its `Guidance`, which is not saved; not needed where the adapter brings it.

    Returns:
        The wrapped generator, with its branches, predictor and bank.

    Raises:
        CheckpointError: If files or a key function are missing, files are damaged, or they belong to another
            generator.
        PluginError: If the bank's search back-end is not installed.
    """
    folder, generator = Path(folder), unwrapped(generator)
    description = host().describe(generator, adapter)
    if example_inputs is None and description.example_inputs is not None:
        example_inputs, example_kwargs = description.example_inputs(generator)
    manifest = read_manifest(folder)
    knowledge = {
        "shadowed": shadowed_keywords(generator),
        "predictor_inputs": description.predictor_inputs,
        "build_stage": description.build_stage,
        "description": None if adapter is None else description,
    }
    try:
        options = options_from_json(manifest, knowledge)
        predictor = read_predictor(manifest["predictor"])
        about, has_bank, limit = dict(manifest["about"]), bool(manifest["has_bank"]), manifest["guide_limit"]
        expected, weights_of = Identity.from_json(manifest["generator"]), str(manifest["fingerprint"])
        latency = None if manifest["latency"] is None else Latency.from_json(manifest["latency"])
    except (ValueError, KeyError, TypeError, AttributeError, RetroExitError) as error:
        raise CheckpointError(
            f"{folder} is damaged: model.json holds {type(error).__name__}: {error}. Copy it again.", folder
        ) from error
    options = with_key(options, manifest, key, description.key, folder)
    _check_folder(folder, manifest, expected, generator, options)
    tensors, _ = read_tensors(folder / "weights.safetensors")
    model = EarlyExitGenerator(generator, options)
    model.about = about
    if predictor is not None:
        fill_predictor(predictor, _under("predictor.", tensors), folder)
        model.router.predictor = predictor.to(device_of(generator)).eval()
    if has_bank:
        model.bank = _load_bank(folder, manifest, weights_of, options, generator)
    model.router.latency, model.router.guide_limit = latency, limit
    model.router.calibration = read_calibration(folder, manifest["calibration_sha256"])
    model.restore(_under("branches.", tensors))
    if example_inputs is not None or example_kwargs is not None:
        model.record(*(example_inputs or ()), **(example_kwargs or {}))
    return model


def _check_folder(
    folder: Path, manifest: dict[str, Any], expected: Identity, generator: nn.Module, options: WrapOptions
) -> None:
    """Check that the weights are unchanged and belong to this generator and adapter."""
    difference = expected.difference(Identity.of(generator))
    if difference:
        raise CheckpointError(
            f"{folder} belongs to another generator than this {type(generator).__name__}: {difference}. Load the "
            "weights that it was fitted with first.",
            folder,
        )
    if sha256_of(folder / "weights.safetensors") != manifest["weights_sha256"]:
        raise CheckpointError(
            f"{folder / 'weights.safetensors'} has changed since it was written. Copy it again.", folder
        )
    needs_adapter = manifest["predictor"] is not None and manifest["predictor_reads"] == "inputs"
    if needs_adapter and options.predictor_inputs is None:
        raise CheckpointError(
            f"the predictor in {folder} reads a map that an adapter makes from the inputs, but no adapter "
            f"recognises a {type(generator).__name__}. Install the plug-in that it was fitted with.",
            folder,
        )


def _load_bank(
    folder: Path, manifest: dict[str, Any], weights_of: str, options: WrapOptions, generator: nn.Module
) -> GuidanceBank:
    """Read the bank that was saved with the model, and no other."""
    if manifest["bank_sha256"] not in (None, sha256_of(folder / "bank" / MANIFEST)):
        raise CheckpointError(
            f"{folder} holds another guidance bank than the one it was saved with. Copy it again.", folder
        )
    retriever = None if options.guidance is None else host().retriever(options.guidance.retriever)
    bank = GuidanceBank.load(folder / "bank", weights_of, retriever_class=retriever)
    bank.meta["fingerprint"] = fingerprint(generator)  # the same network, maybe in another precision
    return bank


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
