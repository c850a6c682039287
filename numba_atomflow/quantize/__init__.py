"""Ways to turn weights into FP8 codes and group scales: by themselves (rtn), or by what they do to calibration text."""

from typing import Literal

MethodName = Literal["rtn", "awq", "gptq"]
