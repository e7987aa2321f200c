#!/usr/bin/env bash
# Checks and measures lowrank-compress on this machine's GPU. Needs the NVIDIA driver and CUDA's libraries (a toolkit, or
# the Python wheels that torch brings); no Rust and no network. `LOWRANK_CUDA_LIBS=FOLDER` names the libraries' folder.
# Under eight minutes, whatever happens: every step has a limit of its own, and `seconds_max` ends them all. One that fails does
# not stop the others. Everything is written to results/ as it comes; begin with results/results.md.
# `./run.sh --small` tries the script itself on tiny sizes.
#
# Exit codes: 0 all equal and measured, 1 something is wrong (the last lines say what), 3 no CUDA here.
set -uo pipefail
seconds_max=470
# Limits are for a GPU; an emulated one on a busy machine gets ten times as long.
patience=1
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
rm -rf results && mkdir results || exit 1
export LOWRANK_FIXTURES="$PWD/fixtures"
tool=./lowrank-compress
model=fixtures/tiny-mixtral
text=(--max-tokens 4096)
job=(--model "$model" --device cuda --algebra cuda --cache none --quiet)
goal=(--budget 20%)
if [[ "${1:-}" == --small ]]; then
    text=(--max-tokens 256)
    patience=10
    # One layer's first experts, without a look at the spectra of all.
    for expert in 0 1; do
        for projection in w1 w2 w3; do
            printf '%s"model.layers.0.block_sparse_moe.experts.%s.%s": 60' "${comma-}" "$expert" "$projection"
            comma=', '
        done
    done >results/ranks.body
    printf '{%s}\n' "$(cat results/ranks.body)" >results/ranks.json && rm results/ranks.body
    goal=(--ranks results/ranks.json)
    job+=(--calibrate none)
fi

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
    nproc
    "$tool" --version
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
} >results/machine.txt

failed=()
fail() {
    failed+=("$1")
    echo "FAILED: $1" | tee -a results/verdict.txt
}

# step NAME LIMIT_SECONDS COMMAND...: its output goes to results/NAME.txt.
step() {
    local name="$1" limit=$(($2 * patience)) left=$((seconds_max * patience - SECONDS)) status
    shift 2
    if ((left <= 0)); then
        fail "$name: not run, no time left"
        return 1
    fi
    ((limit > left)) && limit=$left
    echo "== $name ($SECONDS s)"
    timeout --kill-after=5 "$limit" "$@" >"results/$name.txt" 2>&1
    status=$?
    if ((status == 124 || status == 137)); then
        fail "$name: stopped after $limit s"
    elif ((status)); then
        fail "$name: exit code $status"
    else
        return 0
    fi
    tail -n 20 "results/$name.txt"
    return 1
}

# The suites, and the whole job on the bundled model: twice with other numbers of lanes, which must not change a byte.
step suite-compute 120 ./suite-compute --include-ignored
step suite-forward 60 ./suite-forward --include-ignored
step plan 90 "$tool" plan "${job[@]}" --budget 20% --plan-out results/plan.json
if step compress 90 "$tool" "${job[@]}" "${goal[@]}" --workers 2 --out results/compressed; then
    step compress-8-workers 90 "$tool" "${job[@]}" "${goal[@]}" --workers 8 --out results/again &&
        step compress-repeats 10 diff -r results/compressed results/again
    step compress-on-device 10 grep -q ', cuda"' results/compressed/lowrank_report.json
    step compress-not-on-cpu 10 sh -c '! grep -E "\"route\": \"(exact|randomized|projector) f(32|64)\"" results/compressed/lowrank_report.json'
    step verify-cpu 60 "$tool" verify --original "$model" --compressed results/compressed --device cpu "${text[@]}"
    step verify-cuda 60 "$tool" verify --original "$model" --compressed results/compressed --device cuda "${text[@]}"
    step reproduce 60 "$tool" reproduce results/compressed --model "$model" --quick --sample 4 --cache none
fi
step compress-projector 90 "$tool" "${job[@]}" "${goal[@]}" --method projector --out results/projected &&
    step verify-projector 60 "$tool" verify --original "$model" --compressed results/projected --device cuda "${text[@]}"
rm -rf results/compressed results/again results/projected results/*.report.html

# Parity and speed, each in a process of its own.
for part in $(./gpu_check --parts); do
    step "gpu_check-$part" 150 ./gpu_check "$part" fixtures results "$@"
done
./gpu_check --summary results || fail "summary"
cat results/results.md

echo
if ((${#failed[@]})); then
    echo "in $SECONDS s; wrong are:"
    cat results/verdict.txt
    exit 1
fi
echo "all equal and measured, in $SECONDS s" | tee results/verdict.txt
