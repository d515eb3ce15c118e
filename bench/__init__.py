"""The benchmark: our sampler against the stock pipeline, alternating in one run. Run `python -m bench --help`."""
