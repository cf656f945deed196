"""Integer lightness of 8-bit colours, the same on every device.

The tables of CLAHE turn one pixel more in a bin into many levels of a pixel: rounding must not decide it.
"""

from __future__ import annotations

import numpy as np

_V = np.arange(256) / 255
LINEAR = np.round(65535 * np.where(_V <= 0.04045, _V / 12.92, ((_V + 0.055) / 1.055) ** 2.4)).astype(np.int32)
"""Linear light of a level of sRGB, in 0 ... 65,535."""
RED, GREEN, BLUE = 871, 2929, 296
"""Shares of linear light in luminance, of 4,096 (IEC 61966-2-1)."""
_Y = (np.arange(4096) + 0.5) / 4096
_ROOT = np.where(_Y > 216 / 24389, np.cbrt(_Y), _Y * (24389 / 27 / 116) + 16 / 116)
LIGHTNESS = np.round(255 * (1.16 * _ROOT - 0.16)).astype(np.uint8)
"""L of CIE L*a*b* as one of 256 levels, by luminance in 4,096 steps: (871 R + 2929 G + 296 B) >> 16."""
