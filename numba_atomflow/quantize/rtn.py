"""Round to nearest: the method without calibration.

Each group of 128 weights along K is scaled so that its largest magnitude becomes 448; then every weight is rounded to
the nearest E4M3 value, ties to even.
"""

from numba_atomflow.geometry import GROUP
from numba_atomflow.ops.fp8 import quantize_groups

RECORD = {"method": "rtn", "group_size": GROUP}  # stored in the checkpoint

quantize = quantize_groups
