"""Training: networks, data, loop, export. The only part that needs torch: `pip install hourglass-codec[train]`.

python -m hourglass.codec.train run PICTURES --out runs/a
python -m hourglass.codec.train export runs/a --id my-model-1 --pictures PICTURES --measure TEST_PICTURES
"""
