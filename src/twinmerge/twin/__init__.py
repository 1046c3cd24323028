"""Twin-Merging: one shared model, a low-rank exclusive part per expert, a router, an exact runtime.

Here stands what the files of a twin folder are called, and which version of the layout they have.
"""

TWIN, ROUTER, STATISTICS = "twin.safetensors", "router.safetensors", "router.statistics.safetensors"
MASKS_VERSION, SEALED_VERSION, TWIN_VERSION = 3, 4, 5
"""Of a twin's layout: 1 factors, 2 packed by a codec, 3 masks, 4 any of them, sealed, 5 with the shared model in a
folder of its own. Until 4 the shared model lay beside `twin.safetensors`, and is still read there."""
SCALES = "scales"
TYPE = "twinmerge_twin"
"""`model_type` of a twin's config.json."""
