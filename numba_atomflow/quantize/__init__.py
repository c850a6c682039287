"""FP8 quantization methods: round-to-nearest (rtn), and with calibration text AWQ and GPTQ."""

from typing import Literal

MethodName = Literal["rtn", "awq", "gptq"]
