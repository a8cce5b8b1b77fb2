"""From a trained run to a layout of cells that have no positions."""
