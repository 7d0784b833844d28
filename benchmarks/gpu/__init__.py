"""One program that checks and times everything on a GPU: `python3 -m benchmarks.gpu --out DIR`."""
