from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np, psutil
from dfcli.system.allocator import kept_memory

def fault():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with kept_memory():
    first, second = fault(), fault()
    kept = psutil.Process().memory_info().rss
print(first, second, kept - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_freed_memory_is_taken_again_without_page_faults_and_goes_back_after_the_block() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    first, second, returned = map(int, done.stdout.split())
    assert second <= first / 10  # as few as 32 at first, where the kernel gives pages of 2 MiB
    assert returned > 60 << 20
