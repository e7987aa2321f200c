#!/usr/bin/env bash
# Checks and measures lowrank-compress on this machine's GPU. Needs the NVIDIA driver and CUDA's libraries (a toolkit, or
# the Python wheels that torch brings); no Rust and no network. `LOWRANK_CUDA_LIBS=FOLDER` names the libraries' folder.
# About five minutes on an H100. Everything is written to results/; begin with results/results.md.
# `./run.sh --small` tries the script itself on tiny sizes.
#
# Exit codes: 0 all equal and measured, 1 something is wrong, 3 no CUDA here.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
rm -rf results && mkdir results || exit 1
export LOWRANK_FIXTURES="$PWD/fixtures"
text=()
[[ "${1:-}" == --small ]] && text=(--max-tokens 256)

./gpu_check --device 2>&1 | tee results/device.txt
case "${PIPESTATUS[0]}" in
0) ;;
3)
    printf '# GPU check\n\nnot run: %s\n' "$(tail -n 1 results/device.txt)" >results/results.md
    exit 3
    ;;
*) exit 1 ;;
esac
{
    date -u +%Y-%m-%d
    uname -srm
    ./lowrank-compress --version
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
} >results/machine.txt

failed=()
step() {
    local name="$1"
    shift
    echo "== $name"
    if ! "$@" >"results/$name.txt" 2>&1; then
        failed+=("$name")
        tail -n 20 "results/$name.txt"
    fi
    # A suite that skipped has checked nothing.
    if grep -q skipped: "results/$name.txt"; then
        failed+=("$name: skipped")
        grep skipped: "results/$name.txt" | head -n 1
    fi
}

step suite-compute ./suite-compute cuda --nocapture
step suite-forward ./suite-forward --nocapture
step compress ./lowrank-compress --budget 20% --model fixtures/tiny-mixtral --out results/compressed
step verify-cpu ./lowrank-compress verify --original fixtures/tiny-mixtral --compressed results/compressed --device cpu "${text[@]}"
step verify-cuda ./lowrank-compress verify --original fixtures/tiny-mixtral --compressed results/compressed --device cuda "${text[@]}"
rm -rf results/compressed
step gpu_check ./gpu_check fixtures results "$@"
cat results/results.md

echo
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}" | tee results/verdict.txt
    exit 1
fi
echo "all equal and measured" | tee results/verdict.txt
