# Sourced by the README's two commands: makes or reuses .venv with pinned dependencies and this package, its C++
# extension built. Call: prepare_environment [extra ...], e.g. prepare_environment test plot
prepare_environment() {
    local root stamp wanted extras
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    extras=$(IFS=,; echo "$*")
    if [ ! -x "$root/.venv/bin/python" ]; then
        local python=${PYTHON:-python3}
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: $("$python" --version) is too old; set PYTHON to Python 3.10 or newer" >&2; return 1; }
        echo "[setup] making .venv with $("$python" --version)"
        "$python" -m venv "$root/.venv" || { rm -rf "$root/.venv"; return 1; } # half a .venv would be taken for one
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
    stamp="$root/.venv/.installed-$extras"
    wanted=$(cat "$root/setup.py" "$root/pyproject.toml" "$root/tools/constraints.txt" \
                 "$root"/tools/{transformers4,transformer_engine}.txt "$root"/megatron/core/{datasets,extensions}/*.{cpp,h} | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        echo "[setup] .venv is up to date"
        return 0
    fi
    # torch first and pinned: whatever else is installed then finds it there and pulls no other build.
    echo "[setup] installing torch"
    python -m pip install -qq --constraint "$root/tools/constraints.txt" torch || return 1
    echo "[setup] installing the package, its C++ extension and pinned dependencies"
    python -m pip install -qq --constraint "$root/tools/constraints.txt" setuptools wheel pybind11 || return 1
    python -m pip install -qq --constraint "$root/tools/constraints.txt" --no-build-isolation \
        --editable "$root${extras:+[$extras]}" || return 1
    if [[ ",$extras," == *,test,* ]]; then
        echo "[setup] installing transformers 4 into a directory of its own"
        python -m pip install -qq --no-deps --upgrade --target "$root/.venv/transformers4" \
            --requirement "$root/tools/transformers4.txt" || return 1
        echo "[setup] installing the sources of Transformer Engine beside it"
        python -m pip install -qq --no-deps --upgrade --target "$root/.venv/transformer_engine_sources" \
            --requirement "$root/tools/transformer_engine.txt" || return 1
    fi
    echo "$wanted" > "$stamp"
}
