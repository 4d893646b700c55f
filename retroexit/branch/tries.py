"""What symbolic runs have shown about a tail, and what is taken back when one of them fails."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from retroexit.branch.widths.opaque_modules import blame
from retroexit.branch.widths.symint_patch import Namespace
from retroexit.errors import BranchError

__all__ = ["Attribute", "Tries"]

logger = logging.getLogger(__name__)

Attribute = tuple[str, str]
"""Path of a module, and name of an attribute of it."""


@dataclass
class Tries:
    """What runs have shown.

    Attributes:
        frozen: Modules that keep their sizes, by path, with the reason.
        counts: Attributes that seem to be a number of groups or heads, or the size of one.
        refused: Those that are not.
        covered: Files in which ``int`` lets symbolic sizes pass.
        exempt: Files in which that does harm.
    """

    frozen: dict[str, str]
    counts: set[Attribute] = field(default_factory=set)
    refused: set[Attribute] = field(default_factory=set)
    covered: list[Namespace] = field(default_factory=list)
    exempt: list[Namespace] = field(default_factory=list)

    def give_way(self, error: Exception, paths: dict[int, str]) -> None:
        """Take back what may be at fault: a guess about an attribute, a covered file, or the module itself.

        Args:
            error: What a run raised.
            paths: Path of every module that ran, by identity.

        Raises:
            BranchError: If there is nothing to take back.
        """
        fault = blame(error, paths, self.frozen)
        logger.debug("a symbolic run failed in %r", fault.path, exc_info=error)
        path = fault.path or ""
        guesses = {(p, n) for p, n in self.counts if not path or path == p or path.startswith(f"{p}.")}
        files = [names for names in self.covered if names is fault.namespace]
        if guesses:
            self.counts -= guesses
            self.refused |= guesses
        elif files:
            self.covered.remove(files[0])
            self.exempt.append(files[0])
        elif path:
            kept = {p: reason for p, reason in self.frozen.items() if not p.startswith(f"{path}.")}
            self.frozen = kept | {path: fault.reason}
        else:
            raise BranchError(
                f"asked for a narrower copy of the stages after the attach point; found {fault.reason}. "
                "Attach elsewhere, use scale=1, or let an adapter build the stage.",
                error,
            ) from error
