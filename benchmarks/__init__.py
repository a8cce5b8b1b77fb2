"""Measurements, side by side in one run: importable as `ipar_sparse.benchmarks`."""
