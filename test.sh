#!/usr/bin/env bash
# Sets up what the tests need, in .venv, and runs them. Arguments go to pytest: bash test.sh -k degradation; -m slow runs
# those that are left out otherwise (four minutes).
# PYTHON picks the interpreter (3.11 to 3.13) for a new environment; SKIP_SETUP=1 uses the current one as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python3}
if [[ ${SKIP_SETUP:-0} != 1 ]]; then
  if [[ ! -x .venv/bin/python ]]; then
    "$python" -c 'import sys; v = sys.version_info[:2]; sys.exit(
      None if (3, 11) <= v <= (3, 13) else f"test.sh: Python {v[0]}.{v[1]} found, 3.11 to 3.13 needed; set PYTHON")'
    "$python" -m venv .venv
  fi
  wanted=$(cat requirements.txt tests/requirements.txt | cksum)
  if [[ $(cat .venv/installed 2>/dev/null || true) != "$wanted" ]]; then
    .venv/bin/python -m pip install --quiet --upgrade pip
    .venv/bin/python -m pip install --quiet -r tests/requirements.txt
    echo "$wanted" > .venv/installed
  fi
  python=.venv/bin/python
fi

export HF_HUB_OFFLINE=1 NO_ALBUMENTATIONS_UPDATE=1
# Two processes, each with whole files of tests, one thread each: what two would save on these small models they lose in
# waiting for one another. JOBS=0 runs all in this one, for --pdb.
exec env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest tests -m "not slow" --durations=10 \
  -n "${JOBS:-2}" --dist loadfile "$@"
