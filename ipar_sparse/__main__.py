"""``python -m ipar_sparse`` is the ``ipar-sparse`` command."""

from .cli import main

main()
