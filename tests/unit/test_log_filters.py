"""Messages of libraries: what says nothing to a user is left out, and nothing else."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from hrm_ray.log_filters import silence_unused_kernels


def test_only_the_kernel_that_is_not_used_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    silence_unused_kernels()
    silence_unused_kernels()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("Failed to load something else")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load something else"]
    assert len(logger.filters) == 1


@pytest.mark.parametrize("section", ['optimizer={"use_8bit_optimizer": True}', 'adapt={"use_peft": True}'])
def test_a_command_loads_the_libraries_without_a_word(section: str) -> None:
    """bitsandbytes itself, and by way of peft. What it would say depends on the CPU; where it says nothing, this holds
    anyway."""
    script = (
        "from hrm_ray.launch.fallbacks import settle_memory_options\n"
        "from hrm_ray.settings.tree import RunSettings\n"
        f"settle_memory_options(RunSettings({section}), 'cpu')\n"
        "import sys, peft, bitsandbytes\n"
        "assert 'bitsandbytes.backends.cpu.ops' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr
