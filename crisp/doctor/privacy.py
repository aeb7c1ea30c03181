"""What a report must not tell: who runs it, where they live, and what their environment keeps secret."""

import contextlib
import getpass
import os
import re
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import crisp

SECRET_NAMES = re.compile(r"key|token|secret|passw|credential|auth|cookie|session|dsn", re.IGNORECASE)
"""Environment variables so named are taken to hold a secret"""

SHOWN_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LD_PRELOAD",
    "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMBA_DISABLE_JIT",
    "TRITON_INTERPRET", "TORCH_COMPILE_DISABLE", "NVIDIA_TF32_OVERRIDE",
    "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
)  # fmt: skip
"""The only variables that a report shows: they change how training runs"""

_NOBODY = {"root", "user", "ubuntu", "admin", "nobody", "docker", "runner", "jovyan", "localhost"}
"""Names that tell nothing, and occur as words"""

_SHORTEST_SECRET = 6


def redactor(environment: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """A function that takes out of a text: secrets of the environment, the user's name, the host's, folders of theirs.

    Args:
        environment: whose values are looked through; default: that of this process.
    """
    environment = os.environ if environment is None else environment
    replaced = {value: "<secret>" for name, value in environment.items() if _is_secret(name, value)}
    replaced |= _folders()
    words = dict.fromkeys(_names(environment), "<user>") | dict.fromkeys(_hosts(), "<host>")
    # The longest first, since folders lie in each other.
    literal = re.compile("|".join(map(re.escape, sorted(replaced, key=len, reverse=True))) or "(?!)")
    whole = re.compile(r"(?<![\w.-])(" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + r")(?![\w-])")

    def redact(text: str) -> str:
        text = literal.sub(lambda found: replaced[found[0]], text)
        text = re.sub(r"://[^/@\s]+@", "://<secret>@", text)
        text = re.sub(r"(/home/|/Users/)[^/\s'\":]+", r"\1<user>", text)
        return whole.sub(lambda found: words[found[0]], text) if words else text

    return redact


def _is_secret(name: str, value: str) -> bool:
    return len(value) >= _SHORTEST_SECRET and bool(SECRET_NAMES.search(name)) and not Path(value).is_dir()


def _folders() -> dict[str, str]:
    found = {
        str(Path.home()): "~",
        str(Path.cwd()): "<here>",
        str(Path(crisp.__file__).parent): "<crisp>",
        sysconfig.get_path("purelib"): "<site-packages>",
        sys.prefix: "<environment>",
        sys.base_prefix: "<python>",
        tempfile.gettempdir(): "<tmp>",
    }
    return {folder: name for folder, name in found.items() if folder.count("/") > 1 or (name == "~" and folder != "/")}


def _names(environment: Mapping[str, str]) -> set[str]:
    names = {environment.get(variable, "") for variable in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with contextlib.suppress(KeyError, OSError):  # a user id without a name, as in containers
        names.add(getpass.getuser())
    return {name for name in names if name} - _NOBODY


def _hosts() -> set[str]:
    name = socket.gethostname()
    return {host for host in (name, name.partition(".")[0]) if len(host) > 2} - _NOBODY


def shown_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of `SHOWN_VARIABLES` that are set."""
    environment = os.environ if environment is None else environment
    return {name: environment[name] for name in SHOWN_VARIABLES if name in environment}
