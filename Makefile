# make bench, make test: set up their own environment on first use, .venv; nothing to install before.
# make gpu: on a machine with a GPU whose python3 has torch and triton; installs nothing, needs no network.
VENV := .venv
# The oldest Triton that is supported, and the newest release: each alone in a folder that goes before $(VENV)'s own on
# the path.
TRITONS := 3.6.0 3.9.0
# Of timm and transformers the oldest whose blocks `fastvit.accelerate` knows; in $(VENV)-newest whatever is newest.
OLDEST := timm==1.0.15 transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2
# numpy's and torch's threads would fight the test processes, and the interpreter's small arrays gain nothing by them.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: bench verify test test-all static gpu host frozen kernels pages clean help

help:
	@echo "make bench     verify the kernels, then time ViT models beside their peers on photographs"
	@echo "make verify    every kernel against the reference"
	@echo "make test      the tests; make test-all: with the slow ones"
	@echo "make static    compile every kernel for six architectures with two Tritons: docs/static, and all that was"
	@echo "               found in results/static; 40 minutes and more on 2 cores"
	@echo "make gpu       all that is worth knowing on this machine's GPU, with the python3 on PATH, under 9 minutes:"
	@echo "               OUT=folder FROM=archive COMMIT=name BUDGET=seconds MODELS=names BATCH=n STEPS=names"
	@echo "make host      launches of a model and the host's time for them, without a GPU: benchmarks/results/host.json"
	@echo "make frozen    where a model's time goes before and after it is frozen: docs/frozen.md and its picture"
	@echo "make kernels   a block's launches, from the code: docs/kernels.md and its picture"
	@echo "make pages     the pages and tables of benchmarks/results/ anew, and the table in README.md"
	@echo "make clean     remove the environment and what was built"

# The peers that `make bench` times ours beside.
PEERS := timm,frozen,frozen auto

# What would not fit the time limit is left out before the start, and named. With a GPU, ViT-B is tuned first.
bench: verify
	@if $(VENV)/bin/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(VENV)/bin/fastvit tune --models vit_base_patch16_224 --batches 256 --time-limit 45 || true; fi
	@$(VENV)/bin/fastvit bench --peers "$(PEERS)" --output results --time-limit 270

verify: $(VENV)/.bench
	@mkdir -p results
	@$(VENV)/bin/fastvit verify --json results/verify.json

test: $(VENV)/.test $(VENV)-static-$(firstword $(TRITONS))/.installed $(VENV)-oldest/.installed
	@$(ONE_THREAD) $(VENV)/bin/pytest -n 2 -q

test-all: $(VENV)/.test $(VENV)-static-$(firstword $(TRITONS))/.installed $(VENV)-oldest/.installed
	@$(INTO) $(VENV)-newest timm transformers tokenizers huggingface-hub
	@touch $(VENV)-newest/.installed
	@$(ONE_THREAD) $(VENV)/bin/pytest -n 2 -q --slow

# The stamps: made anew when what they install changes. Tests need all that the benchmark needs.
$(VENV)/.bench: setup.py constraints.txt .ci/environment
	@.ci/environment $(VENV) bench,openvino,onnxruntime
	@touch $@

$(VENV)/.test: $(VENV)/.bench
	@.ci/environment $(VENV) bench,openvino,onnxruntime,cli,hub,train,ray,test transformers datasets scikit-learn
	@touch $@

# What is on Python's path where nothing is installed: a folder that holds fastvit alone. With the repo's root there,
# whoever looks for the package `kernels` finds our folder. `python -m` would put the root there, scripts do not.
PLACE := build/path

$(PLACE)/fastvit:
	@mkdir -p $(@D)
	@ln -sfn ../../fastvit $@

# A Triton whose report fails does not stop the other's, nor the pages.
static: $(TRITONS:%=$(VENV)-static-%/.installed) $(PLACE)/fastvit
	@rm -rf results/static; status=0; for version in $(TRITONS); do \
		PYTHONPATH=$(VENV)-static-$$version:$(PLACE) PYTHONDONTWRITEBYTECODE=1 $(ONE_THREAD) $(VENV)/bin/python \
			benchmarks/static_report.py --json results/static/$$version.json || status=$$?; \
		if [ $$status -eq 130 ]; then exit 130; fi; \
	done; \
	cd $(PLACE) && $(abspath $(VENV))/bin/python -m fastvit.benchmarks.static.pages \
		$(CURDIR)/docs/static $(TRITONS:%=$(CURDIR)/results/static/%.json) && exit $$status

INTO := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target

$(VENV)-static-%/.installed: $(VENV)/.bench
	@echo "installing Triton $* in $(@D)"
	@$(INTO) $(@D) triton==$*
	@touch $@

$(VENV)-oldest/.installed: $(VENV)/.bench
	@echo "installing $(OLDEST) in $(@D)"
	@$(INTO) $(@D) $(OLDEST)
	@touch $@

# Under nine minutes, with what it takes to stop a step that hangs. A second call goes on from there.
# OUT: the folder for what it finds, results/gpu if not said. FROM: the archive of an earlier call, where OUT has none.
# COMMIT: what to call these sources where there is no git. BUDGET: seconds. MODELS, BATCH: for a smaller GPU.
# STEPS: only these.
gpu: $(PLACE)/fastvit
	@PYTHONPATH="$(PLACE)$${PYTHONPATH:+:$$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 python3 benchmarks/runbook.py \
		$(if $(OUT),--out "$(OUT)") $(if $(FROM),--from "$(FROM)") $(if $(COMMIT),--commit "$(COMMIT)") \
		$(if $(BUDGET),--budget $(BUDGET)) $(if $(MODELS),--models $(MODELS)) $(if $(BATCH),--batch $(BATCH)) \
		$(if $(STEPS),--only $(STEPS))

# Python's time between launches, on a driver that does nothing. On a quiet machine.
host: $(VENV)/.test
	@PYTHONPATH=tests $(ONE_THREAD) $(VENV)/bin/python tests/stub_gpu/launch_ops.py host benchmarks/results/host.json

# On a quiet machine.
frozen: $(VENV)/.bench
	@$(VENV)/bin/python benchmarks/frozen_steps.py

kernels: $(VENV)/.bench $(PLACE)/fastvit
	@cd $(PLACE) && $(abspath $(VENV))/bin/python -m fastvit.benchmarks.block_launches

pages: $(VENV)/.bench
	@$(VENV)/bin/python -m fastvit.benchmarks.report.summary

clean:
	rm -rf $(VENV) $(TRITONS:%=$(VENV)-static-%) $(VENV)-oldest $(VENV)-newest build dist results *.egg-info .pytest_cache .benchmarks
