"""Write the table of options in configuration.md: python docs/options.py."""

import re
from pathlib import Path

import typer

from retroexit.cli.app import _app
from retroexit.cli.fit import FIRST_PAGE

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- begin: python docs/options.py -->", "<!-- end -->"
GROUPS = {
    "Exits": (*FIRST_PAGE["Exits"], "tap", "image", "image_only", "init", "width_rule", "adapter", "retriever", "bank"),
    "Losses": ("losses", "equalise", "instead", "loss_weights", "discriminator", "adversarial", "gaze"),
    "Quality, promise and times": (*FIRST_PAGE["Quality"], "confidence", "latency"),
    "Devices": ("accelerator", "devices", "nodes"),
}


def tables() -> str:
    """Describe every option of `retroexit fit`, those that no group names under "Training"."""
    command = typer.main.get_command(_app()).commands["fit"]  # type: ignore[attr-defined]
    context = typer.Context(command)
    params = {p.name: p for p in command.params if any(opt.startswith("--") for opt in p.opts)}
    skipped = {"config", "dry_run", "help_all"}
    named = {name for names in GROUPS.values() for name in names} | set(FIRST_PAGE["What"]) | skipped
    what = tuple(name for name in FIRST_PAGE["What"] if name in params and name not in skipped)
    groups = {"What": what, **GROUPS, "Training": tuple(name for name in params if name not in named)}
    lines: list[str] = []
    for title, names in groups.items():
        lines += [f"### {title}", "", "| key | value | meaning |", "|---|---|---|"]
        for name in names:
            flags, text = params[name].get_help_record(context)
            value = "".join(re.findall(r"<(.+)>", flags)) or "bool"
            key = params[name].opts[0].removeprefix("--")
            lines.append(f"| `{key}` | {value.replace(' range', '')} | {' '.join(text.split())} |".replace("<", "&lt;"))
        lines.append("")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with the table of today."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
