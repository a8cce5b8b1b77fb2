"""Names under which AnnData objects hold what this package reads and writes."""


class Keys:
    """AnnData keys, each with its slot."""

    SPATIAL = "spatial"  # obsm, (n, 2): measured positions in the user's units; read only
    PREDICTION = "X_ipar"  # obsm, (n, 2): predicted positions, unit root-mean-square radius
    EMBEDDING = "X_ipar_embedding"  # obsm, (n, d): the embedding that the prediction is made from
    REFERENCE = "X_ipar_reference"  # obsm, (n, 2): in the frame and units of a training slide
    TOP = "X_ipar_top"  # obsm, (n, m, 2): most probable places, in the frame of REFERENCE if there
    TOP_WEIGHT = "ipar_top_weight"  # obsm, (n, m): probability of each, sums to 1 at most
    UNCERTAINTY = "ipar_uncertainty"  # obs, (n,): predicted root mean square error, tissue radii
    TYPICALITY = "ipar_typicality"  # obs, (n,): p-value, small = unlike the training cells
    UNCERTAINTY_REFERENCE = "ipar_uncertainty_reference"  # obs, (n,): the same in its units
    FOREIGN = "ipar_foreign"  # obs, (n,): True for cells that do not belong to the tissue
    EMPTY = "ipar_empty"  # obs, (n,): True for cells without counts
    CELLS = "ipar_cells"  # obs of spots, (m,): expected number of cells that are mapped to a spot
    UNS = "ipar"  # uns: configuration, version, verdict and graph recall of the prediction
    SOURCE = (
        "ipar_source"  # uns: format, unit of positions and what was left out of a vendor's file
    )
