# The commands of the project. Each one ends with an exit status that means something and needs nothing by hand: what is
# missing on a Debian is installed if you are root, and named if you are not.

export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/causeway/target
export CAUSEWAY_BIN ?= $(CARGO_TARGET_DIR)/debug

# How many random worlds the simulation runs through (SEED=7 replays one), and how long each parser is fuzzed for.
SEEDS ?= 100
FUZZ_SECONDS ?= 60

.PHONY: help demo test e2e e2e-kube lab lint deploy-check fmt bench doc ci fuzz sim static build

help:
	@echo 'make demo    a whole mesh on loopback shows what it does, and ends by itself'
	@echo 'make test    unit, simulation and socket tests, and those with a real PostgreSQL'
	@echo 'make e2e     real OpenSSH, nginx, curl, PostgreSQL, rsync and namespaces; some of it takes root'
	@echo 'make lab     bad networks: loss, NAT, roaming, black holes, captive proxies; STORY=loss runs one; takes root'
	@echo 'make e2e-kube   every verb of kubectl on a real Kubernetes in namespaces; takes root, and Go once to build it;'
	@echo '                QUICK=1 leaves out what takes long, as .ci/run does'
	@echo 'make lint    formatting, clippy, crate walls and licences, shell scripts;   make fmt formats'
	@echo 'make deploy-check   chart, manifests, alerts and dashboard; takes Go once to build helm, and promtool'
	@echo 'make doc     the API documentation, and whether what the documents link to and call is there'
	@echo 'make bench   what the release build costs and moves, as a table'
	@echo 'make static  the edge as one static binary'
	@echo 'make sim     the simulation with more seeds (SEEDS=1000);   make fuzz fuzzes every parser (FUZZ_SECONDS=600)'
	@echo 'make ci      what every change must pass: lint deploy-check doc test e2e demo'

build:
	@scripts/need cargo cc
	@cargo build --workspace --bins

demo: build
	@demo/run

test:
	@scripts/need cargo cc postgres openssl
	@scripts/with-postgres cargo test --workspace

e2e: build
	@e2e/run $(STORIES)

lab: build
	@CAUSEWAY_LAB=whole e2e/run $(if $(STORY),lab/$(STORY),lab carrier)

e2e-kube: build
	@e2e/run kube

lint:
	@scripts/need cargo cc shellcheck
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets -- -D warnings
	@"$$(scripts/need-cargo-deny)" --log-level error check bans licenses sources
	@shellcheck -x scripts/need scripts/need-cargo-deny scripts/mesh.sh e2e/lab.sh scripts/with-postgres scripts/check-docs \
		scripts/static scripts/bench scripts/fuzz scripts/kube-binaries scripts/check-deploy demo/run e2e/run e2e/lib.sh e2e/*/*.sh \
		e2e/kube/lib/answer .ci/run

# With the programs, so that they read what is written for them.
deploy-check: build
	@scripts/check-deploy

fmt:
	@cargo fmt --all

doc:
	@RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --document-private-items
	@scripts/check-docs

sim:
	@$(if $(SEED),SEED=$(SEED),SEEDS=$(SEEDS)) cargo test -p loadtest --tests

fuzz:
	@scripts/fuzz $(FUZZ_SECONDS)

static:
	@scripts/static

bench:
	@scripts/need cargo cc
	@cargo build --release --workspace --bins
	@CAUSEWAY_BIN=$(CARGO_TARGET_DIR)/release scripts/bench

ci: lint deploy-check doc test e2e demo
