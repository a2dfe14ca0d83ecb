"""Optimizers, schedules and what stands between backward and the next forward; their bytes are in `footprint`."""

from burnish.optim.footprint import BYTES_PER_PARAMETER as BYTES_PER_PARAMETER
from burnish.optim.footprint import bytes_per_parameter as bytes_per_parameter
