"""A process that takes training steps starts with the settings and the allocator that are fastest for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crisp import process_settings
from crisp.process_settings import (
    SETTINGS,
    environment_for_steps,
    environment_without_settings,
    find_allocator,
    log_allocator,
)

LISTING = """3 libs found in cache `/etc/ld.so.cache'
\tlibtcmalloc_minimal_debug.so.4 (libc6,x86-64) => /lib/libtcmalloc_minimal_debug.so.4
{}\tlibz.so.1 (libc6,x86-64) => /lib/libz.so.1
"""
MINIMAL = "\tlibtcmalloc_minimal.so.4 (libc6,x86-64) => /lib/libtcmalloc_minimal.so.4\n"
FULL = "\tlibtcmalloc.so.4 (libc6,x86-64) => /lib/libtcmalloc.so.4\n"


@pytest.fixture
def library_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `ldconfig -p` prints, of a machine without a GPU."""
    listing = tmp_path / "listing"
    listing.write_text(LISTING.format(FULL + MINIMAL))
    ldconfig = tmp_path / "ldconfig"
    ldconfig.write_text(f"#!/bin/sh\ncat {listing}\n")
    ldconfig.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(process_settings, "_GPU_DRIVER", tmp_path / "no driver")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return listing


def test_the_allocator_is_found_by_name(library_cache: Path) -> None:
    assert find_allocator() == "/lib/libtcmalloc_minimal.so.4"
    library_cache.write_text(LISTING.format(FULL))
    assert find_allocator() == "/lib/libtcmalloc.so.4"
    library_cache.write_text(LISTING.format(""))
    assert find_allocator() is None


def test_a_gpu_has_an_allocator_of_its_own(library_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_settings, "_GPU_DRIVER", library_cache)
    assert find_allocator() is None


def test_what_the_user_sets_is_left(library_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    environment = environment_for_steps()
    assert environment["OMP_WAIT_POLICY"] == "active"
    assert environment["GOMP_SPINCOUNT"] == SETTINGS["GOMP_SPINCOUNT"]
    assert environment["LD_PRELOAD"] == "/lib/libtcmalloc_minimal.so.4"
    monkeypatch.setenv("LD_PRELOAD", "")
    assert environment_for_steps()["LD_PRELOAD"] == ""


def test_the_settings_can_be_taken_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environment = environment_without_settings()
    assert environment["OMP_WAIT_POLICY"] == "active", "the user's"
    assert not {"GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"} & environment.keys()


def test_the_allocator_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    log_allocator()
    assert "memory comes from the C library" in caplog.text
    assert "apt install libtcmalloc-minimal4" in caplog.text
    monkeypatch.setenv("LD_PRELOAD", "/lib/libtcmalloc_minimal.so.4")
    log_allocator()
    assert "memory comes from /lib/libtcmalloc_minimal.so.4" in caplog.text


PROBE = """
import os, sys
from crisp import cli
command = cli.Command(help="", run=lambda args: print(
    os.getpid(), args, os.environ.get("LD_PRELOAD"), os.environ["GOMP_SPINCOUNT"],
    "tcmalloc" in open("/proc/self/maps").read()), takes_steps={takes_steps})
cli.COMMANDS["probe"] = command
sys.exit(cli.main())
"""


@pytest.mark.parametrize("takes_steps", [True, False])
def test_a_command_that_takes_steps_starts_again_with_it(tmp_path: Path, takes_steps: bool) -> None:
    allocator = find_allocator()
    script = tmp_path / "probe.py"
    script.write_text(PROBE.format(takes_steps=takes_steps))
    environment = {name: value for name, value in os.environ.items() if name not in {*SETTINGS, "LD_PRELOAD"}}
    process = subprocess.Popen(
        [sys.executable, "-u", str(script), "probe", "a b", "--c"], stdout=subprocess.PIPE, text=True, env=environment
    )
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    preloaded = allocator if takes_steps else None
    assert output.split("\n")[0] == (
        f"{process.pid} ['a b', '--c'] {preloaded} {SETTINGS['GOMP_SPINCOUNT']} {preloaded is not None}"
    )
