"""OASIS for retroexit: a generator under the official parameter names, and the plug-in that describes it.

```python
generator = OASISGenerator()
generator.load_state_dict(torch.load("best_G_EMA.pth", weights_only=True))
model = retroexit.wrap(generator.eval(), attach_at=[1, 2, 3, 4], scale=1 / 4)
```
"""

from __future__ import annotations

from retroexit_oasis.generator import OASISGenerator, SPADEBlock, SPADENorm
from retroexit_oasis.plugin import retroexit_build_stage, retroexit_describe

__all__ = ["OASISGenerator", "SPADEBlock", "SPADENorm", "retroexit_build_stage", "retroexit_describe"]
