"""``retroexit doctor`` and ``retroexit plugins``: the machine, the installation, what extends it."""

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import typer

from retroexit.cli import options
from retroexit.errors import WeightsError
from retroexit.metrics.weights import hub_file, hub_path
from retroexit.plugins.host import host
from retroexit.report.text_tables import table

_COMBINED = ("all", "demo", "dev", "docs", "test", "zoo")  # made of other extras, or not for users


@dataclasses.dataclass(frozen=True)
class Check:
    """A result: ``hint`` says what to do, if anything."""

    name: str
    status: Literal["ok", "warn", "fail"]  # warn is slow or incomplete, fail is broken
    detail: str
    hint: str = ""


def doctor() -> None:
    """Check versions, threads, search back-ends and metric weights; downloads nothing.

    Example:
        retroexit doctor
    """
    checks = diagnose()
    for check in checks:
        hint = f"\n      {check.hint}" if check.hint else ""
        typer.echo(f"{check.status:4}  {check.name}: {check.detail}{hint}")
    if any(check.status == "fail" for check in checks):
        options.next_step("mend what failed by the lines below it, then retroexit doctor")
        raise typer.Exit(1)
    options.next_step("retroexit demo, or retroexit inspect mymodels:decoder --shape 1,32,16,32")


def plugins() -> None:
    """List the installed plug-ins, the hooks of each one, and the names that it offers there.

    Example:
        retroexit plugins
    """
    installed = host().installed()
    rows = [[p.name, p.distribution, p.version, p.state, ", ".join(p.hooks)] for p in installed]
    typer.echo(table(["plug-in", "distribution", "version", "state", "hooks"], rows))
    offers = sorted((hook, p.name, " ".join(names)) for p in installed for hook, names in p.offers.items())
    typer.echo("\n" + table(["hook", "plug-in", "offers"], offers))
    problems = [f"{plugin}: {plugin.error}" for plugin in installed if plugin.error is not None]
    if problems:
        typer.echo("\n" + "\n".join(problems))
    options.next_step("retroexit fit --help-all, for the options that take these names")


def diagnose() -> list[Check]:
    """Run every check; one that raises is a failed check."""
    checks: list[Check] = []
    for check in (_torch, _threads, _cpu, _dependencies, _backends, _lpips_weights, _plugins):
        try:
            checks.extend(check())
        except Exception as error:
            name = check.__name__.lstrip("_").replace("_", " ")
            checks.append(Check(name, "fail", f"the check failed: {type(error).__name__}: {error}"))
    return checks


def _torch() -> Iterator[Check]:
    system = f"{platform.system()} {platform.machine()}"
    yield Check("python", "ok", f"{platform.python_version()} ({system}), {sys.executable}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    is_old = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 9)
    hint = "pip install --upgrade 'torch>=2.9'" if is_old else ""
    yield Check("torch", "fail" if is_old else "ok", f"{torch.__version__}, {build}", hint)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check("cuda", "ok", ", ".join(names) or "no CUDA device; everything runs on the CPU")


def _threads() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    detail = f"torch uses {threads} of {cores} usable cores; OMP_NUM_THREADS={variable}"
    hint = f"torch.set_num_threads({cores}): more threads only wait" if threads > cores else ""
    yield Check("threads", "warn" if hint else "ok", detail, hint)


def _cpu() -> Iterator[Check]:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text(errors="replace") if listing.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    has_bfloat16 = re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text)
    hint = "" if has_bfloat16 else "bfloat16 is emulated here: leave autocast off on the CPU"
    name = model.group(1) if model else platform.machine()
    yield Check("cpu", "warn" if hint else "ok", f"{name}; {torch.backends.cpu.get_cpu_capability()}", hint)


def _dependencies() -> Iterator[Check]:
    """Read the requirements of the installed distribution: the core ones must be installed."""
    try:
        requirements = importlib.metadata.requires("retroexit") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("retroexit", "warn", "not installed, run from its folder", "pip install --editable .")
        return
    yield Check("retroexit", "ok", importlib.metadata.version("retroexit"))
    pattern = re.compile(r"""([\w.-]+)[^;]*(?:;\s*extra\s*==\s*['"]([^'"]+)['"])?$""")
    for name, extra in (match.groups() for match in map(pattern.match, requirements) if match):
        if name == "torch" or extra in _COMBINED:
            continue
        try:
            yield Check(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if name == "hnswlib":  # one search back-end, which not every machine can compile
                yield Check(name, "warn", "not installed", "install a C++ compiler, then pip install hnswlib")
            elif extra is None:
                yield Check(name, "fail", "not installed", f"pip install {name}")
            else:
                detail = f"not installed (extra {extra!r})"
                yield Check(name, "ok", detail, f"pip install 'retroexit[{extra}]'")


def _backends() -> Iterator[Check]:
    for module, distribution in (("faiss", "faiss-cpu"), ("hnswlib", "hnswlib")):
        try:
            importlib.import_module(module)
        except Exception as error:  # a compiled module can fail in more ways than ImportError
            hint = f"pip install --force-reinstall --no-cache-dir {distribution}"
            status: Literal["warn", "fail"] = "warn" if module == "hnswlib" else "fail"  # one that pip has to compile
            yield Check(f"retrieval: {module}", status, f"{type(error).__name__}: {error}", hint)
        else:
            yield Check(f"retrieval: {module}", "ok", "can be imported")


def _lpips_weights() -> Iterator[Check]:
    folder = hub_path("alex").parent
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        yield Check("cache folder", "ok", f"{folder} is writable")
    else:
        hint = "set TORCH_HOME to a folder that you may write to"
        yield Check("cache folder", "fail", f"{folder}: nothing can be written to {existing}", hint)
    for net in ("alex", "squeeze", "vgg"):
        path, name = hub_path(net), f"lpips weights: {net}"
        if not path.is_file():
            hint = f"downloaded at first use; offline, copy {path.name} into {folder} or give LPIPS(weights=...)"
            yield Check(name, "warn", f"{path.name} is not in {folder}", hint)
            continue
        try:
            yield Check(name, "ok", f"{hub_file(net).name}, its hash is right")
        except WeightsError as error:
            yield Check(name, "fail", str(error))


def _plugins() -> Iterator[Check]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same texts are reported below
        installed = host().installed()
    for plugin in installed:
        origin = f"{plugin.distribution} {plugin.version}".strip()
        if plugin.error is None:
            yield Check(f"plug-in: {plugin.name}", "ok", f"{origin}: {', '.join(plugin.hooks)}")
        else:
            hint = f"report it to {plugin.distribution or 'its author'}, or uninstall it"
            yield Check(f"plug-in: {plugin.name}", "fail", f"{origin}: {plugin.error}", hint)
