"""Processes that JAX runs as one: started, waited for, and the address at which they meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import jax


def start(program: list[str], devices: int = 1) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    return subprocess.Popen([sys.executable, *program], env=environment, stderr=subprocess.PIPE)


def wait_for(*processes: subprocess.Popen) -> None:
    try:
        for process in processes:
            _, error = process.communicate(timeout=480)
            assert process.returncode == 0, error.decode()[-3000:]
    finally:
        for process in processes:
            process.kill()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
