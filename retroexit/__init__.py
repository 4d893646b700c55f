"""Early exits for any trained image decoder.

``retroexit.wrap`` finds the decoder's stages, attaches thin branches, and returns a module that is the
generator, bit for bit, until an exit is asked for. Reference: FIANCEE, Karpikova et al., CVPR 2023.
"""

import logging

from retroexit.api import disable, draft, enable, evaluate, find_stages, fit, load, summary, wrap
from retroexit.core.files import __version__ as __version__
from retroexit.core.workers import ray_workers
from retroexit.errors import RetroExitError, RetroExitWarning
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.provider import Guidance
from retroexit.load import from_pretrained
from retroexit.model import EarlyExitGenerator
from retroexit.plugins import Description, hookimpl
from retroexit.routing.policy import Time
from retroexit.runtime import export, load_bundle
from retroexit.stages.stage import Stage
from retroexit.wrapping.exits import Exit

__all__ = [
    "Description",
    "EarlyExitGenerator",
    "Exit",
    "Guidance",
    "GuidanceBank",
    "RetroExitError",
    "RetroExitWarning",
    "Stage",
    "Time",
    "disable",
    "draft",
    "enable",
    "evaluate",
    "export",
    "find_stages",
    "fit",
    "from_pretrained",
    "hookimpl",
    "load",
    "load_bundle",
    "ray_workers",
    "summary",
    "wrap",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
