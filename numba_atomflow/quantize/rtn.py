"""Round to nearest: the quantiser that needs nothing but the weights.

Each row's group of 128 columns is scaled so that its largest magnitude becomes 448, then every weight is rounded to the
nearest E4M3 value, ties to even.
"""

from numba_atomflow.geometry import GROUP
from numba_atomflow.ops.fp8 import quantize_groups

RECORD = {"method": "rtn", "group_size": GROUP}  # what a checkpoint says about it

quantize = quantize_groups
