"""A data set to train a SAM on whose licences let the weights be shipped: cut-outs on photographs, drawn anew.

    python -m experiments.reference_data pack --out pack          # asks npm and Debian's archive for packages by name
    python -m experiments.reference_data draw --pack pack --out composites_val --part val --count 200
    python -m experiments.train_reference --composites pack --val composites_val --out reference

`sources.py` names the packages and their licences, `pack.py` takes cut-outs and photographs out of them,
`composites.py` draws an image and its masks from a number, `surfaces.py` what needs no source: textures and shapes.
"""
