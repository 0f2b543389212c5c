# make bench, make test: set up their own environment on first use, .venv; nothing to install before.
# make gpu: on a machine with a GPU whose python3 has torch and triton; installs nothing, needs no network.
VENV := .venv
# numpy's and torch's threads would fight the test processes, and the interpreter's small arrays gain nothing by them.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
RESULTS := benchmarks/results/{device}

.PHONY: bench verify test test-all gpu clean help

help:
	@echo "make bench     verify the kernels, then time ViT models beside their peers on photographs"
	@echo "make verify    every kernel against the reference"
	@echo "make test      the tests; make test-all: with the slow ones"
	@echo "make gpu       verify and bench on this machine's GPU, with the python3 on PATH, in under 9 minutes"
	@echo "make clean     remove the environment and what was built"

# The time limit is for a busy machine: rows that it leaves out are named.
bench: verify
	@$(VENV)/bin/fastvit bench --output results --time-limit 150

verify: $(VENV)/.bench
	@mkdir -p results
	@$(VENV)/bin/fastvit verify --json results/verify.json

test: $(VENV)/.test
	@$(ONE_THREAD) $(VENV)/bin/pytest -n 2 -q

test-all: $(VENV)/.test
	@$(ONE_THREAD) $(VENV)/bin/pytest -n 2 -q --slow

# The stamps: made anew when what they install changes. Tests need all that the benchmark needs.
$(VENV)/.bench: setup.py constraints.txt .ci/environment
	@.ci/environment $(VENV) bench
	@touch $@

$(VENV)/.test: $(VENV)/.bench
	@.ci/environment $(VENV) bench,cli,hub,test transformers
	@touch $@

# Exit status 2 of verify: no GPU here, or no PyTorch or Triton; it has said so. A kernel that fails (1) does not stop
# the benchmark, which verifies each model by itself. The time limits end both in good order; `timeout` is for a kernel
# that hangs, and its signal lets them write what they have.
gpu:
	@export PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1; status=0; \
	timeout --foreground -k 10 290 python3 -m fastvit verify --device cuda --time-limit 240 --json '$(RESULTS)/verify.json' || status=$$?; \
	if [ $$status -eq 2 ]; then exit 2; fi; \
	timeout --foreground -k 10 220 python3 -m fastvit bench --device cuda --time-limit 170 --output '$(RESULTS)' && exit $$status

clean:
	rm -rf $(VENV) build dist results *.egg-info .pytest_cache .benchmarks
