"""What this machine has - CPU, GPU, TEE, isolation - and which paths will be used. Reads, and starts two short programs."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import veriattn
from veriattn.errors import VeriattnError
from veriattn.home import models_directory, state_directory
from veriattn.native import active_isa, available_isas, cpu_features, get_threads
from veriattn.spec.constants import SPEC_VERSION
from veriattn.verifier.isolation import harden_self, probe

_TIMEOUT_S = 10.0
_TEE_DEVICES = {
    "tdx": ("/dev/tdx_guest", "/dev/tdx-guest"),
    "sev-snp": ("/dev/sev-guest",),
}
_CONFIGFS_TSM = "/sys/kernel/config/tsm/report"
_NVIDIA_FIELDS = "name,memory.total,driver_version,compute_cap"
# A memfd that can be sealed against resizing is what the link to the prover is made of.
_F_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4


def examine() -> dict[str, Any]:
    """Everything that `doctor` reports, ready for JSON. Makes this process non-dumpable, as the verifier does."""
    harden_self()
    isolation = _isolation()
    tee = _tee()
    gpu = _gpu()
    sealing = _memfd_sealing()
    return {
        "veriattn": veriattn.__version__,
        "spec_version": SPEC_VERSION,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "model": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "features": sorted(cpu_features()),
        },
        "native": {"isa": active_isa(), "available": list(available_isas()), "threads": get_threads()},
        "gpu": gpu,
        "tee": tee,
        "isolation": isolation,
        "memfd_sealing": sealing,
        "state": {"path": str(state_directory()), "models": _models()},
        "paths": _paths(gpu, tee, isolation, sealing),
    }


def in_words(found: dict[str, Any]) -> str:
    """The same for people, aligned."""
    cpu, native, gpu, tee, isolation = (found[key] for key in ("cpu", "native", "gpu", "tee", "isolation"))
    level = isolation["level"] + (f" ({isolation['reason']})" if isolation.get("reason") else "")
    rows = [
        (
            "veriattn",
            f"{found['veriattn']}, canonical function version {found['spec_version']}, Python {found['python']}",
        ),
        ("system", found["platform"]),
        ("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['memory_bytes'] / 2**30:.1f} GiB"),
        ("features", " ".join(cpu["features"]) or "none of those that the kernels use"),
        ("kernels", f"{native['isa']} (can run: {', '.join(native['available'])}), {native['threads']} threads"),
        (
            "gpu",
            "; ".join(f"{g['name']}, {g['memory']}, driver {g['driver']}" for g in gpu["devices"]) or gpu["reason"],
        ),
        ("tee", tee["kind"] or "none: nothing on this machine can attest the verifier"),
        ("isolation", level),
        (
            "memfd",
            "sealable" if found["memfd_sealing"] else "NOT sealable: the prover cannot be linked by shared memory",
        ),
        ("models", ", ".join(found["state"]["models"]) or f"none under {found['state']['path']}"),
        *((f"-> {key}", value) for key, value in found["paths"].items()),
    ]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:{width}}  {value}" for key, value in rows)


def origin() -> dict[str, Any]:
    """What a figure was measured on, and with which version of this program: for files of results."""
    return {
        "commit": _commit(),
        "version": veriattn.__version__,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": active_isa(),
        "gpu": _gpu(),
    }


def _commit() -> str | None:
    """The commit of this source tree; None where the package is installed, wherever that may be."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=False
        )
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return head.stdout.strip() or None if tracked.returncode == 0 else None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    """GPUs by nvidia-smi; device files alone where it is missing. No GPU library is loaded into this process."""
    nodes = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    program = shutil.which("nvidia-smi")
    if program is None:
        return {
            "devices": [],
            "device_files": nodes,
            "reason": "device files, no nvidia-smi" if nodes else "none found",
        }
    command = [program, f"--query-gpu={_NVIDIA_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {"devices": [], "device_files": nodes, "reason": "nvidia-smi does not answer"}
    devices = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            devices.append(dict(zip(("name", "memory", "driver", "compute_capability"), fields, strict=True)))
    reason = "" if devices else (done.stderr or done.stdout).strip().split("\n")[0] or "nvidia-smi lists none"
    return {"devices": devices, "device_files": nodes, "reason": reason}


def _tee() -> dict[str, Any]:
    """Which trusted environment this machine offers a guest, and how a quote would be made."""
    devices = [path for paths in _TEE_DEVICES.values() for path in paths if Path(path).exists()]
    kind = next((name for name, paths in _TEE_DEVICES.items() if any(Path(p).exists() for p in paths)), None)
    return {"kind": kind, "devices": devices, "configfs_tsm": Path(_CONFIGFS_TSM).is_dir()}


def _isolation() -> dict[str, Any]:
    try:
        return probe([sys.executable, "-m", "veriattn.prover"], [models_directory()]).as_json()
    except VeriattnError as error:
        return {"level": "unknown", "reason": str(error)}


def _memfd_sealing() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.memfd_create("veriattn-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return False
    try:
        return bool(libc.fcntl(fd, _F_ADD_SEALS, _SEALS) == 0)
    finally:
        os.close(fd)


def _models() -> list[str]:
    try:
        return sorted(path.name for path in models_directory().iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _paths(gpu: dict[str, Any], tee: dict[str, Any], isolation: dict[str, Any], sealing: bool) -> dict[str, str]:
    fast = {"amx", "vnni", "avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni", "amx_int8"} & set(cpu_features())
    return {
        "prover": "cpu process of its own"
        + (" (a GPU is present: --device cuda)" if gpu["devices"] or gpu["device_files"] else ""),
        "link": "rings in a sealed memfd" if sealing else "none",
        "attention check": "replay" + ("" if fast else " (no VNNI or AMX here: consider --attention-check transfer)"),
        "trust": "attestable" if tee["kind"] else "this machine itself: without a TEE, trust ends at whoever runs it",
        "keys": "closed to the prover"
        if isolation["level"] in ("own-user", "same-user")
        else "NOT closed to the prover",
    }
