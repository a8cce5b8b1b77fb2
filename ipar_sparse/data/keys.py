"""Names under which AnnData objects carry what this package reads and writes."""


class Keys:
    """AnnData keys, each with the slot it lives in."""

    SPATIAL = "spatial"  # obsm, (n, 2): measured positions, in the user's units; read only
    PREDICTION = "X_ipar"  # obsm, (n, 2): predicted positions, unit root-mean-square radius
    EMBEDDING = "X_ipar_embedding"  # obsm, (n, d): the embedding the prediction was made from
    UNCERTAINTY = "ipar_uncertainty"  # obs, (n,): how far a cell may lie from its place
    EMPTY = "ipar_empty"  # obs, (n,): True where a cell has no counts at all
    UNS = "ipar"  # uns: parameters, version and graph recall of the prediction
