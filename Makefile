# make setup    .venv with everything in it (again only when requirements/ or pyproject.toml change)
# make demo     the main job, end to end: prints a report and writes demo-report/
# make test     every check, then every test; fails when any of them does

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test
setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(wildcard requirements/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@requirements/install.sh $(VENV)
	@touch $@

demo: setup
	@$(VENV)/bin/harli demo

# Every check runs, whatever the others say; pytest comes last so that its summary is the closing line.
test: setup
	@status=0; \
	for check in "ruff check ." "ruff format --check ." "mypy" "lint-imports --no-logo"; do \
		echo "== $$check"; \
		$(VENV)/bin/$$check || { status=1; failed="$$failed '$$check'"; }; \
	done; \
	echo "== pytest$${failed:+ (failed already:$$failed)}"; \
	$(VENV)/bin/pytest || status=1; \
	exit $$status
