"""A trained backbone for other libraries (`crisp export RUN OUT`).

config.py       the choices
command.py      export: load, write aside, rename into place
backbone.py     the backbone as a plain ViT with one final norm, and the norm that is left over
timm_format.py  for timm              hf_format.py  for transformers' ViTModel
onnx_format.py  for ONNX runtimes     preparation.py  how images are prepared, for all of them
"""
