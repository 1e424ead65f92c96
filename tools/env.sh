#!/bin/sh
# Makes or completes a virtual environment: env.sh VENV base|dev|accept|browser|torch|peers. Writes nowhere else; pip's own settings hold.
set -eu

venv=$1
kind=$2
here=$(dirname "$0")
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
say() { echo "set-up: $*" >&2; }

fresh() {
    # A set-up that was killed leaves an environment that may not even start: it is made again.
    if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
        python=$(sh "$here/preflight.sh")
        say "making $venv with $("$python" --version 2>&1)"
        rm -rf "$venv"
        "$python" -m venv "$venv"
    fi
}

# CPU builds come first: the default on the public index brings gigabytes of GPU libraries.
cpu_torch() {
    want="torch==${TORCH_VERSION:-2.13.0}"
    "$venv/bin/python" -c 'import torch' >/dev/null 2>&1 && return
    say "installing $want (CPU build)"
    pip install -qq "$want+cpu" 2>/dev/null && return
    say 'no CPU build on this index; taking its default (PIP_EXTRA_INDEX_URL may name one that has it)'
    pip install -qq "$want"
}

# A torch for GPUs brings the Triton that belongs to it; the CPU build brings none.
triton() {
    "$venv/bin/python" -c 'import triton' >/dev/null 2>&1 && return
    say 'installing triton, for its interpreter'
    pip install -qq "triton==${TRITON_VERSION:-3.6.0}"
}

fresh
case $kind in
    base)
        say 'installing veriattn (this compiles its native kernels)'
        pip install -qq -e .
        ;;
    dev)
        say 'installing the tools that the tests need'
        # The extra's own requirements, so that nothing is compiled twice.
        "$venv/bin/python" "$here/extra.py" dev server client >"$venv/dev.txt"
        pip install -qq -r "$venv/dev.txt"
        ;;
    accept | browser)
        say "installing what the tests of '$kind' need"
        "$venv/bin/python" "$here/extra.py" "$kind" >"$venv/$kind.txt"
        pip install -q -r "$venv/$kind.txt"
        ;;
    peers)
        say 'installing llama-cpp-python (this compiles llama.cpp: some minutes)'
        # Where its AMX path crashes: CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON' make bench-peers
        CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF}" \
            pip install -q "llama-cpp-python==${LLAMA_CPP_PYTHON_VERSION:-0.3.36}"
        ;;
    torch)
        cpu_torch
        triton
        say 'installing veriattn and the tools that the tests need'
        "$venv/bin/python" "$here/extra.py" dev torch-test >"$venv/dev.txt"
        pip install -qq -r "$venv/dev.txt" -e .
        ;;
    *)
        echo "usage: $0 VENV base|dev|accept|browser|torch|peers" >&2
        exit 2
        ;;
esac
