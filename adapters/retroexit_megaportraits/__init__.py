"""MegaPortraits for retroexit: the decoder that gets the exits, the key of the frame bank, and the plug-in.

No official weights exist, nor official code: the authors have published neither. The decoder is here to be
trained and to be counted; it costs the 213 GMACs that FIANCEE states for its backbone (table 2).

```python
decoder = MegaPortraitsG2d().eval()
model = retroexit.wrap(decoder, attach_at=[2, 4, 6], scale=1 / 15, min_channels=24)
key = frame_key(angles, expression)  # what a bank of frames is searched with
```
"""

from __future__ import annotations

from retroexit_megaportraits.decoder import MegaPortraitsG2d, ResidualBlock
from retroexit_megaportraits.frames import frame_key
from retroexit_megaportraits.plugin import retroexit_build_stage, retroexit_describe

__all__ = ["MegaPortraitsG2d", "ResidualBlock", "frame_key", "retroexit_build_stage", "retroexit_describe"]
