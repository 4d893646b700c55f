"""MegaPortraits for retroexit: the decoder that gets the exits, the key of the frame bank, and the plug-in.

The authors have published neither code nor weights. This decoder is for training and for counting MACs; it
costs the 213 GMACs that FIANCEE states for its backbone (table 2).

```python
decoder = MegaPortraitsG2d().eval()
model = retroexit.wrap(decoder, attach_at=[2, 4, 6], scale=1 / 15, min_channels=24)
image = model(feature, exit=1)
```

**The frame bank** (FIANCEE, section 4.2). Frames of the source are looked up by the driver's head angles and
expression, which `DrivenG2d` adds to the decoder's arguments. With `guidance=True` the nearest frame, resized
by convolutions, is passed to every module of every branch.

```python
driven = DrivenG2d(decoder)
model = retroexit.wrap(driven, attach_at=[2, 4, 6], scale=1 / 15, min_channels=24, guidance=True)
retroexit.fit(model, frames, "runs/avatar")  # frames: tuples (feature, angles, expression), no batch axis
image = model(feature, angles, expression, threshold=0.1)
```

Each input to `fit` is a training sample and a frame of the bank; in training, its guide is another frame.
For another source face fill a new bank, with `frame_key` for its keys, and set it: ``model.bank = ...``.

**Another implementation** can be wrapped too. Name its blocks, as its ``named_modules`` prints them:

```python
driven = DrivenG2d(their_g2d.eval())
description = describe_g2d(driven, blocks=[f"res_blocks.{i}" for i in range(6)] + ["up1", "up2", "up3"])
model = retroexit.wrap(driven, attach_at=[2, 4, 6], scale=1 / 15, adapter=description, guidance=True)
```

Without a frame bank, ``retroexit.wrap(their_g2d, ..., stages=[...])`` is enough; without names retroexit finds
the blocks.
"""

from __future__ import annotations

from retroexit_megaportraits.decoder import MegaPortraitsG2d, ResidualBlock
from retroexit_megaportraits.driven import DrivenG2d, driver_key
from retroexit_megaportraits.frames import frame_key
from retroexit_megaportraits.plugin import describe_g2d, retroexit_build_stage, retroexit_describe

__all__ = [
    "DrivenG2d",
    "MegaPortraitsG2d",
    "ResidualBlock",
    "describe_g2d",
    "driver_key",
    "frame_key",
    "retroexit_build_stage",
    "retroexit_describe",
]
