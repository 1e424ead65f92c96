#!/bin/sh
# Finds what is missing on this machine before anything is built; prints the Python to use on standard output.
# Needs no Python itself. Settings: PYTHON (an interpreter to use), CXX (a compiler), MIN_FREE_MB (default 3072).
set -u

# The README's first line of set-up is this one; tests/cli/test_preflight.py holds the two together.
APT_LINE='sudo apt install -y git make build-essential python3-dev python3-venv'

missing=''
note() { missing="$missing  - $1
"; }

case "$(uname -s)-$(uname -m)" in
    Linux-x86_64 | Linux-aarch64 | Linux-arm64) ;;
    *)
        echo "error: veriattn runs on Linux (x86-64, aarch64); this is $(uname -s) on $(uname -m)" >&2
        exit 1
        ;;
esac

# A shim that is on the path may still start nothing, so each candidate is run.
works() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' >/dev/null 2>&1; }
tested() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
has_parts() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

python=''
if [ -n "${PYTHON:-}" ]; then
    if works "$PYTHON"; then python=$PYTHON; else note "PYTHON=$PYTHON is not a Python 3.11 or newer"; fi
else
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if tested "$candidate"; then python=$candidate; break; fi
    done
    if [ -z "$python" ] && works python3; then python=python3; fi
    if [ -z "$python" ]; then
        found=$(version python3)
        note "Python 3.11 or newer (python3 is ${found:-missing}); on an older system: sudo apt install -y python3.11 python3.11-dev python3.11-venv"
    fi
fi

compiler=''
for candidate in ${CXX:+"$CXX"} c++ g++ clang++; do
    if command -v "${candidate%% *}" >/dev/null 2>&1; then compiler=$candidate; break; fi
done
# Compiling a line finds a compiler without its headers too. CXX may carry options, hence no quotes.
compiles() { printf '%s\n' "$1" | $compiler -std=c++17 -x c++ -fsyntax-only $2 - >/dev/null 2>&1; }
if [ -z "$compiler" ]; then
    note 'a C++ compiler (c++, g++ or clang++)'
elif ! compiles '#include <cstdint>' ''; then
    note "a working C++17 compiler ($compiler cannot compile a line that includes <cstdint>)"
    compiler=''
fi

if [ -n "$python" ]; then
    own="python3-venv"; header="python3-dev"
    case $python in python3.*) own="$python-venv"; header="$python-dev" ;; esac
    has_parts "$python" || note "the venv module of $python (package $own)"
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)
    if [ -n "$compiler" ]; then
        compiles '#include <Python.h>' "-I$include" || note "Python.h of $python (package $header)"
    elif [ ! -f "$include/Python.h" ]; then
        note "Python.h of $python (package $header)"
    fi
fi

need_mb=${MIN_FREE_MB:-3072}
free_mb() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 { printf "%d", $4 / 1024 }'; }
for place in . "${TMPDIR:-/tmp}"; do
    free=$(free_mb "$place")
    [ -n "$free" ] && [ "$free" -lt "$need_mb" ] && full="$need_mb MB free in $place (there are $free MB; make room, or set TMPDIR)" && note "$full"
    need_mb=$((need_mb / 3))  # the temporary directory holds one build, not the environment
done

if [ -n "$missing" ]; then
    printf 'error: this machine lacks\n%s' "$missing" >&2
    printf 'hint: on Debian or Ubuntu\n  %s\n' "$APT_LINE" >&2
    exit 1
fi
printf '%s\n' "$python"
